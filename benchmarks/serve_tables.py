"""The tables of ``benchmarks/serve.py``, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KINDS = {"base": "the base alone", "one": "one adapter", "many": "an adapter each"}
PERCENTILES = ("p50", "p95", "p99")


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All parts that were measured."""
    return "\n".join(line for part, write in TABLES.items() if part in found for line in (*write(found[part]), ""))


def _speeds(part: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "| | | tokens/s | rounds | first token, ms: p50 · p95 · p99 | token to token, ms | whole answer, ms | "
        "not in memory |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in part["rows"].items():
        side, _, kind = name.partition(", ")
        low, high = min(row["rounds"]), max(row["rounds"])
        latencies = " | ".join(_ms(row[key]) for key in ("first_token", "inter_token", "total"))
        missed = f"{row['miss_rate']:.1%}" if "miss_rate" in row else ""
        digits = 0 if row["tokens_per_second"] >= 100 else 1
        speeds = f"{row['tokens_per_second']:.{digits}f} | {low:.{digits}f}–{high:.{digits}f}"
        yield f"| {side} | {KINDS.get(kind, kind)} | {speeds} | {latencies} | {missed} |"


def _ms(values: Mapping[str, float], which: Sequence[str] = PERCENTILES) -> str:
    return " · ".join(f"{1000 * values[p]:,.{0 if values[p] >= 0.1 else 1}f}" for p in which)


def _crowd(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"{part['clients']} requests at once, {part['new']} new tokens each; medians of {part['rounds']} rounds"
    yield ""
    yield from _speeds(part)
    bound = part["bound"]
    yield ""
    yield (
        f"matrix products of a step alone: {bound['tokens_per_second']:.0f} tokens/s ({bound['gflop_per_second']:.0f} "
        f"GFLOP/s); reached: {part['base_of_the_bound']:.2f} by the base, {part['many_of_the_bound']:.2f} by an "
        "adapter each"
    )
    said = {
        "many_by_base": "an adapter each, by the base alone", "kernel_by_its_base": "the same, both with --kernel",
        "kernel_by_base": "with --kernel, by the base without",
        "many_by_vllm": "an adapter each, by vLLM's", "kernel_by_vllm": "the same with --kernel",
    }  # fmt: skip
    yield from (f"{name}: {part[key]:.2f}" for key, name in said.items() if part.get(key))


def _peft(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"an adapter each, beside PEFT's mixed batch; medians of {part['rounds']} rounds"
    yield ""
    yield from _speeds(part)
    yield ""
    yield f"by PEFT's: {part['many_by_peft']:.1f}; PEFT took {part['peft_seconds_to_load_all']:.0f} s to load them"
    if part.get("kernel_by_peft"):
        yield f"the same with --kernel: {part['kernel_by_peft']:.1f}"


def _stream(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"one request at a time, {part['new']} new tokens each; medians of {part['rounds']} rounds"
    yield ""
    yield from _speeds(part)
    yield ""
    yield (
        f"matrix products of a step alone: {part['bound']['tokens_per_second']:.0f} tokens/s; the base, by "
        f"transformers' generate: {part['base_by_transformers']:.2f}"
    )
    if part.get("kernel_by_transformers"):
        yield f"the same with --kernel: {part['kernel_by_transformers']:.2f}"


def _first(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"{part['adapters']} adapters of {part['file_bytes'] / 1e6:.1f} MB, a request for one token each"
    yield ""
    yield "| ms | p50 · p95 · p99 |"
    yield "|---|---|"
    said = {
        "first_use": "lorchestra, first use", "again": "lorchestra, the same again", "extra": "the difference",
        "same": "lorchestra, one resident adapter", "switched": "lorchestra, another resident one each time",
        "peft_load": "PEFT, load_adapter", "peft_load_low_cpu_mem_usage": "PEFT, load_adapter(low_cpu_mem_usage=True)",
        "peft_switch": "PEFT, set_adapter",
    }  # fmt: skip
    for key, name in said.items():
        yield f"| {name} | {_ms(part[key])} |"
    yield ""
    yield f"reading and laying out, by the server's own count: {1000 * part['server_read_mean']:.1f} ms in the mean"


def _zipf(part: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{part['registered']:,} registered adapters, room for {part['room']} (--memory {part['memory']}), "
        f"{part['clients']} clients; medians of {part['rounds']} rounds"
    )
    yield ""
    yield from _speeds({"rows": {f"lorchestra, {kind}": row for kind, row in part["rows"].items()}})
    yield ""
    for kind, by in part["by_resident"].items():
        read = part["rows"][kind]["read_mean"]
        yield f"{kind}, by all resident: {by:.2f}; {1000 * read:.0f} ms to read one in the mean, beside decoding"


TABLES = {"crowd": _crowd, "peft": _peft, "stream": _stream, "first": _first, "zipf": _zipf}
