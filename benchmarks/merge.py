"""Merging a rank-16 adapter of all linear modules into a 1.1 B-parameter bfloat16 Llama in several files.

Ours against PEFT (``merge_and_unload`` + ``save_pretrained``), mergekit and plain copying of the files, each in a
process of its own, on the same disk, with the file cache cold and warm. Prints one table and writes
``benchmarks/results/merge.json``::

    python benchmarks/merge.py                                   # TinyLlama's shapes, 2.2 GB
    python benchmarks/merge.py --short                           # a tenth of the layers, one round: for CI
    python benchmarks/merge.py --mergekit .venv-mergekit/bin     # where mergekit is installed (it pins other versions)

The weights are random: the time does not depend on them. What is written is compared with "add in float32, round
once", done densely by a few lines of torch, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RANK = 16
SHAPES = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
SHARD = "500MB"
RESULTS = Path(__file__).parent / "results" / "merge.json"

# Each runs in a fresh interpreter with BASE, ADAPTER and OUT, and prints the seconds that it took after its imports.
OURS = """
import sys, time, torch
from lorchestra import Adapter, merge
base, adapter, out = sys.argv[1:]
started = time.perf_counter()
merge(base, Adapter.load(adapter), out{more})
print(time.perf_counter() - started)
"""
PEFT = """
import sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
base, adapter, out = sys.argv[1:]
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="{shard}")
print(time.perf_counter() - started)
"""
COPY = """
import pathlib, shutil, sys, time
base, adapter, out = sys.argv[1:]
started = time.perf_counter()
pathlib.Path(out).mkdir()
for path in sorted(pathlib.Path(base).iterdir()):
    shutil.copyfile(path, pathlib.Path(out, path.name))
