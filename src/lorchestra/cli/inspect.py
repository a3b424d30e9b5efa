"""``lorchestra inspect``: what an adapter directory holds, and what is off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.cli.completion import adapters
from lorchestra.cli.options import Json

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import Lineage, Parent


def inspect(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="A PEFT adapter directory, or hf:org/name.", autocompletion=adapters),
    ],
    sigma: Annotated[float, typer.Option(min=0, help="σ that an untrained A is judged against (σ/√r).")] = 0.02,
    as_json: Json = False,
) -> None:
    """Per module: std of A against σ/√r (judged only at initialisation), effective scale, ‖ΔW‖, and what is off.

    **Examples**

    `lorchestra inspect checkpoints/adapter_stage1`

    `lorchestra inspect hf:org/some-adapter --json`
    """
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.peft_format import effective_scales
    from lorchestra.base.locate import locate
    from lorchestra.cli.progress import make_reporter
    from lorchestra.adapter.inspect import inspect_factors

    directory = locate(adapter, relative_to=Path.cwd(), reporter=make_reporter())
    loaded = Adapter.load(directory)
    scales = effective_scales(directory)
    view = inspect_factors({path: (update, scales[path]) for path, update in loaded.modules.items()}, sigma)
    if as_json:
        head = {"digest": loaded.digest, "base": loaded.base.name, "parameters": loaded.parameters}
        told = {**head, "lineage": asdict(loaded.lineage), **view.as_dict()}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("module", "rank", "shape", "std A", "σ/√r", "scale", "‖ΔW‖", "what is off", box=None)
    for module in view.modules:
        judged = f"{module.expected_std:.4g}" if module.initial else "–"
        shape = "×".join(map(str, module.shape))
        table.add_row(
            module.path, str(module.rank), shape, f"{module.std_A:.4g}", judged, f"{module.scale:.4g}",
            f"{module.norm:.4g}", "; ".join(module.flags),
        )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    console.print(f"{len(view.modules)} modules, {loaded.parameters:,} parameters, ‖ΔW‖ {loaded.norm():.4g} in all")
    known = "known by digest" if loaded.base.weights else "unverified: shapes only"
    for line in _origin(loaded.lineage):
        console.print(line)
    console.print(f"base {loaded.base.name or 'unnamed'} ({known})")
    console.print(f"digest {loaded.digest}")
    for remark in view.remarks:
        console.print(remark)


def _origin(lineage: Lineage) -> list[str]:
    """How the adapter came to be, as far as it says."""
    if lineage.made_by == "stage":
        lora = lineage.settings.get("lora", {})
        how = f"rank {lora['rank']}, α {lora['alpha']:g}, {lora['scaling']}, {lora['init']}" if lora else ""
        out = [f"stage {lineage.name} ({lineage.task}; {how}; the scale is folded into B)"]
        out += [f"  on {source}" for source in lineage.data]
        if lineage.context:
            out.append(f"  beside {_sum(lineage.context)}")
        return out
    if lineage.made_by == "fusion":
        return [f"fusion {lineage.name} ({lineage.task}) = {_sum(lineage.parents)}"]
    return ["made by another tool: nothing is known of its training"]


def _sum(parents: Sequence[Parent]) -> str:
    return " + ".join(f"{parent.coefficient:g}·{parent.name} ({parent.digest[7:19]})" for parent in parents)
