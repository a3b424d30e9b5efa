"""``lorchestra merge-lora`` (the article's flags) and ``merge`` (ours): base + Σλᵢ·ΔWᵢ as a model directory."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.options import Device, Json, Weighted, number, weighted
from lorchestra.errors import TrainingError, UserError

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.events import Reporter

# The parity law is checked on these, in both of the world's most written languages.
PROBES = ("What should a patient with a fever do first?", "患者发热三天,伴咳嗽,下一步如何处理?", "1 + 1 =")
# Where rounding moves the weights by more than this share of the update, float32 output is worth its size.
MUCH_LOST = 0.1
# A sum below this share of its largest member is rounding error.
NOTHING = 1e-6

DtypeOut = Annotated[str, typer.Option("--dtype", help="Of the output: auto (the base's), float32, bfloat16, float16.")]
Out = Annotated[Path, typer.Option("--output_dir", "-o", metavar="DIR", help="A new directory for the merged model.")]


def merge_lora(
    base_model: Annotated[str, typer.Option("--base_model", metavar="BASE", help="Directory, org/name, GGUF or pip:.")],
    adapters: Annotated[str, typer.Option("--adapters", metavar="A,B,…", help="PEFT directories, with commas.")],
    output_dir: Out,
    weights: Annotated[str, typer.Option("--weights", metavar="X,Y,…", help="One weight for each adapter.")] = "",
    dtype: DtypeOut = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Merge the exact weighted sum of adapters into a copy of their base.

    **Example**

    `lorchestra merge-lora --base_model my-base --adapters stage1,stage2,stage3_dpo --weights 0.3,0.5,0.2
    --output_dir merged`
    """
    sources = [text.strip() for text in adapters.split(",") if text.strip()]
    numbers = [text.strip() for text in weights.split(",") if text.strip()]
    if not sources:
        raise UserError("--adapters is empty; name PEFT directories with commas, as in stage1,stage2")
    if not numbers and len(sources) > 1:
        raise UserError(f"--weights is missing: give one for each of the {len(sources)} adapters, as in 0.3,0.5,0.2")
    if numbers and len(numbers) != len(sources):
        raise UserError(
            f"--weights has {len(numbers)} numbers for {len(sources)} adapters ({', '.join(sources)}); give one each"
        )
    values = [
        number(text, f"--weights {weights}: write numbers with commas, as in 0.3,0.5,0.2") for text in numbers
    ] or [1.0]
    members = [Weighted(source, value) for source, value in zip(sources, values, strict=True)]
    _merge(base_model, members, output_dir, dtype, device, as_json)


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Model directory, org/name, GGUF file or pip: source.")],
    adapter: Annotated[list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]…", help="Adapters and weights (1).")],
    output_dir: Out,
    dtype: DtypeOut = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Merge adapters into a copy of their base: base + Σ weight·ΔW, added in float32 and rounded once.

    **Example**

    `lorchestra merge my-base general=0.3 clinic=0.5 preference=0.2 -o merged --dtype bfloat16`
    """
    _merge(base, [weighted(text) for text in adapter], output_dir, dtype, device, as_json)


def _merge(base: str, members: list[Weighted], out: Path, dtype: str, device: str, as_json: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose a new directory for the merged model")
    from lorchestra.adapter.belonging import check_base
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.load import choose_device, source_name
    from lorchestra.cli.models import base_directory, load_adapters, remarks
    from lorchestra.cli.progress import make_reporter
    from lorchestra.fusion.methods import linear
    from lorchestra.fusion.stream import DTYPES

    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; there are auto, {', '.join(DTYPES)}")
    choose_device(device)
    reporter = make_reporter()
    adapters, weights = load_adapters(members, reporter)
    fused = linear(adapters, weights, name=out.name)
    largest = max(abs(weights[name]) * adapter.norm() for name, adapter in adapters.items())
    if fused.norm() <= NOTHING * largest:
        raise UserError("the weighted sum of these adapters is zero: the merged model would be the base itself")
    directory = base_directory(base, reporter)
    identity = fingerprint(directory, source_name(directory))
    check_base(adapters, identity)
    for line in remarks(adapters, weights, identity):
        reporter.say(line)
    told = {
        "output_dir": str(out),
        "base": identity.name,
        "weights": weights,
        "digest": fused.digest,
        **merged(directory, adapters, weights, fused, out, dtype, device, reporter),
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(told):
        typer.echo(line)


def merged(
    base: Path,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    fused: Adapter,
    out: Path,
    dtype: str,
    device: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write base + ``fused`` and check it against base + ``adapters`` at ``weights``; nothing is at ``out`` before.

    Returns:
        The merge's figures, and ``parity``: the share of the adapters' effect on the logits that it disturbs.

    Raises:
        TrainingError: a float32 merge does not answer as base + adapters do; it is not kept.
        AdapterError: an adapter does not fit the base.
        StorageError: the disk is full or closed.
    """
    from transformers import AutoTokenizer

    from lorchestra.evaluate.parity import LIMIT, merged_parity
    from lorchestra.fusion.stream import merge as stream
    from lorchestra.pipeline.cache import storage

    unchecked = out.with_name(f".{out.name}.unchecked")
    with storage(out):
        shutil.rmtree(unchecked, ignore_errors=True)
        try:
            report = stream(base, fused, unchecked, dtype=dtype, reporter=reporter)
            tokenizer = AutoTokenizer.from_pretrained(unchecked)
            with reporter.task("check the merged model", len(PROBES), "prompt") as task:
                prompts = [tokenizer(text)["input_ids"] for text in PROBES]
                found = merged_parity(base, unchecked, adapters, weights, prompts, device)
                task.advance(len(PROBES))
            if report.dtype == "float32" and not found.holds:
                raise TrainingError(
                    f"the merged model does not answer as base + adapters do: {found.ratio:.1%} of the adapters' "
                    f"effect on the logits differs ({LIMIT:.0%} is allowed). It is not kept"
                )
            if out.exists():
                out.rmdir()
            os.replace(unchecked, out)
        finally:
            shutil.rmtree(unchecked, ignore_errors=True)
    return {**report.as_dict(), "parity": found.ratio}


def _lines(told: Mapping[str, Any]) -> list[str]:
    mixture = " + ".join(f"{weight:g}·{name}" for name, weight in told["weights"].items())
    out = [
        f"{told['output_dir']}: {told['base']} + {mixture}, in {told['dtype']}",
        f"‖ΔW‖/‖W‖ {told['update_ratio']:.3%} over {told['modules']} modules; rounding to {told['dtype']} moves them "
        f"by {told['rounding_lost']:.2%} of ‖ΔW‖",
        f"parity: {told['parity']:.2%} of the adapters' effect on the logits differs (5 % allowed in float32)",
    ]
    if told["rounding_lost"] > MUCH_LOST and told["dtype"] != "float32":
        out.append("Rounding is large beside the update: --dtype float32 keeps all of it")
    out.append(f"Next: {shlex.join(['lorchestra', 'chat', told['output_dir']])}")
    return out
