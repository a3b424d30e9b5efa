"""Serving side by side: lorchestra, vLLM on the CPU, transformers and PEFT, and the bound of the matrix products.

Same base (SmolLM2-135M, bfloat16), the same adapter directories (rank 8 on all linear modules, random factors), 30 to
60 tokens of this repository's documentation as a prompt (others in every round), 48 new tokens each, greedy. Prints
tables and writes ``benchmarks/results/serve.json``, part by part::

    python scripts/vllm_tests.py                                   # once: makes .vllm-venv (3.4 GB, minutes)
    python benchmarks/serve.py --vllm-python .vllm-venv/bin/python # everything, half an hour
    python benchmarks/serve.py --only crowd --vllm-python …        # 57 at once: the base, 57 adapters
    python benchmarks/serve.py --only peft                         # 57 adapters, and PEFT's mixed batch
    python benchmarks/serve.py --only stream                       # one at a time, and transformers' generate
    python benchmarks/serve.py --only first                        # an adapter's first use, and a switch
    python benchmarks/serve.py --only zipf                         # 1,000 registered, room for 57
    python benchmarks/serve.py --short                             # a tiny random base: for CI

What is counted:

- lorchestra and vLLM answer over HTTP, streamed, to the same clients (``benchmarks/serve_load.py``) on this machine;
  transformers and PEFT are called in their process, without HTTP.
- tokens/s: new tokens of all requests, divided by the time from the first request to the last token, reading the
  prompts included. First token, token to token and whole answer are percentiles over all requests of a round.
- rounds: every side in turn, all servers up; the figures are medians over the rounds. Rows of a batch all have
  adapters, or none has.
- bound: matrix products of one decoding step with the base's weights, the head's included; nothing of attention, of
  adapters or of prompts. Measured in every round, in a process of its own.
- vLLM has Intel's OpenMP where its environment has it, as its documentation advises. By itself it keeps a core free for
  its HTTP side; ``--vllm-cores 0-1`` (``VLLM_CPU_OMP_THREADS_BIND``) says otherwise.
- an adapter's first use: a request for one token after 32, minus the same request again; files are in the page cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from serve_load import Request, crowd, median_of, percentiles, summary_of_steps  # noqa: E402
from serve_sides import PARTS, Worker, ours, run, vllm  # noqa: E402
from serve_tables import table  # noqa: E402

RESULTS = HERE / "results" / "serve.json"
LENGTHS = (30, 60)  # tokens of a prompt


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM; else no such rows")
    options.add_argument("--vllm-cores", default="auto", help="its VLLM_CPU_OMP_THREADS_BIND")
    options.add_argument("--vllm-dtype", default="bfloat16", help="float32 for a CPU without bfloat16 instructions")
    options.add_argument("--one-process", action="store_true", help="lorchestra with engine_process: false too")
    options.add_argument("--kernel", action="store_true", help="lorchestra with --kernel too")
    options.add_argument("--only", choices=list(MEASURES), action="append", help="this part; repeat")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--clients", type=int, default=57, help="requests at a time, and adapters that take turns")
    options.add_argument("--new", type=int, default=48, help="tokens of an answer")
    options.add_argument("--registered", type=int, default=1000, help="adapters of the Zipf traffic")
    options.add_argument("--exponent", type=float, action="append", help="of the Zipf traffic; repeat. 1 unless given")
    options.add_argument("--requests", type=int, default=342, help="of a round of the Zipf traffic")
    options.add_argument("--fresh", type=int, default=60, help="adapters whose first use is timed")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--work", type=Path, help="where adapters are made, to be used again; else a temporary place")
    options.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, as JSON")
    options.add_argument("--short", action="store_true", help="tiny random base, one round; writes nothing")
    asked = options.parse_args()
    if asked.short:
        asked.rounds, asked.clients, asked.new, asked.registered, asked.requests, asked.fresh = 1, 4, 4, 12, 12, 4
    asked.exponent = asked.exponent or [1.0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # servers are ended on the way out
    with tempfile.TemporaryDirectory() as scratch:
        asked.scratch, work = Path(scratch), asked.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = {} if asked.short or not asked.out.exists() else json.loads(asked.out.read_text(encoding="utf-8"))
        parts = asked.only or list(MEASURES)
        many = asked.registered if "zipf" in parts else asked.clients + (asked.fresh if "first" in parts else 0)
        made = run([PARTS, "prepare", work, "--adapters", many, *["--tiny"] * asked.short], asked)
        job = json.loads(Path(made["job"]).read_text(encoding="utf-8")) | {"path": made["job"]}
        for part in parts:
            found[part] = about(asked, job) | MEASURES[part](asked, job)
            if not asked.short:  # after each, so that an interrupted benchmark has what it measured
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def about(asked: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """When, where and of what."""
    from importlib.metadata import version

    names = ("lorchestra", "torch", "transformers", "peft")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"), "threads": asked.threads, "cpus": os.cpu_count(),
        "load": os.getloadavg()[1], "rounds": asked.rounds, "clients": asked.clients, "new": asked.new,
        "prompt": LENGTHS, "adapter_parameters": job["adapter_parameters"], "rank": job["rank"],
        "vllm_cores": asked.vllm_cores if asked.vllm_python else None, "vllm_dtype": asked.vllm_dtype,
        "versions": {name: version(name) for name in names},
    }  # fmt: skip


# ---- who is asked what


def prompts(job: Mapping[str, Any], count: int, seed: object, length: int = 0) -> list[list[int]]:
    """Pieces of the text."""
    draw, text, found = random.Random(str(seed)), job["text"], []
    for _ in range(count):
        n = length or draw.randint(*LENGTHS)
        start = draw.randrange(len(text) - n)
        found.append(text[start : start + n])
    return found


def models_of(job: Mapping[str, Any], kind: str, count: int) -> list[str]:
    """Who is asked by each of ``count`` requests."""
    names = job["names"][:count]
    return {"base": ["base"] * count, "one": names[:1] * count, "many": names}[kind]


def requests(job: Mapping[str, Any], kind: str, count: int, seed: object, new: int) -> list[Request]:
    """One for each client."""
    pieces = prompts(job, count, seed)
    return [Request(model, p, new) for model, p in zip(models_of(job, kind, count), pieces, strict=True)]


def medians(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Row → medians over its rounds, with tokens/s of each round."""
    out = {}
    for name, rows in rounds.items():
        speeds = [row["tokens_per_second"] for row in rows]
        out[name] = median_of(rows) | {"rounds": speeds}
    return out


