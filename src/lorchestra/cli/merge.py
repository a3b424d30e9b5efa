"""``lorchestra merge-lora`` (the article's flags) and ``merge`` (ours): base + Σλᵢ·ΔWᵢ as a model directory."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from lorchestra.cli import completion
from lorchestra.cli.options import PLAIN_DTYPES, Device, Json, Weighted, number, weighted
from lorchestra.errors import TrainingError, UserError, counted

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.events import Reporter
    from lorchestra.fusion.stream import MergeReport

# The parity law is checked on these, in both of the world's most written languages.
PROBES = ("What should a patient with a fever do first?", "患者发热三天,伴咳嗽,下一步如何处理?", "1 + 1 =")
# Where rounding loses more than this share of the update, float32 output is worth its size.
MUCH_LOST = 0.1
# The parity check holds one float32 model at a time, and something beside it.
PARITY_BYTES = 5  # a parameter
# A sum below this share of its largest member is rounding error.
NOTHING = 1e-6

DtypeOut = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of the output: auto (the base's), float32, bfloat16, float16.",
        autocompletion=completion.among(*PLAIN_DTYPES),
    ),
]
Out = Annotated[Path, typer.Option("--output_dir", "-o", metavar="DIR", help="A new directory for the merged model.")]
Untie = Annotated[
    bool,
    typer.Option("--untie", help="Give the output embedding a weight of its own if an adapter changes a shared one."),
]
Dequantise = Annotated[
    bool, typer.Option("--dequantise", help="Turn a quantised base (fp8, bitsandbytes, compressed-tensors) back first.")
]
Parity = Annotated[
    bool | None,
    typer.Option(
        "--parity/--no-parity",
        help="Compare the result's answers with base + adapters. By default if a float32 model fits into memory.",
        show_default=False,
    ),
]
Sync = Annotated[bool, typer.Option("--sync", help="Flush all to the disk before it gets its name (power failures).")]


@dataclass(frozen=True)
class Asked:
    """How a merge is to be made."""

    dtype: str
    device: str
    untie: bool
    dequantise: bool
    parity: bool | None
    sync: bool


def merge_lora(
    base_model: Annotated[
        str,
        typer.Option(
            "--base_model", metavar="BASE", help="Directory, org/name, GGUF or pip:.", autocompletion=completion.models
        ),
    ],
    adapters: Annotated[
        str,
        typer.Option(
            "--adapters",
            metavar="A,B,…",
            help="PEFT directories, with commas.",
            autocompletion=completion.listed_adapters,
        ),
    ],
    output_dir: Out,
    weights: Annotated[str, typer.Option("--weights", metavar="X,Y,…", help="One weight for each adapter.")] = "",
    dtype: DtypeOut = "auto",
    untie: Untie = False,
    dequantise: Dequantise = False,
    parity: Parity = None,
    sync: Sync = False,
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
            f"--weights has {counted(len(numbers), 'number')} for {counted(len(sources), 'adapter')} "
            f"({', '.join(sources)}); give one each"
        )
    values = [
        number(text, f"--weights {weights}: write numbers with commas, as in 0.3,0.5,0.2") for text in numbers
    ] or [1.0]
    members = [Weighted(source, value) for source, value in zip(sources, values, strict=True)]
    _merge(base_model, members, output_dir, Asked(dtype, device, untie, dequantise, parity, sync), as_json)


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="Model directory, org/name, GGUF file or pip: source.",
            autocompletion=completion.models,
        ),
    ],
    adapter: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]…", help="Adapters and weights (1).", autocompletion=completion.adapters
        ),
    ],
    output_dir: Out,
    dtype: DtypeOut = "auto",
    untie: Untie = False,
    dequantise: Dequantise = False,
    parity: Parity = None,
    sync: Sync = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Merge adapters into a copy of their base: base + Σ weight·ΔW, added in float32 and rounded once.

    **Example**

    `lorchestra merge my-base general=0.3 clinic=0.5 preference=0.2 -o merged --dtype bfloat16`
    """
    asked = Asked(dtype, device, untie, dequantise, parity, sync)
    _merge(base, [weighted(text) for text in adapter], output_dir, asked, as_json)


