"""Fusing three rank-16 adapters: recompression at Llama-3-8B's shapes, and how exact the sum is.

Ours against PEFT's ``add_weighted_adapter`` (``svd``, ``linear``, ``cat``) and mergekit, side by side in one run.
Prints two tables and writes ``benchmarks/results/fusion.json``::

    python benchmarks/fusion.py                                   # all 224 linear modules, 10 minutes (PEFT's share)
    python benchmarks/fusion.py --short                           # an eighth of the width, two layers: for CI
    python benchmarks/fusion.py --mergekit .venv-mergekit/bin     # where mergekit is installed (it pins other versions)

Factors are random: the time does not depend on them. PEFT is timed on one module of each shape, the faster of two runs,
and multiplied by how often the shape occurs; it gets ``svd_full_matrices=False``, which is faster than its default.
mergekit recompresses no sum of adapters and writes none: it takes part where base + Σλᵢ·ΔWᵢ can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorchestra import Adapter, LowRank, fuse
from lorchestra.fusion.core_space import CoreSpace

RANK, LAMBDAS = 16, (0.3, 0.5, 0.2)
RESULTS = Path(__file__).parent / "results" / "fusion.json"
# Name → (out, in) of the linear modules of a layer of Llama-3-8B.
LLAMA = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
LAYERS, NARROWER = 32, 8  # --short divides the widths
# Above this many entries the dense optimum comes from ARPACK's leading triplets instead of LAPACK's whole SVD.
LAPACK_ENTRIES = 1024 * 4096


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="small shapes, two layers; writes nothing")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--mergekit", type=Path, help="bin directory of an environment with mergekit")
    options.add_argument("--part", choices=("all", "whole"), default="all", help=argparse.SUPPRESS)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    shapes = {k: (m // NARROWER, n // NARROWER) for k, (m, n) in LLAMA.items()} if asked.short else LLAMA
    layers = 2 if asked.short else LAYERS
    if asked.part == "whole":
        print(json.dumps(whole(shapes, layers)))
        return
    result = {
        "threads": asked.threads,
        "versions": {name: __import__(name).__version__ for name in ("torch", "peft")},
        "recompression": recompression(shapes, layers, asked),
        "exactness": exactness(asked),
    }
    if not asked.short:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables(result))


# ---- recompression


def recompression(shapes: dict[str, tuple[int, int]], layers: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Σλᵢ·ΔWᵢ at rank 16: the whole model by us, then shape by shape us, PEFT and the dense optimum."""
    command = [sys.executable, __file__, "--part", "whole", "--threads", str(asked.threads)]
    done = subprocess.run(
        command + ["--short"] * asked.short, stdout=subprocess.PIPE, check=True, env=environment(asked)
    )
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"all {found['modules']} modules: {found['seconds']:.2f} s", file=sys.stderr)
    counts: dict[tuple[int, int], int] = {}
    for shape in shapes.values():
        counts[shape] = counts.get(shape, 0) + layers
    found["shapes"] = [one_shape(m, n, count) for (m, n), count in sorted(counts.items())]
    for way in ("ours", "peft"):
        found[f"{way}_times_count"] = sum(row[f"{way}_seconds"] * row["count"] for row in found["shapes"])
    return found


def whole(shapes: dict[str, tuple[int, int]], layers: int) -> dict[str, Any]:
    """All modules, in a process of its own: seconds from adapters in memory to the compressed one, and memory."""
    adapters = [random_adapter(shapes, layers, seed) for seed in range(3)]
    seconds, again = [], []
    reset_peak()
    before = memory("VmRSS")
    for _ in range(3):
        started = time.perf_counter()
        space = CoreSpace(adapters)
        made = space.compress(LAMBDAS, rank=RANK)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        made = space.compress(LAMBDAS[::-1], rank=RANK)
        again.append(time.perf_counter() - started)
    peak = memory("VmHWM")
    return {
        "modules": len(made.modules),
        "seconds": statistics.median(seconds),
        "seconds_for_another_lambda": statistics.median(again),
        "own_mb": sum(adapter.parameters for adapter in adapters) * 4 / 1e6,
        "result_mb": sum(update.parameters for update in made.modules.values()) * 4 / 1e6,
        "peak_over_own_mb": peak - before,
    }


def one_shape(m: int, n: int, count: int) -> dict[str, Any]:
    """One module: seconds of both, and how far ours is from the best rank-16 approximation of the dense sum."""
    adapters = [random_adapter({"w": (m, n)}, 1, seed) for seed in range(3)]
    path = next(iter(adapters[0].modules))
    seconds, made = timed(lambda: CoreSpace(adapters).compress(LAMBDAS, rank=RANK).modules[path], 7)
    row = {"out": m, "in": n, "count": count, "ours_seconds": seconds, **dense_optimum(adapters, path, made)}
    model = peft_model(m, n, {"lora_alpha": RANK}, [adapter.modules[path] for adapter in adapters])
    runs = [timed(lambda: peft_fused(model, "svd", svd_full_matrices=False), 1) for _ in range(2)]
    row["peft_seconds"], theirs = min(runs, key=lambda run: run[0])
    row["peft_from_optimum"] = from_optimum(theirs.double(), row.pop("best"))
    print(f"{m}×{n}: ours {seconds:.4f} s, PEFT {row['peft_seconds']:.1f} s", file=sys.stderr)
    return row