def ratio(rounds: Mapping[str, Sequence[Mapping[str, Any]]], one: str, other: str) -> float | None:
    """Median over the rounds of tokens/s of one row by another's of the same round."""
    if not rounds.get(one) or not rounds.get(other):
        return None
    pairs = zip(rounds[one], rounds[other], strict=True)
    return statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)


# ---- the parts


def crowds(asked: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """All at once: the base, an adapter each."""
    names, n = job["names"][: asked.clients], asked.clients
    rounds: dict[str, list[dict[str, Any]]] = {}
    bounds = []
    with ExitStack() as up:
        ports = with_kernel(up, asked, job, names)
        if asked.one_process:
            ports["lorchestra in one process"] = up.enter_context(ours(job, names, asked, engine_process=False))
        if asked.vllm_python:
            ports["vLLM"] = up.enter_context(vllm(job, names, asked))
        for turn in range(-1, asked.rounds):  # the first is a warm-up
            for side, kind in itertools.product(ports, ("base", "many")):
                asking = requests(job, kind, n, (turn, side, kind), asked.new if turn >= 0 else 2)
                row = crowd(ports[side], asking if turn >= 0 else asking[:8], n)
                if turn >= 0:
                    rounds.setdefault(f"{side}, {kind}", []).append(row)
                    print(f"{side}, {kind}: {row['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
            if turn >= 0:
                bounds.append(run([PARTS, "bound", job["path"], "--rows", n], asked)[0])
    share = [
        row["tokens_per_second"] / bound["tokens_per_second"]
        for row, bound in zip(rounds["lorchestra, many"], bounds, strict=True)
    ]
    by_kernel = ratio(rounds, "lorchestra --kernel, many", "lorchestra --kernel, base")
    base_share = [
        row["tokens_per_second"] / bound["tokens_per_second"]
        for row, bound in zip(rounds["lorchestra, base"], bounds, strict=True)
    ]
    return {
        "rows": medians(rounds), "bound": median_of(bounds), "many_of_the_bound": statistics.median(share),
        "base_of_the_bound": statistics.median(base_share),
        "many_by_base": ratio(rounds, "lorchestra, many", "lorchestra, base"),
        "many_by_vllm": ratio(rounds, "lorchestra, many", "vLLM, many"),
        "one_process_by_two": ratio(rounds, "lorchestra in one process, many", "lorchestra, many"),
        "kernel_by_its_base": by_kernel,
        "kernel_by_base": ratio(rounds, "lorchestra --kernel, many", "lorchestra, base"),
        "kernel_by_vllm": ratio(rounds, "lorchestra --kernel, many", "vLLM, many"),
    }  # fmt: skip


def beside_peft(asked: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter each, and PEFT's mixed batch."""
    names, n = job["names"][: asked.clients], asked.clients
    rounds: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as up:
        ports = with_kernel(up, asked, job, names)
        peer = up.enter_context(Worker(job, asked))
        loading = peer.do("load", adapters=names, low=True)
        for port in ports.values():
            crowd(port, requests(job, "many", n, "warm", 2), n)
        peer.do("mixed", prompts=prompts(job, n, "warm", 4), adapters=names, new=1)
        for turn in range(asked.rounds):
            for side, port in ports.items():
                rounds.setdefault(f"{side}, many", []).append(
                    crowd(port, requests(job, "many", n, (turn, side), asked.new), n)
                )
            done = peer.do("mixed", prompts=prompts(job, n, (turn, "peft")), adapters=names, new=asked.new)
            rounds.setdefault("PEFT, many", []).append(summary_of_steps(done["rows"], asked.new, n))
            for side, rows in rounds.items():
                print(f"{side}: {rows[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    return {
        "rows": medians(rounds), "many_by_peft": ratio(rounds, "lorchestra, many", "PEFT, many"),
        "kernel_by_peft": ratio(rounds, "lorchestra --kernel, many", "PEFT, many"),
        "peft_seconds_to_load_all": sum(loading),
    }  # fmt: skip


def with_kernel(
    up: ExitStack, asked: argparse.Namespace, job: Mapping[str, Any], names: Sequence[str]
) -> dict[str, int]:
    """Ports of our server, and of one with the kernel where that was asked for."""
    ports = {"lorchestra": up.enter_context(ours(job, names, asked))}
    if asked.kernel:
        ports["lorchestra --kernel"] = up.enter_context(ours(job, names, asked, kernel=True))
    return ports


def streams(asked: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """One request at a time."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    bounds = []
    with ExitStack() as up:
        names = job["names"][:1]
        ports = with_kernel(up, asked, job, names)
        if asked.vllm_python:
            ports["vLLM"] = up.enter_context(vllm(job, names, asked))
        peer = up.enter_context(Worker(job, asked))
        for turn in range(-1, asked.rounds):
            for side, kind in itertools.product(ports, ("base", "one")):
                pieces = prompts(job, 3, (turn, side, kind))
                wanted = [
                    Request(model, p, asked.new) for model, p in zip(models_of(job, kind, 1) * 3, pieces, strict=True)
                ]
                rounds.setdefault(f"{side}, {kind}", []).append(crowd(ports[side], wanted, 1))
            done = peer.do("generate", prompts=prompts(job, 3, (turn, "transformers")), new=asked.new)
            rounds.setdefault("transformers, base", []).append(summary_of_steps(done["rows"], asked.new, 1))
            bounds.append(run([PARTS, "bound", job["path"], "--rows", 1], asked)[0])
    rounds, bounds = {name: rows[1:] for name, rows in rounds.items()}, bounds[1:]  # the first is a warm-up
    return {
        "rows": medians(rounds), "bound": median_of(bounds),
        "base_by_transformers": ratio(rounds, "lorchestra, base", "transformers, base"),
        "kernel_by_transformers": ratio(rounds, "lorchestra --kernel, base", "transformers, base"),
    }  # fmt: skip


def first_uses(asked: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """From disk to mounted; a switch between resident ones."""
    fresh, clients = job["names"][: asked.fresh], 1
    piece = prompts(job, 1, "first", 32)[0]

    def seconds(port: int, name: str) -> float:
        return float(crowd(port, [Request(name, piece, 1)], clients)["total"]["p50"])

    with ours(job, job["names"][: asked.fresh + 1], asked) as port:
        for name in ("base", job["names"][asked.fresh], "base"):
            seconds(port, name)
        cold, warm = [], []
        for name in fresh:
            cold.append(seconds(port, name))
            warm.append(seconds(port, name))
        read = loads(port)
        same = [seconds(port, fresh[0]) for _ in fresh]
        other = [seconds(port, name) for name in fresh]
    with Worker(job, asked) as peer:
        few = min(11, len(fresh) // 2)  # the more it has, the longer the next one takes
        plain = peer.do("load", adapters=fresh[:few])[1:]  # the first one wraps the model too
        low = peer.do("load", adapters=fresh[few : 2 * few], low=True)
        switched = peer.do("switch", adapters=fresh[:5])
    extra = [a - b for a, b in zip(cold, warm, strict=True)]
    return {
        "adapters": len(fresh), "file_bytes": 2 * job["adapter_parameters"],
        "first_use": percentiles(cold), "again": percentiles(warm), "extra": percentiles(extra),
        "server_read_mean": read["seconds"] / read["count"], "same": percentiles(same), "switched": percentiles(other),
        "peft_load": percentiles(plain), "peft_load_low_cpu_mem_usage": percentiles(low),
        "peft_switch": percentiles(switched),
    }  # fmt: skip


def loads(port: int) -> dict[str, float]:
    """What the server counted: adapters read, seconds of reading, evictions, adapters resident."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()

    def total(name: str) -> float:
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", page, re.M)
        return sum(map(float, found))

    return {
        "count": total("lorchestra_adapter_load_seconds_count"),
        "seconds": total("lorchestra_adapter_load_seconds_sum"),
        "evictions": total("lorchestra_adapter_evictions_total"),
        "resident": total("lorchestra_adapters_resident"),
    }


def traffic(asked: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """Many registered adapters and room for as many as there are clients: Zipf's law, against all resident."""
    names, n = job["names"], asked.clients
    rounds: dict[str, list[dict[str, Any]]] = {}
    counted: dict[str, list[dict[str, float]]] = {}

    def send(port: int, models: Sequence[str], seed: object, new: int) -> dict[str, Any]:
        pieces = prompts(job, len(models), seed)
        return crowd(port, [Request(model, p, new) for model, p in zip(models, pieces, strict=True)], n)

    room = room_for(asked, job)
    with ours(job, names, asked, room) as port:
        for turn in range(asked.rounds):
            draw = random.Random(turn)
            kinds = {f"Zipf, exponent {s:g}": [1 / (i + 1) ** s for i in range(len(names))] for s in asked.exponent}
            kinds["all resident"] = [1.0] * n + [0.0] * (len(names) - n)
            for kind, weights in kinds.items():
                warm = names[:n] if kind == "all resident" else draw.choices(names, weights, k=4 * n)
                send(port, warm, (turn, kind, "warm"), 1)
                before = loads(port)
                row = send(port, draw.choices(names, weights, k=asked.requests), (turn, kind), asked.new)
                after = loads(port)
                read = {key: after[key] - before[key] for key in ("count", "seconds", "evictions")}
                rounds.setdefault(kind, []).append(row)
                counted.setdefault(kind, []).append(
                    {
                        "miss_rate": read["count"] / asked.requests,
                        "read_mean": read["seconds"] / max(read["count"], 1),
                        "resident": after["resident"],
                    }
                )
                said = f"{kind}: {row['tokens_per_second']:.0f} tokens/s, {counted[kind][-1]['miss_rate']:.2f} missed"
                print(said, file=sys.stderr, flush=True)
    rows = {kind: row | median_of(counted[kind]) for kind, row in medians(rounds).items()}
    by = {kind: ratio(rounds, kind, "all resident") for kind in rows if kind != "all resident"}
    return {"registered": len(names), "room": n, "memory": room, "rows": rows, "by_resident": by}


def room_for(asked: argparse.Namespace, job: Mapping[str, Any]) -> str:
    """``--memory`` that holds as many adapters as there are clients, and not one more."""
    half = (asked.clients + 0.5) * job["adapter_parameters"]
    for item in (2, 4):
        memory = f"{half * item / 1e6:.4f}MB"
        with ours(job, job["names"], asked, memory) as port:
            for name in job["names"][: asked.clients + 3]:
                crowd(port, [Request(name, prompts(job, 1, name, 8)[0], 1)], 1)
            if loads(port)["resident"] == asked.clients:
                return memory
    raise SystemExit(f"no number format leaves room for {asked.clients} adapters")


MEASURES = {"crowd": crowds, "peft": beside_peft, "stream": streams, "first": first_uses, "zipf": traffic}

if __name__ == "__main__":
    main()