def _merge(base: str, members: list[Weighted], out: Path, asked: Asked, as_json: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose a new directory for the merged model")
    from lorchestra.adapter.belonging import check_base
    from lorchestra.base.dequantise import dequantised
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.load import choose_device, source_name
    from lorchestra.cli.models import base_directory, load_adapters, remarks
    from lorchestra.cli.progress import make_reporter
    from lorchestra.fusion.methods import linear

    if asked.dtype not in PLAIN_DTYPES:
        raise UserError(f"--dtype {asked.dtype!r} is unknown; there are {', '.join(PLAIN_DTYPES)}")
    choose_device(asked.device)
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
    if asked.dequantise:
        directory = dequantised(directory, reporter)
    told = {
        "output_dir": str(out),
        "base": identity.name,
        "weights": weights,
        "digest": fused.digest,
        **merged(directory, identity, adapters, weights, fused, out, asked, reporter),
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(told):
        typer.echo(line)


def merged(
    base: Path,
    identity: BaseId,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    fused: Adapter,
    out: Path,
    asked: Asked,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write base + ``fused`` and check it against base + ``adapters`` at ``weights``; nothing is at ``out`` before.

    Returns:
        The merge's figures, and ``parity``: the share of the adapters' effect on the logits that it disturbs, ``None``
        if that was not measured.

    Raises:
        TrainingError: a float32 merge does not answer as base + adapters do; it is not kept.
        AdapterError: an adapter does not fit the base.
        StorageError: the disk is full or closed.
    """
    from transformers import AutoTokenizer

    from lorchestra.evaluate.parity import LIMIT, merged_parity
    from lorchestra.fusion.stream import merge as stream
    from lorchestra.pipeline.cache import storage

    ratio: float | None = None

    def check(unnamed: Path, report: MergeReport) -> None:
        nonlocal ratio
        tokenizer = AutoTokenizer.from_pretrained(unnamed, trust_remote_code=False)
        with reporter.task("check the merged model", len(PROBES), "prompt") as task:
            prompts = [tokenizer(text)["input_ids"] for text in PROBES]
            found = merged_parity(base, unnamed, adapters, weights, prompts, asked.device)
            task.advance(len(PROBES))
        ratio = found.ratio
        if report.dtype == "float32" and not found.holds:
            raise TrainingError(
                f"the merged model does not answer as base + adapters do: {found.ratio:.1%} of the adapters' "
                f"effect on the logits differs ({LIMIT:.0%} is allowed). It is not kept"
            )

    checks = asked.parity if asked.parity is not None else _fits(base, reporter)
    with storage(out):
        report = stream(
            base,
            fused,
            out,
            dtype=asked.dtype,
            untie=asked.untie,
            identity=identity,
            check=check if checks else lambda unnamed, report: None,
            durable=asked.sync,
            reporter=reporter,
        )
    return {**report.as_dict(), "parity": ratio}


def _fits(base: Path, reporter: Reporter) -> bool:
    """Whether the models that the parity check loads have room; if not, it is said that there will be none."""
    from lorchestra.base.safetensors_file import entries, weight_files

    needed = PARITY_BYTES * sum(math.prod(entry.shape) for file in weight_files(base) for entry in entries(file))
    free = psutil.virtual_memory().available
    if needed > free:
        reporter.say(
            f"note: the merged model's answers are not compared with base + adapters: that takes {needed / 1e9:.1f} GB "
            f"of memory, {free / 1e9:.1f} GB are free (--parity does it all the same)"
        )
    return bool(needed <= free)


def _lines(told: Mapping[str, Any]) -> list[str]:
    mixture = " + ".join(f"{weight:g}·{name}" for name, weight in told["weights"].items())
    worst = told["worst"]
    out = [
        f"{told['output_dir']}: {told['base']} + {mixture}, in {told['dtype']}",
        f"‖ΔW‖/‖W‖ {told['update_ratio']:.3%} over {counted(told['modules'], 'module')}",
        f"rounding to {told['dtype']} lost {told['rounding_lost']:.2%} of ‖ΔW‖; {told['entries_lost']:.1%} of the "
        f"entries show no trace of the update (most in {worst['module']}: {worst['rounding_lost']:.2%} and "
        f"{worst['entries_lost']:.1%})",
    ]
    if told["base_rounding"]:
        out.append(f"the base itself, without adapters, is rounded by {told['base_rounding']:.3%} of ‖W‖")
    if told["parity"] is not None:
        out.append(
            f"parity: {told['parity']:.2%} of the adapters' effect on the logits differs (5 % allowed in float32)"
        )
    if told["rounding_lost"] > MUCH_LOST and told["dtype"] != "float32":
        out.append("warning: rounding lost much of the update: --dtype float32 keeps all of it")
    out.append(f"Next: {shlex.join(['lorchestra', 'chat', told['output_dir']])}")
    return out
