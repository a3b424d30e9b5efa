"""``lorchestra registry list|show|history``: what there is, and what was done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.completion import among
from lorchestra.cli.options import Json
from lorchestra.cli.registry_options import Ref, Where, aliases_of, metric, names, opened, printed, short, size, told
from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.registry.manifest import Manifest, ParentEntry
    from lorchestra.registry.reader import Filters
    from lorchestra.registry.sql.catalog import Measured, Summary, Version

PAGE = 50  # rows of a table, unless asked otherwise
MANY = 500  # rows that are laid out to the terminal's width
Name = Annotated[str, typer.Argument(metavar="[NAME]", help="Of one adapter alone.", autocompletion=names)]


def list_versions(
    name: Name = "",
    base: Annotated[str, typer.Option("--base", metavar="TEXT", help="Base's name, or digest of its weights.")] = "",
    tag: Annotated[str, typer.Option("--tag", metavar="TAG", help="With this tag.")] = "",
    state: Annotated[
        str, typer.Option("--state", help="ready or revoked.", autocompletion=among("ready", "revoked"))
    ] = "",
    alias: Annotated[str, typer.Option("--alias", metavar="ALIAS", help="That this alias points at.")] = "",
    since: Annotated[str, typer.Option("--since", metavar="DATE", help="Pushed on that day or later.")] = "",
    measured: Annotated[
        str, typer.Option("--metric", metavar="TEXT", help="loss, or loss<=1.2; it gets a column.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, help="So many at most; 0: all. A table has 50, JSON has all.")
    ] = None,
    offset: Annotated[int, typer.Option("--offset", min=0, help="Leave out the newest so many.")] = 0,
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """The versions, newest first, with their aliases. `show REF` tells all of one.

    **Examples**

    `lorchestra registry list`

    `lorchestra registry list clinic --metric loss --state ready`

    `lorchestra registry list --alias production --json`
    """
    column = re.split("[<>]", measured)[0].strip()
    wanted: Filters = {"base": base, "tag": tag, "metric": measured, "state": state, "alias": alias, "since": since}
    most = limit if limit is not None else 0 if as_json else PAGE
    with opened(registry) as held:
        lines = held.summaries(name, limit=most, offset=offset, **wanted)
        metrics = held.measured([line.id for line in lines], "" if as_json else column) if as_json or column else {}
        there = offset + len(lines)
        if most and len(lines) in (0, most):
            there = held.count(name, **wanted)
    if as_json:
        printed([_line(line, metrics.get(line.id, {})) for line in lines])
    elif lines:
        _table(lines, column, {id: values[column] for id, values in metrics.items()})
    elif there:
        typer.echo(f"there are {counted(there, 'version')} like that, and none after the first {offset:,}")
    else:
        typer.echo("no version is like that" if any((name, *wanted.values())) else "empty")
    if lines and there > offset + len(lines):
        typer.echo(
            f"note: {offset + 1:,} to {offset + len(lines):,} of {there:,}; --offset {offset + len(lines)} goes on, "
            "--limit 0 shows all",
            err=True,
        )


def _line(line: Summary, metrics: Mapping[str, Measured]) -> dict[str, Any]:
    return {
        "reference": line.reference,
        **line._asdict(),
        "metrics": {name: values._asdict() for name, values in sorted(metrics.items())},
    }


def _table(lines: Sequence[Summary], column: str, values: Mapping[int, Measured]) -> None:
    columns = ["version", "aliases", "state", "base", "rank", *([column] if column else []), "tags", "pushed", "by"]
    rows = [
        (
            line.reference,
            ", ".join(line.aliases) or "–",
            line.state,
            line.base_name or "unnamed",
            str(line.rank),
            *([metric(values[line.id]) if line.id in values else "–"] if column else []),
            ", ".join(line.tags) or "–",
            when(line.created),
            line.created_by,
        )
        for line in lines
    ]
    if len(rows) > MANY:
        _long_table(columns, rows)
        return
    from rich.table import Table

    from lorchestra.cli.terminal import console

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    console(markup=False).print(table)


def _long_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned, and no cell broken to the width of the terminal: rich takes a second for a thousand rows."""
    from rich.cells import cell_len

    whole = [tuple(columns), *rows]
    widths = [max(map(cell_len, cells)) for cells in zip(*whole, strict=True)]
    for row in whole:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        typer.echo((" " + "  ".join(cells)).rstrip())


