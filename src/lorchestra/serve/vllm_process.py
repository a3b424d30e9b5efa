"""A vLLM server as a child process: its command line, and its life from port to signal."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorchestra.errors import LorchestraError, UserError

log = logging.getLogger(__name__)

# What vLLM takes for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
BASE_NAME = "base"
_LORA_FLAGS = ("--max-loras", "--max-cpu-loras", "--max-lora-rank")
_OWN = (*_LORA_FLAGS, "--model", "--served-model-name", "--port", "--host")
_TAIL = 30  # lines of the child's own words that a failure shows
_CPU = "PunicaWrapperCPU"  # the name of its LoRA kernels for a CPU
_STOPPED_IN = 10.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Launch:
    """How vLLM is started.

    Args:
        base: a Hugging Face directory.
        python: of the environment that vLLM is installed in.
        max_loras: adapters that one batch may mix.
        max_cpu_loras: adapters in memory, at least ``max_loras``; as many are kept before the least recently used goes.
        max_rank: the highest rank of an adapter; rounded up to one that vLLM takes.
        max_length: positions of a sequence; ``None`` for the base's own.
        dtype: of the base's weights, as vLLM calls it.
        arguments: further ones, as vLLM spells them.
        environment: variables beside this process's own.
    """

    base: Path
    python: str = sys.executable
    max_loras: int = 8
    max_cpu_loras: int = 64
    max_rank: int = 32
    max_length: int | None = None
    dtype: str = "auto"
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.max_loras <= self.max_cpu_loras:
            raise UserError(f"vLLM needs 1 ≤ max_loras ≤ max_cpu_loras; got {self.max_loras} and {self.max_cpu_loras}")
        slot_rank(self.max_rank)
        own = (
            "--max-loras",
            "--max-cpu-loras",
            "--max-lora-rank",
            "--model",
            "--served-model-name",
            "--port",
            "--host",
        )
        taken = [word for word in self.arguments if word.partition("=")[0].replace("_", "-") in own]
        if taken:
            raise UserError(f"{taken[0]} is set by lorchestra itself; leave it out of vLLM's arguments")

    @classmethod
    def read(cls, base: Path, arguments: Sequence[str], **settings: Any) -> Launch:
        """A launch, of which ``--max-loras``, ``--max-cpu-loras`` and ``--max-lora-rank`` are taken from ``arguments``.

        Args:
            base: a Hugging Face directory.
            arguments: vLLM's, as it spells them.
            settings: other fields.

        Raises:
            UserError: a number that is none, or that vLLM does not take.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for flag in _LORA_FLAGS:
            parser.add_argument(flag, type=int)
        try:
            known, rest = parser.parse_known_args(list(arguments))
        except argparse.ArgumentError as error:
            raise UserError(f"vLLM's arguments: {error}") from error
        loras = known.max_loras or cls.max_loras
        kept = known.max_cpu_loras or max(loras, cls.max_cpu_loras)
        rank = known.max_lora_rank or cls.max_rank
        return cls(base, max_loras=loras, max_cpu_loras=kept, max_rank=rank, arguments=tuple(rest), **settings)


def slot_rank(rank: int) -> int:
    """The least ``--max-lora-rank`` that holds ``rank``.

    Raises:
        UserError: there is none.
    """
    if not 1 <= rank <= RANKS[-1]:
        raise UserError(f"vLLM serves adapters of rank 1 to {RANKS[-1]}; got {rank}")
    return next(size for size in RANKS if size >= rank)


def command_line(launch: Launch, port: int = 8001, host: str = "127.0.0.1") -> list[str]:
    """What starts vLLM so that :class:`lorchestra.serve.vllm.VllmEngine` can use it, word by word.

    Adapters come by ``/v1/load_lora_adapter``, which needs ``VLLM_ALLOW_RUNTIME_LORA_UPDATING`` in the environment
    (:func:`printed` writes both).
    """
    length = ["--max-model-len", str(launch.max_length)] if launch.max_length else []
    return [
        launch.python,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(launch.base), "--served-model-name", BASE_NAME, "--dtype", launch.dtype),
        *length,
        *("--enable-lora", "--max-loras", str(launch.max_loras), "--max-cpu-loras", str(launch.max_cpu_loras)),
        *("--max-lora-rank", str(slot_rank(launch.max_rank)), "--trust-request-chat-template"),
        *("--host", host, "--port", str(port)),
        *launch.arguments,
    ]