def dense_optimum(adapters: list[Adapter], path: str, made: LowRank) -> dict[str, Any]:
    """The best approximation by float64 SVD of the dense sum, and ours relative to it."""
    total = sum(c * adapter.modules[path].dense(torch.float64) for c, adapter in zip(LAMBDAS, adapters, strict=True))
    if total.numel() <= LAPACK_ENTRIES:
        by = "LAPACK (the whole SVD)"
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    else:
        from scipy.sparse.linalg import svds

        by = "ARPACK (the 16 leading triplets)"
        left, values, right = svds(total.numpy(), k=RANK, tol=0, rng=0)
        U, S, Vh = (torch.from_numpy(part.copy()) for part in (left, values, right))
        order = S.argsort(descending=True)
        U, S, Vh = U[:, order], S[order], Vh[order]
    best = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
    return {"ours_from_optimum": from_optimum(made.dense(torch.float64), best), "optimum_by": by, "best": best}


def from_optimum(found: torch.Tensor, best: torch.Tensor) -> float:
    """‖found − best‖ / ‖best‖."""
    return float((found - best).norm() / best.norm())


# ---- exactness


def exactness(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Relative error of Σλᵢ·ΔWᵢ against float64, for plain LoRA and rsLoRA, as the written directory says it."""
    rows = []
    size = 512 if asked.short else 4096
    for name, scaling in {"LoRA": {"lora_alpha": 32}, "rsLoRA": {"lora_alpha": 32, "use_rslora": True}}.items():
        updates = [
            update for seed in range(3) for update in random_adapter({"w": (size, size)}, 1, seed).modules.values()
        ]
        scale = 32 / (math.sqrt(RANK) if "use_rslora" in scaling else RANK)
        truth = sum(c * scale * u.dense(torch.float64) for c, u in zip(LAMBDAS, updates, strict=True))
        model = peft_model(size, size, scaling, updates)
        with tempfile.TemporaryDirectory() as work:
            model.save_pretrained(work)
            members = [Adapter.load(Path(work, f"a{i}")) for i in range(3)]
            seconds, fused = timed(lambda members=members: fuse(members, list(LAMBDAS)), 7)
            fused.save(Path(work, "fused"))
            model.load_adapter(Path(work, "fused"), "ours")
            ours = model.base_model.model.w.get_delta_weight("ours")
        rows.append(
            {"scaling": name, "way": "lorchestra, applied by PEFT", "seconds": seconds, "error": error(ours, truth)}
        )
        for way in ("cat", "linear"):
            seconds, theirs = timed(lambda way=way, model=model: peft_fused(model, way), 3)
            rows.append({"scaling": name, "way": f"PEFT {way}", "seconds": seconds, "error": error(theirs, truth)})
        if asked.mergekit:
            rows.append({"scaling": name, "way": "mergekit task_arithmetic, base + Σ", **by_mergekit(asked, scaling)})
    return rows


def by_mergekit(asked: argparse.Namespace, scaling: dict[str, Any]) -> dict[str, Any]:
    """A small float32 Llama and three adapters, merged by mergekit and by us: how far the weights moved is the sum."""
    import peft
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorchestra import merge

    def make() -> LlamaForCausalLM:
        torch.manual_seed(0)
        width = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, tie_word_embeddings=False, **width))

    with tempfile.TemporaryDirectory() as work:
        base = Path(work, "base")
        make().save_pretrained(base)
        for seed in range(3):
            config = peft.LoraConfig(r=RANK, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **scaling)
            model = peft.get_peft_model(make(), config)
            noise = torch.Generator().manual_seed(seed)
            for key, parameter in model.named_parameters():
                if ".lora_" in key:
                    parameter.data = torch.randn(parameter.shape, generator=noise) * 0.02
            model.save_pretrained(Path(work, f"a{seed}"), save_embedding_layers=False)
        models = "".join(
            f"  - model: {base}+{work}/a{i}\n    parameters: {{weight: {weight}}}\n" for i, weight in enumerate(LAMBDAS)
        )
        recipe = Path(work, "recipe.yaml")
        recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{models}dtype: float32\n")
        command = [str(asked.mergekit / "mergekit-yaml"), str(recipe), f"{work}/theirs", "--lora-merge-cache", work]
        started = time.perf_counter()
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(asked)
        )
        seconds = time.perf_counter() - started
        members = [Adapter.load(Path(work, f"a{i}")) for i in range(3)]
        started = time.perf_counter()
        merge(base, fuse(members, list(LAMBDAS)), Path(work, "ours"))
        ours_seconds = time.perf_counter() - started
        weights = {name: load_all(Path(work, name), load_file) for name in ("base", "theirs", "ours")}
        worst = {"theirs": 0.0, "ours": 0.0}
        for path in members[0].modules:
            truth = sum(c * a.modules[path].dense(torch.float64) for c, a in zip(LAMBDAS, members, strict=True))
            for name in worst:
                moved = weights[name][f"{path}.weight"].double() - weights["base"][f"{path}.weight"].double()
                worst[name] = max(worst[name], error(moved, truth))
    return {"seconds": seconds, "error": worst["theirs"], "ours_there": worst["ours"], "ours_seconds": ours_seconds}


def load_all(directory: Path, load_file: Callable[[Path], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory."""
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """‖found − truth‖ / ‖truth‖, in float64."""
    return float((found.detach().double() - truth).norm() / truth.norm())


# ---- adapters, PEFT, clocks


def random_adapter(shapes: dict[str, tuple[int, int]], layers: int, seed: int) -> Adapter:
    """Rank 16 for every module of every layer."""
    noise = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(layers):
        for name, (m, n) in shapes.items():
            B, A = torch.randn(m, RANK, generator=noise), torch.randn(RANK, n, generator=noise)
            modules[f"model.layers.{layer}.{name}"] = LowRank(B * 0.02, A * 0.02)
    return Adapter(modules)


def peft_model(m: int, n: int, scaling: dict[str, Any], updates: list[LowRank]) -> Any:
    """A PEFT model of one linear module ``w`` with an adapter ``a0``, ``a1``, … for each update."""
    import peft

    inner = nn.Module()
    inner.w = nn.Linear(n, m, bias=False)
    inner.forward = inner.w.forward  # type: ignore[method-assign]
    config = peft.LoraConfig(r=RANK, target_modules=["w"], **scaling)
    model = peft.get_peft_model(inner, config, adapter_name="a0")
    for i, update in enumerate(updates):
        if i:
            model.add_adapter(f"a{i}", peft.LoraConfig(r=RANK, target_modules=["w"], **scaling))
        layer = model.base_model.model.w
        layer.lora_A[f"a{i}"].weight.data, layer.lora_B[f"a{i}"].weight.data = update.A.clone(), update.B.clone()
    return model


def peft_fused(model: Any, way: str, **options: Any) -> torch.Tensor:
    """``add_weighted_adapter`` of a0, a1, a2, and the ΔW that PEFT then applies."""
    if "fused" in model.peft_config:
        model.delete_adapter("fused")
    if way == "svd":
        options["svd_rank"] = RANK
    model.add_weighted_adapter(["a0", "a1", "a2"], list(LAMBDAS), "fused", combination_type=way, **options)
    found: torch.Tensor = model.base_model.model.w.get_delta_weight("fused").detach()
    return found


def timed(what: Callable[[], Any], times: int) -> tuple[float, Any]:
    """Median seconds, and the last result."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        made = what()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), made


def environment(asked: argparse.Namespace) -> dict[str, str]:
    """For processes of their own: the same threads, no hub."""
    return os.environ | {"OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def memory(key: str) -> float:
    """MB of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1000


def reset_peak() -> None:
    """Let ``VmHWM`` count from here."""
    Path("/proc/self/clear_refs").write_text("5")


# ---- tables


def tables(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    part = result["recompression"]
    lines = [
        f"Σ of three rank-16 adapters recompressed to rank 16, {part['modules']} modules, {result['threads']} threads",
        "",
        f"- lorchestra, all modules: {part['seconds']:.2f} s; another λ: {part['seconds_for_another_lambda']:.2f} s; "
        f"peak memory {part['peak_over_own_mb']:.0f} MB over the adapters' own {part['own_mb']:.0f} MB "
        f"(the result is {part['result_mb']:.0f} MB of it)",
        f"- PEFT svd, one module of each shape times its count: {part['peft_times_count'] / 60:.1f} min "
        f"({part['peft_times_count'] / part['seconds']:,.0f}×)",
        "",
        "| module (count) | lorchestra | PEFT svd | ratio | lorchestra from the optimum | PEFT from it | optimum by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in part["shapes"]:
        lines.append(
            f"| {row['out']}×{row['in']} ({row['count']}) | {row['ours_seconds'] * 1e3:.1f} ms | "
            f"{row['peft_seconds']:.2f} s | {row['peft_seconds'] / row['ours_seconds']:,.0f}× | "
            f"{row['ours_from_optimum']:.1e} | {row['peft_from_optimum']:.1e} | float64, {row['optimum_by']} |"
        )
    lines += [
        "",
        "| exact sum of three | scaling | time | error against float64 |",
        "|---|---|---|---|",
    ]
    for row in result["exactness"]:
        beside = f" (lorchestra's merge there: {row['ours_there']:.1e})" if "ours_there" in row else ""
        lines.append(
            f"| {row['way']} | {row['scaling']} | {row['seconds'] * 1e3:.1f} ms | {row['error']:.1e}{beside} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
