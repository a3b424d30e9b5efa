"""``lorchestra inspect``: what an adapter directory holds, and what is off."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.completion import adapters
from lorchestra.cli.options import Json
from lorchestra.errors import counted

if TYPE_CHECKING:
    from rich.table import Table

    from lorchestra.adapter.inspect import ModuleView
    from lorchestra.adapter.lineage import Lineage, Parent


def inspect(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="A PEFT adapter directory, or hf:org/name.", autocompletion=adapters),
    ],
    every: Annotated[bool, typer.Option("--all", help="One row a module, not one a kind of module.")] = False,
    sigma: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="σ of the rescaled initialisation, to judge an untrained A against σ/√r.",
            show_default="as trained",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank, std of A, trained scale and ‖ΔW‖ by kind of module, where it came from, and what is off.

    **Examples**

    `lorchestra inspect checkpoints/adapter_stage1`

    `lorchestra inspect hf:org/some-adapter --all`
    """
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.inspect import inspect_factors
    from lorchestra.adapter.peft_format import effective_scales
    from lorchestra.base.locate import locate
    from lorchestra.cli.progress import make_reporter
    from lorchestra.cli.terminal import console

    directory = locate(adapter, relative_to=Path.cwd(), reporter=make_reporter())
    loaded = Adapter.load(directory)
    on_disk = effective_scales(directory)
    lora = _lora(loaded.lineage)
    trained = lora.scale if lora else None
    if sigma is None and lora is not None and lora.init == "rescaled":
        sigma = lora.sigma
    scales = on_disk if trained is None else dict.fromkeys(on_disk, trained)
    paths = sorted(loaded.modules, key=_natural)
    view = inspect_factors({path: (loaded.modules[path], scales[path]) for path in paths}, sigma)
    if as_json:
        head = {"digest": loaded.digest, "base": loaded.base.name, "parameters": loaded.parameters}
        told: dict[str, Any] = {**head, "lineage": asdict(loaded.lineage), **view.as_dict()}
        for module in told["modules"]:
            module["scale_on_disk"] = on_disk[module["path"]]
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    out = console(markup=False)
    flagged = [module for module in view.modules if module.flags]
    if every:
        out.print(_rows(view.modules))
    else:
        out.print(_kinds(view.modules))
        if flagged:
            out.print(f"\nwhat is off, in {counted(len(flagged), 'module')}:")
            out.print(_rows(flagged))
        out.print("\n--all shows every module" if len(view.modules) > 1 else "")
    out.print(
        f"{counted(len(view.modules), 'module')}, {loaded.parameters:,} parameters, ‖ΔW‖ {loaded.norm():.4g} in all"
    )
    known = "known by digest" if loaded.base.weights else "unverified: shapes only"
    for line in _origin(loaded.lineage, trained):
        out.print(line)
    out.print(f"base {loaded.base.name or 'unnamed'} ({known})")
    out.print(f"digest {loaded.digest}")
    for remark in view.remarks:
        out.print(remark)


def _lora(lineage: Lineage) -> Any:
    """The settings that a stage of ours was trained with, if it was one."""
    from lorchestra.train.settings import LoraSettings

    settings = lineage.settings.get("lora")
    return LoraSettings.model_validate(settings) if lineage.made_by == "stage" and settings else None


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _rows(modules: Sequence[ModuleView]) -> Table:
    from rich.table import Table

    table = Table("module", "rank", "shape", "std A", "σ/√r", "scale", "‖ΔW‖", "what is off", box=None)
    for module in modules:
        judged = module.initial and module.expected_std is not None
        table.add_row(
            module.path,
            str(module.rank),
            "×".join(map(str, module.shape)),
            f"{module.std_A:.4g}",
            f"{module.expected_std:.4g}" if judged else "–",
            f"{module.scale:.4g}",
            f"{module.norm:.4g}",
            "; ".join(module.flags),
        )
    return table


def _kinds(modules: Sequence[ModuleView]) -> Table:
    """One row for the modules whose paths end alike: ``q_proj``, ``k_proj``, …"""
    from rich.table import Table

    kinds: dict[str, list[ModuleView]] = {}
    for module in modules:
        kinds.setdefault(module.path.rpartition(".")[2], []).append(module)
    table = Table("kind", "modules", "rank", "shape", "std A", "scale", "‖ΔW‖ in all", "largest", "off", box=None)
    for kind, members in kinds.items():
        largest = max(members, key=lambda module: module.norm)
        table.add_row(
            kind,
            f"{len(members):,}",
            _span([float(module.rank) for module in members]),
            _first(["×".join(map(str, module.shape)) for module in members]),
            _span([module.std_A for module in members]),
            _span([module.scale for module in members]),
            f"{math.sqrt(sum(module.norm**2 for module in members)):.4g}",
            f"{largest.norm:.4g} in {largest.path.removesuffix('.' + kind)}" if largest.norm else "–",
            str(sum(bool(module.flags) for module in members) or "–"),
        )
    return table


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} … {high}"


def _first(texts: Sequence[str]) -> str:
    others = len(set(texts)) - 1
    return texts[0] + (f" and {others} more" if others else "")


def _origin(lineage: Lineage, scale: float | None) -> list[str]:
    """How the adapter came to be, as far as it says."""
    if lineage.made_by == "stage":
        lora: Mapping[str, Any] = lineage.settings.get("lora", {})
        how = "" if scale is None else f"; rank {lora['rank']}, α {lora['alpha']:g}, {lora['scaling']}, {lora['init']}"
        out = [f"stage {lineage.name} ({lineage.task}{how})"]
        if scale is not None:
            out.append(
                f"  trained at scale {scale:.4g}, which is folded into B: on disk, and for every engine, it is 1"
            )
        out += [f"  on {source}" for source in lineage.data]
        if held := lineage.settings.get("base_quantised"):
            out.append(f"  the base was held in {held} meanwhile")
        if lineage.context:
            out.append(f"  beside {_sum(lineage.context)}")
        return out
    if lineage.made_by == "fusion":
        return [f"fusion {lineage.name} ({lineage.task}) = {_sum(lineage.parents)}"]
    return ["made by another tool: nothing is known of its training"]


def _sum(parents: Sequence[Parent]) -> str:
    return " + ".join(f"{parent.coefficient:g}·{parent.name} ({parent.digest[7:19]})" for parent in parents)
