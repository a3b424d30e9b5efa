"""``lorchestra fuse``: several adapters into one, exactly or at a lower rank."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.options import Json, refuse_overwriting, weighted
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter


def fuse(
    adapter: Annotated[list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]…", help="Adapters and weights (1).")],
    output_dir: Annotated[Path, typer.Option("--output_dir", "-o", metavar="DIR", help="Where the result goes.")],
    method: Annotated[str, typer.Option("--method", help="linear: the exact weighted sum.")] = "linear",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Keep the best approximation of at most this rank.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fuse adapters into one PEFT adapter: Σ weight·ΔW from the factors alone.

    Without `--rank` the sum is exact and its rank is the sum of the ranks; with it, the share of ‖ΔW‖² that was kept
    is printed.

    **Example**

    `lorchestra fuse general=0.3 clinic=0.5 preference=0.2 -o fused --rank 16`
    """
    members = [weighted(text) for text in adapter]
    refuse_overwriting(output_dir, members)
    from dataclasses import replace

    from lorchestra.cli.models import load_adapters, remarks
    from lorchestra.cli.progress import make_reporter
    from lorchestra.fusion.methods import compress
    from lorchestra.pipeline.single import check_place

    chosen = _method(method)
    check_place(output_dir)
    reporter = make_reporter()
    adapters, weights = load_adapters(members, reporter)
    for line in remarks(adapters, weights):
        reporter.say(line)
    exact = chosen(adapters, weights)
    fused, retained = (exact, 1.0) if rank is None else compress(exact, rank=rank)
    fused = replace(fused, lineage=replace(fused.lineage, name=output_dir.resolve().name))
    fused.save(output_dir)
    told = {
        "output_dir": str(output_dir),
        "digest": fused.digest,
        "method": method,
        "weights": weights,
        "norms": {name: member.norm() for name, member in adapters.items()},
        "norm": fused.norm(),
        "rank": max(update.rank for update in fused.modules.values()),
        "modules": len(fused.modules),
        "parameters": fused.parameters,
        "retained": retained,
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(told):
        typer.echo(line)


def _method(name: str) -> Callable[[Mapping[str, Adapter], Mapping[str, float]], Adapter]:
    from lorchestra.fusion.methods import linear

    methods = {"linear": linear}
    if name not in methods:
        raise UserError(f"--method {name!r} is unknown; there is {', '.join(methods)}")
    return methods[name]


def _lines(told: Mapping[str, Any]) -> list[str]:
    width = max(len(name) for name in told["norms"])
    out = [f"{name:<{width}}  λ {told['weights'][name]:<6g} ‖ΔW‖ {norm:.4g}" for name, norm in told["norms"].items()]
    out.append(
        f"{told['output_dir']}: ‖ΔW‖ {told['norm']:.4g}, rank {told['rank']}, {told['parameters']:,} parameters in "
        f"{told['modules']} modules; {told['digest'][:19]}"
    )
    exact = told["retained"] == 1.0
    out.append(f"retained energy {told['retained']:.2%}{' (exact)' if exact else ' of the exact sum'}")
    out.append(f"Next: {shlex.join(['lorchestra', 'chat', told['output_dir']])}")
    return out
