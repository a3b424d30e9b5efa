"""``lorchestra registry lineage|diff``: where a version came from, and what sets two apart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.completion import among
from lorchestra.cli.options import Json
from lorchestra.cli.registry_options import Ref, Where, metric, opened, printed, references, short
from lorchestra.cli.registry_view import made_by
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from lorchestra.registry.compare import Change, Comparison
    from lorchestra.registry.lineage import Line

FORMS = ("dot", "mermaid")
CLIPPED = 60  # characters of a value in a table


def lineage(
    ref: Ref,
    descendants: Annotated[bool, typer.Option("--descendants", help="What came of it, not what it came from.")] = False,
    graph: Annotated[
        str, typer.Option("--graph", metavar="FORM", help="dot or mermaid.", autocompletion=among(*FORMS))
    ] = "",
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """What a version was fused from or trained beside, with coefficients, back to the first stage.

    **Examples**

    `lorchestra registry lineage clinic@production`

    `lorchestra registry lineage terms@v1 --descendants`

    `lorchestra registry lineage clinic --graph dot | dot -Tsvg > lineage.svg`
    """
    if graph and graph not in FORMS:
        raise UserError(f"--graph {graph!r}: there are {' and '.join(FORMS)}")
    from lorchestra.registry.lineage import related

    with opened(registry) as held:
        version = held.resolve(ref)
        found = related(held, version, ancestors=not descendants, descendants=descendants)
    digest = version.manifest.digest
    if as_json:
        printed({"of": version.manifest.reference, "digest": digest, **found.as_dict()})
    elif graph:
        typer.echo(found.dot() if graph == "dot" else found.mermaid())
    else:
        for text in _drawn(list(found.tree(digest, descendants=descendants))):
            typer.echo(text)


def _drawn(lines: Sequence[Line]) -> Iterable[str]:
    """The tree with its branches."""
    for k, line in enumerate(lines):
        branches = ""
        for depth in range(1, line.depth + 1):
            later = next((other.depth for other in lines[k + 1 :] if other.depth <= depth), 0)
            goes_on = later == depth
            if depth == line.depth:
                branches += "├─ " if goes_on else "└─ "
            else:
                branches += "│  " if goes_on else "   "
        yield branches + _said(line)


def _said(line: Line) -> str:
    node, edge = line.node, line.edge
    how = (
        ""
        if edge is None
        else f"{edge.coefficient:g} · "
        if edge.kind == "parent"
        else f"beside {edge.coefficient:g} · "
    )
    version = node.version
    if version is None:
        what = "not in this registry"
    else:
        what = made_by(version.manifest) + (", revoked" if version.state == "revoked" else "")
    also = f", also {', '.join(node.also)}" if node.also else ""
    above = ", shown above" if line.repeated else ""
    return f"{how}{node.name or 'unnamed'} {short(node.digest)}  {what}{also}{above}"


def diff(
    before: Annotated[str, typer.Argument(metavar="REF", help="One version.", autocompletion=references)],
    after: Annotated[str, typer.Argument(metavar="REF", help="The other.", autocompletion=references)],
    modules: Annotated[int, typer.Option("--modules", min=0, help="Of the weights, those that moved most.")] = 5,
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """What sets two versions apart: settings, data, lineage, metrics with intervals, and the distance of their weights.

    **Examples**

    `lorchestra registry diff clinic@v1 clinic@v2`

    `lorchestra registry diff clinic@production clinic --json`
    """
    from lorchestra.registry.compare import compare_held

    with opened(registry) as held:
        found = compare_held(held, before, after)
    if as_json:
        printed(found.as_dict())
        return
    from lorchestra.cli.terminal import console

    _show(found, modules, console(markup=False))


def _show(found: Comparison, modules: int, out: Console) -> None:
    from rich.table import Table

    for title, changes in (
        ("base", found.base), ("settings", found.settings), ("data", found.data), ("lineage", found.lineage),
        ("serving", found.serving), ("tools", found.tools),
    ):  # fmt: skip
        if changes:
            out.print(_changes(title, changes, found))
            out.print()
    if found.metrics:
        table = Table("metric", found.before, found.after, "change", "", box=None)
        for pair in found.metrics:
            values = [metric(value) if value else "–" for value in (pair.before, pair.after)]
            table.add_row(pair.key, *values, "–" if pair.change is None else f"{pair.change:+.4g}", pair.verdict)
        out.print(table)
        out.print()
    far = found.distance
    if found.same:
        out.print("the weights are the same")
        return
    out.print(
        f"weights: ‖ΔW₁ − ΔW₂‖/‖ΔW₁‖ {_text(far.relative)}, cosine {_text(far.cosine)}, "
        f"‖ΔW‖ {far.norms[0]:.4g} and {far.norms[1]:.4g}"
    )
    for reference, paths in zip((found.before, found.after), far.only, strict=True):
        if paths:
            out.print(f"only {reference} changes {', '.join(paths[:5])}{' …' if len(paths) > 5 else ''} ({len(paths)})")
    if far.modules and modules:
        table = Table("moved most", "relative", "cosine", "‖ΔW₁‖", "‖ΔW₂‖", box=None)
        for row in far.modules[:modules]:
            table.add_row(row.path, _text(row.relative), _text(row.cosine), *(f"{norm:.4g}" for norm in row.norms))
        out.print(table)


def _changes(title: str, changes: Sequence[Change], found: Comparison) -> Any:
    from rich.table import Table

    table = Table(title, found.before, found.after, box=None)
    for change in changes:
        table.add_row(change.key, _value(change.before), _value(change.after))
    return table


def _value(value: Any) -> str:
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    if text.startswith("sha256:"):
        return short(text)
    return text if len(text) <= CLIPPED else text[: CLIPPED - 1] + "…"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