def environment(launch: Launch) -> dict[str, str]:
    """Variables that vLLM is started with, beside those of this process."""
    return {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_SERVER_DEV_MODE": "0",
        **launch.environment,
    }


def printed(launch: Launch, port: int = 8001, host: str = "127.0.0.1") -> str:
    """The command for a shell, variables first: for a vLLM that is started elsewhere and attached to by its URL."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment(launch).items()]
    return " ".join([*variables, shlex.join(command_line(launch, port, host))])


def others(base: str, adapters: Mapping[str, Path], rank: int) -> dict[str, list[str]]:
    """Command lines that serve portable adapters (``lorchestra export``) without us, by the engine's name.

    Args:
        base: directory or name of the base.
        adapters: name → directory; they are fixed when the server starts.
        rank: the highest of theirs; vLLM is left out where it takes none so high.
    """
    named = [f"{name}={path}" for name, path in adapters.items()]
    lmdeploy = ["lmdeploy", "serve", "api_server", base, "--backend", "pytorch", "--adapters", *named]
    if rank > RANKS[-1]:
        return {"lmdeploy": lmdeploy}
    vllm = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(slot_rank(rank)), "--lora-modules", *named]
    return {"vllm": vllm, "lmdeploy": lmdeploy}


def default_engine() -> str:
    """``vllm`` where it is installed and there is CUDA, else ``embedded``."""
    if find_spec("vllm") is None:
        return "embedded"
    import torch

    return "vllm" if torch.cuda.is_available() else "embedded"


class Child:
    """One run of vLLM, in a process group of its own, on a free port of this machine only.

    Args:
        launch: how.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.api_key = secrets.token_urlsafe(32)  # nobody else on this machine gets past the gateway
        self.url = ""
        self.on_cpu = False  # as it says itself
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._said: deque[str] = deque(maxlen=_TAIL)

    async def start(self) -> None:
        """Start it; whether it answers is seen by asking.

        Raises:
            UserError: there is no such program.
        """
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        told = {"VLLM_CONFIGURE_LOGGING": "1", "VLLM_LOGGING_LEVEL": "INFO"}  # enough to see what it runs on
        variables = {**os.environ, **told, **environment(self.launch), "VLLM_API_KEY": self.api_key}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command_line(self.launch, port),
                env=variables,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"vLLM cannot be started with {self.launch.python!r}: {error.strerror}; give the python of the "
                "environment that it is installed in"
            ) from error
        log.info("vLLM started, process %d, port %d", self._process.pid, port)
        self._reader = asyncio.create_task(self._relay(self._process))

    @property
    def pid(self) -> int | None:
        """Of the process that was started last."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.returncode is None

    def failure(self) -> LorchestraError:
        """Why it is not there any more, in its own last words."""
        code = self._process.returncode if self._process else None
        said = "\n".join(f"  {line}" for line in self._said) or "  (nothing)"
        return LorchestraError(f"vLLM ended with code {code}; it said last:\n{said}")

    async def stop(self) -> None:
        """End it and whatever it started: SIGTERM, after a while SIGKILL."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), _STOPPED_IN)
        except TimeoutError:
            log.warning("vLLM does not end, so it is killed")
        self._signal(signal.SIGKILL)  # the engine processes of a server that was itself killed
        await self._process.wait()
        if self._reader is not None:
            await self._reader

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # the whole group has ended

    async def _relay(self, process: asyncio.subprocess.Process) -> None:
        """What it says goes to the log."""
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                continue  # longer than the buffer, which was emptied
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._said.append(text)
            self.on_cpu |= _CPU in text
            log.debug("vLLM: %s", text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
