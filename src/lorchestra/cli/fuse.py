"""``lorchestra fuse``: several adapters into one, exactly, at a lower rank, or by another method of fusion."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli import completion
from lorchestra.cli.options import Json, refuse_overwriting, weighted
from lorchestra.errors import UserError, counted
from lorchestra.fusion.methods.table import METHODS, method_named

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter

SAVED, COMPUTED = ("float32", "bfloat16", "float16"), ("float32", "float64")
SIZE, METHOD, MODULES = "How much is kept", "Options of methods", "Weights by module"


def _methods() -> list[tuple[str, str]]:
    return [(row.name, row.summary) for row in METHODS.values()]


def _values(names: tuple[str, ...]) -> Any:
    return lambda: list(names)


def fuse(
    adapter: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]…", help="Adapters and weights (1).", autocompletion=completion.adapters
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", "-o", metavar="DIR", help="Where the result goes.")],
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="See the list above.", autocompletion=_methods)
    ] = "linear",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="At most this rank.", rich_help_panel=SIZE)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="The lowest rank that keeps this share of ‖ΔW‖².", rich_help_panel=SIZE),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option("--budget", min=1, help="Parameters in all, shared out by singular value.", rich_help_panel=SIZE),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries kept.", rich_help_panel=METHOD)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of dare's chance (0).", rich_help_panel=METHOD)] = None,
    weights_for: Annotated[
        list[str] | None,
        typer.Option(
            "--weights_for",
            metavar="'PATTERN: NAME=WEIGHT …'",
            help="Layers ('layers.0-9: clinic=0.3') or module names ('*.q_proj: clinic=0'). Repeat; the last wins.",
            rich_help_panel=MODULES,
        ),
    ] = None,
    weights_file: Annotated[
        Path | None,
        typer.Option(
            "--weights_file", metavar="FILE", help="The same, YAML or JSON: NAME: {PATTERN: WEIGHT}.",
            rich_help_panel=MODULES,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help=f"Of what is saved: {', '.join(SAVED)}.", autocompletion=_values(SAVED))
    ] = "float32",
    compute_dtype: Annotated[
        str,
        typer.Option("--compute_dtype", help="Of the arithmetic: float32, float64.", autocompletion=_values(COMPUTED)),
    ] = "float32",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Fuse adapters into one PEFT adapter; no base is needed.

    The default is the exact sum, whose rank is the sum of the ranks. `--rank`, `--energy` or `--budget` keep the best
    approximation within those bounds, and the share of ‖ΔW‖² that was kept is printed.

    **Methods**

    METHODS

    **Examples**

    `lorchestra fuse general=0.3 clinic=0.5 preference=0.2 -o fused --rank 16`

    `lorchestra fuse general clinic -o fused --method ties --density 0.2 --rank 32`

    `lorchestra fuse general=0.5 clinic=0.5 -o fused --weights-for 'layers.0-9: clinic=0.1'`
    """
    members = [weighted(text) for text in adapter]
    refuse_overwriting(output_dir, members)
    row = method_named(method)
    _known("--dtype", dtype, SAVED)
    _known("--compute_dtype", compute_dtype, COMPUTED)
    import torch

    from lorchestra.cli.models import load_adapters, remarks
    from lorchestra.cli.module_weights import rules_of
    from lorchestra.cli.progress import make_reporter
    from lorchestra.fusion.bounds import Bounds
    from lorchestra.fusion.methods.apply import apply, check_options
    from lorchestra.pipeline.single import check_place

    bounds, rules = Bounds(rank, energy, budget), rules_of(weights_for or [], weights_file)
    check_options(row, bounds, density, seed, rules)
    check_place(output_dir)
    reporter = make_reporter()
    adapters, weights = load_adapters(members, reporter)
    for line in [*remarks(adapters, weights), *_strangers(adapters)]:
        reporter.say(line)
    fused = apply(
        method, adapters, weights, rules=rules, bounds=bounds, density=density, seed=seed,
        dtype=getattr(torch, compute_dtype), name=output_dir.resolve().name, reporter=reporter,
    )  # fmt: skip
    fused.adapter.save(output_dir, dtype=getattr(torch, dtype))
    stored = type(fused.adapter).load(output_dir)
    told = {
        "output_dir": str(output_dir),
        "digest": stored.digest,
        "method": method,
        "weights": weights,
        "norms": {name: member.norm() for name, member in adapters.items()},
        "norm": stored.norm(),
        "rank": max(update.rank for update in stored.modules.values()),
        "modules": len(stored.modules),
        "parameters": stored.parameters,
        "bytes": (output_dir / "adapter_model.safetensors").stat().st_size,
        "dtype": dtype,
        "retained": fused.retained,
        "per_module": dict(fused.per_module),
        "rounding": _distance(stored, fused.adapter) if dtype != "float32" else 0.0,
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(told):
        typer.echo(line)


fuse.__doc__ = (fuse.__doc__ or "").replace(
    "METHODS", "\n\n    ".join(f"- `{name}`: {summary}" for name, summary in _methods())
)


def _known(option: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise UserError(f"{option} {value!r} is unknown; there are {', '.join(values)}")


def _strangers(adapters: Mapping[str, Adapter]) -> list[str]:
    """Pairs that change no module in common: rightly so if they are of different layers, else another base's names."""
    out = []
    for (one, a), (two, b) in combinations(adapters.items(), 2):
        if not a.modules.keys() & b.modules.keys():
            out.append(
                f"warning: {one} and {two} have no module in common ({next(iter(a.modules))}, "
                f"{next(iter(b.modules))}); make sure that they are for the same base"
            )
    return out


def _distance(stored: Adapter, meant: Adapter) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖."""
    from lorchestra.fusion.methods import fuse as total

    norm = meant.norm()
    return total([stored, meant], [1.0, -1.0]).norm() / norm if norm else 0.0


def _lines(told: Mapping[str, Any]) -> list[str]:
    width = max(len(name) for name in told["norms"])
    out = [f"{name:<{width}}  λ {told['weights'][name]:<6g} ‖ΔW‖ {norm:.4g}" for name, norm in told["norms"].items()]
    out.append(
        f"{told['output_dir']}: {told['method']}, ‖ΔW‖ {told['norm']:.4g}, rank {told['rank']}, "
        f"{told['parameters']:,} parameters in {counted(told['modules'], 'module')}, {told['bytes'] / 1e6:.1f} MB; "
        f"{told['digest'][:19]}"
    )
    shares = told["per_module"]
    if shares:
        least = min(shares, key=shares.get)
        dropped = sum(share == 0 for share in shares.values())
        left_out = f"; {counted(dropped, 'module')} left out" if dropped else ""
        out.append(f"retained energy {told['retained']:.2%}, least in {least}: {shares[least]:.2%}{left_out}")
    else:
        out.append("retained energy 100% (exact)")
    if told["dtype"] != "float32":
        out.append(f"saved in {told['dtype']}: rounding moves ΔW by {told['rounding']:.2%} of its norm")
    out.append(f"Next: {shlex.join(['lorchestra', 'chat', told['output_dir']])}")
    return out