print(time.perf_counter() - started)
"""


def main() -> None:
    """Make the inputs, run every way, compare, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="two layers, one round")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--mergekit", type=Path, help="bin directory of an environment with mergekit")
    options.add_argument("--work", type=Path, help="where to work (a directory on the disk to be measured)")
    options.add_argument("--keep", action="store_true", help="keep base and adapter there for the next time")
    asked = options.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="merge-", dir=Path.cwd()))
    try:
        result = measure(work, asked)
    finally:
        if not asked.keep:
            shutil.rmtree(work)
    RESULTS.parent.mkdir(exist_ok=True)
    if not asked.short:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def measure(work: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Every way in ``rounds`` rounds, one after the other within a round, so that a slow minute hits all of them."""
    shapes = SHAPES | ({"num_hidden_layers": 2} if asked.short else {})
    for left in ("out", "cache"):  # of a run that was stopped
        shutil.rmtree(work / left, ignore_errors=True)
    base, adapter = apart(make_inputs, work, shapes)
    ways = {
        "copy the files": [sys.executable, "-c", COPY],
        "lorchestra": [sys.executable, "-c", OURS.format(more="")],
        "PEFT": [sys.executable, "-c", PEFT.format(shard=SHARD)],
    }
    synced = {
        "copy the files, flushed": [sys.executable, "-c", COPY],
        "lorchestra, flushed": [sys.executable, "-c", OURS.format(more=", durable=True")],
    }
    if asked.mergekit:
        recipe = work / "mergekit.yaml"
        model = f"{base}+{adapter}"
        recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {model}\ndtype: bfloat16\n")
        # It merges the adapter with PEFT into a cache, and copies from there.
        cache = ["--lora-merge-cache", str(work / "cache"), "--no-copy-tokenizer"]
        ways["mergekit"] = [str(asked.mergekit / "mergekit-yaml"), *cache, str(recipe)]
    rows: dict[str, dict[str, list[float]]] = {}
    checked: dict[str, str] = {}
    caches = ["warm", "cold"] if hasattr(os, "posix_fadvise") else ["warm"]
    for _ in range(1 if asked.short else asked.rounds):
        for cache in caches:
            for name, command in ways.items():
                if name == "mergekit" and name in rows and cache in rows[name]:
                    continue  # once: it is PEFT's merge and a copy
                run(name, command, cache, base, adapter, work / "out", asked.threads, rows)
                if name != "copy the files" and name not in checked:
                    checked[name] = apart(compare, base, adapter, work / "out")
                shutil.rmtree(work / "out")
                shutil.rmtree(work / "cache", ignore_errors=True)
    for name, command in synced.items():
        run(name, command, "warm", base, adapter, work / "out", asked.threads, rows)
        shutil.rmtree(work / "out")
    figures = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in rows.items()}
    for name, said in checked.items():
        figures[name]["equal"] = said  # type: ignore[assignment]
    return {
        "gigabytes": sum(p.stat().st_size for p in base.glob("*.safetensors")) / 1e9,
        "files": len(list(base.glob("*.safetensors"))),
        "rank": RANK,
        "threads": asked.threads,
        "rounds": 1 if asked.short else asked.rounds,
        "load": os.getloadavg()[1],  # of the machine in the last five minutes, this benchmark's included
        "ways": figures,
    }


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, computed in another process: a child's peak memory begins with what its parent held at the fork."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_inputs(work: Path, shapes: dict[str, Any]) -> tuple[Path, Path]:
    """A base with random weights and an adapter of every linear module but the head, whose ΔW is 1 % of W."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorchestra import Adapter, LowRank

    base, adapter = work / "base", work / "adapter"
    if not adapter.exists():
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**shapes)).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        model.save_pretrained(base, max_shard_size=SHARD)
        updates = {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                m, n = module.weight.shape
                updates[path] = LowRank(torch.randn(m, RANK) * 0.01, torch.randn(RANK, n) * 0.02 / RANK**0.5)
        Adapter(updates).save(adapter)
    return base, adapter


def run(
    name: str,
    command: list[str],
    cache: str,
    base: Path,
    adapter: Path,
    out: Path,
    threads: int,
    rows: dict[str, dict[str, list[float]]],
) -> None:
    """One process: seconds until it ended (for the flushed ways: until the disk has everything), peak resident MB."""
    os.sync()
    for directory in (base, adapter):
        for path in directory.iterdir():
            with path.open("rb") as stream:
                while stream.read(1 << 20):
                    pass
        if cache == "cold":
            drop(directory)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    arguments = [str(out)] if "mergekit" in command[0] else [str(base), str(adapter), str(out)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read().split()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if "flushed" in name:
        os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    row = rows.setdefault(name, {})
    row.setdefault(cache, []).append(seconds)
    if command[0] == sys.executable:
        row.setdefault(f"{cache}_call", []).append(float(said[-1]))
    row.setdefault("peak_mb", []).append(usage.ru_maxrss / 1024)
    row.setdefault("processor", []).append(usage.ru_utime + usage.ru_stime)
    print(f"{name}, {cache} cache: {seconds:.2f} s, {usage.ru_maxrss / 1024:.0f} MB", file=sys.stderr)


def compare(base: Path, adapter: Path, out: Path) -> str:
    """How many tensors of ``out`` are "add in float32, round once", bit for bit, done here from PEFT's own files."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    deltas = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    equal = total = entries = differing = 0
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                expected = tensors.get_tensor(name)
                path = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{path}.lora_A.weight" in deltas:
                    delta = deltas[f"{path}.lora_B.weight"] @ deltas[f"{path}.lora_A.weight"]
                    expected = (expected.float() + delta).to(expected.dtype)
                with safe_open(found[name], "pt") as merged:
                    written = merged.get_tensor(name)
                same = written.dtype == expected.dtype and torch.equal(written, expected)
                equal, total = equal + same, total + 1
                entries += expected.numel()
                differing += 0 if same else int((written != expected).sum())
    if equal == total:
        return f"yes, all {total}"
    return f"{equal} of {total}; {differing / entries:.2%} of entries differ"


def drop(directory: Path) -> None:
    """Take the directory's files out of the operating system's file cache; libraries stay in it for all ways."""
    for path in directory.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def seconds(row: dict[str, Any], cache: str) -> str:
    """As in the table: the whole process, and what of it came after the imports."""
    if cache not in row:
        return ""
    call = row.get(f"{cache}_call")
    return f"{row[cache]:.1f} s" + (f" ({call:.1f} s)" if call is not None else "")


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{result['gigabytes']:.2f} GB of bfloat16 in {result['files']} files, rank {result['rank']}, "
        f"{result['threads']} threads, median of {result['rounds']}; whole process (of that: after the imports)",
        "",
        "| | warm cache | cold cache | processor time | peak memory | tensors equal to float32 add, one rounding |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["ways"].items():
        times = [seconds(row, cache) for cache in ("warm", "cold")]
        cost = f"{row['processor']:.1f} s | {row['peak_mb']:.0f} MB"
        lines.append(f"| {name} | {times[0]} | {times[1]} | {cost} | {row.get('equal', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