def show(ref: Ref, registry: Where = "", as_json: Json = False) -> None:
    """Everything that is known of a version: weights, base, how it was made, on what, what was measured.

    **Examples**

    `lorchestra registry show clinic@production`

    `lorchestra registry show clinic@v2 --json`
    """
    with opened(registry) as held:
        version = held.resolve(ref)
        pointing = aliases_of(held, version.manifest.name).get(version.id, [])
    if as_json:
        printed(told(version, pointing))
        return
    from lorchestra.cli.terminal import console

    out = console(markup=False)
    for key, text in _rows(version, pointing):
        out.print(f"{key:<10} {text}")


def _rows(version: Version, pointing: Sequence[str]) -> list[tuple[str, str]]:
    manifest = version.manifest
    state: str = version.state
    if version.revoked:
        state += f" on {when(version.revoked.at)} by {version.revoked.by}: {version.revoked.why}"
    base = manifest.base
    digests = [f"{part} {short(value)}" for part, value in (("weights", base.weights), ("tokenizer", base.tokenizer),
                                                            ("template", base.template)) if value]  # fmt: skip
    rows = [
        ("version", manifest.reference),
        ("state", state),
        ("aliases", ", ".join(pointing) or "–"),
        ("digest", manifest.digest),
        ("base", f"{base.name or 'unnamed'} ({', '.join(digests) or 'unverified: shapes only'})"),
        ("weights", f"{counted(len(manifest.ranks), 'module')}, rank {ranks(manifest)}, {manifest.parameters:,} "
                    f"parameters, {scales(manifest)}"),
        ("made by", made_by(manifest)),
    ]  # fmt: skip
    rows += [("sum of", weighted(manifest.parents))] if manifest.parents else []
    rows += [("beside", weighted(manifest.context))] if manifest.context else []
    rows += [("data", f"{name} {short(digest)}") for name, digest in manifest.data.items()]
    rows += [("metric", f"{name} {metric(value)}" + _measured_on(value.split, value.n)) for name, value in
             sorted(manifest.metrics.items())]  # fmt: skip
    rows += [("files", f"{path} {size(entry.size)}") for path, entry in sorted(manifest.files.items())]
    rows += [("tags", ", ".join(manifest.tags))] if manifest.tags else []
    rows += [("note", manifest.note)] if manifest.note else []
    return [*rows, ("pushed", f"{when(manifest.created)} by {manifest.created_by}")]


def _measured_on(split: str, n: int | None) -> str:
    parts = [f"{split} test" if split == "sealed" else split, f"n = {n:,}" if n is not None else ""]
    text = ", ".join(filter(None, parts))
    return f" ({text})" if text else ""


def history(
    name: Name = "",
    alias: Annotated[str, typer.Option("--alias", metavar="ALIAS", help="Of this alias alone.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=0, help="The newest so many; 0: all.")] = 0,
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """Who did what, when, from what to what, and why: the audit log, newest last. Nothing in it can be changed.

    **Examples**

    `lorchestra registry history clinic`

    `lorchestra registry history clinic --alias production --json`
    """
    with opened(registry) as held:
        entries = sorted(held.history(name, alias, limit), key=lambda entry: entry.id)
    if as_json:
        printed([{**asdict(entry), "details": dict(entry.details)} for entry in entries])
        return
    from rich.table import Table

    from lorchestra.cli.terminal import console

    table = Table("when", "who", "what", "of", "from", "to", "why", box=None)
    for entry in entries:
        table.add_row(
            when(entry.at),
            entry.actor,
            entry.action,
            f"{entry.name}@{entry.alias}" if entry.alias else entry.name or "–",
            entry.before or "–",
            entry.after or "–",
            entry.why or "–",
        )
    console(markup=False).print(table)


def made_by(manifest: Manifest) -> str:
    """``stage terms (sft)``."""
    task = f"({manifest.task})" if manifest.task else ""
    return " ".join(filter(None, (manifest.made_by, manifest.stage, task)))


def when(text: str) -> str:
    """``2025-03-15 08:21``, in UTC as it is stored."""
    return text[:16].replace("T", " ")


def ranks(manifest: Manifest) -> str:
    """``8``, or ``4–16``."""
    found = sorted(set(manifest.ranks.values()))
    return "–" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def scales(manifest: Manifest) -> str:
    """What the files ask for."""
    found = sorted(set(manifest.scales.values()))
    if found == [1.0]:
        return "scale folded into B"
    return f"scale {found[0]:.4g}" if len(found) == 1 else f"scales {found[0]:.4g}–{found[-1]:.4g}" if found else ""


def weighted(entries: Sequence[ParentEntry]) -> str:
    """``0.5·terms (3f2a90c1b7de) + …``"""
    return " + ".join(f"{entry.coefficient:g}·{entry.name} ({short(entry.digest)})" for entry in entries)
