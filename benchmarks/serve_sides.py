"""Who answers in ``benchmarks/serve.py``: servers as child processes, and PEFT's process, asked line by line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS, PEFT = HERE / "serve_parts.py", HERE / "peers" / "with_peft.py"


def run(words: Sequence[Any], asked: argparse.Namespace) -> Any:
    """One of our scripts in a process of its own: the JSON of its last line."""
    command = [sys.executable, *map(str, words), "--threads", str(asked.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def server(name: str, command: Sequence[Any], asked: argparse.Namespace, more: Mapping[str, str]) -> Iterator[int]:
    """A server on a free port, from when it is healthy; the port is added to ``command``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = asked.scratch / f"{name}.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(more)
    with log.open("w") as out:
        words = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended with {process.returncode}:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.3)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ours(
    job: Mapping[str, Any],
    names: Sequence[str],
    asked: argparse.Namespace,
    memory: str = "",
    kernel: bool = False,
    engine_process: bool = True,
) -> Any:
    """``lorchestra serve``."""
    config = asked.scratch / f"serve-{len(names)}-{kernel:d}{engine_process:d}.yaml"
    settings: dict[str, Any] = {
        "adapters": {name: f"{job['adapters']}/{name}" for name in names},
        "request_log": "",
        "kernel": kernel,
        "engine_process": engine_process,
    }
    config.write_text(json.dumps(settings | ({"memory": memory} if memory else {})), encoding="utf-8")
    words = [sys.executable, "-m", "lorchestra", "serve", job["base"], "--name", "base", "--engine", "embedded"]
    threads = {"OMP_NUM_THREADS": str(asked.threads)}
    return server("lorchestra", [*words, "--config", config, "--max-batch", max(64, asked.clients)], asked, threads)


def vllm(job: Mapping[str, Any], names: Sequence[str], asked: argparse.Namespace) -> Any:
    """vLLM's server, with these adapters resident."""
    python = asked.vllm_python
    words = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", job["base"], "--served-model-name", "base",
        "--dtype", asked.vllm_dtype, "--max-model-len", 1024, "--enable-lora", "--max-loras", len(names),
        "--max-cpu-loras", len(names), "--max-lora-rank", job["rank"],
        "--lora-modules", *(f"{n}={job['adapters']}/{n}" for n in names),
    ]  # fmt: skip
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_CPU_OMP_THREADS_BIND": asked.vllm_cores,
    }  # fmt: skip
    openmp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    return server("vllm", words, asked, variables | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}))


class Worker:
    """``benchmarks/peers/with_peft.py``, asked line by line."""

    def __init__(self, job: Mapping[str, Any], asked: argparse.Namespace) -> None:
        self.log = (asked.scratch / "peft.log").open("w")
        command = [sys.executable, str(PEFT), job["path"], "--threads", str(asked.threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()

    def answer(self) -> Any:
        """The next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"PEFT's side ended:\n{Path(self.log.name).read_text()[-4000:]}")
        return json.loads(line)

    def do(self, what: str, **more: Any) -> Any:
        """Ask, and wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.process.stdin.flush()
        return self.answer()
