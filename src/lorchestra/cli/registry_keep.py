"""``lorchestra registry verify|gc|export|import|backup|restore``: that it is whole, stays small, and is somewhere else
too."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.cli.options import Json
from lorchestra.cli.progress import make_reporter
from lorchestra.cli.registry_options import Where, Why, Yes, opened, printed, references, size
from lorchestra.errors import UserError, counted

if TYPE_CHECKING:
    from lorchestra.registry.collecting import GcPlan
    from lorchestra.registry.transport.backup import Backup

SHOWN = 10  # blobs in a plan


def verify(
    shallow: Annotated[bool, typer.Option("--shallow", help="That blobs are there, without reading them.")] = False,
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """Whether everything is as it was written: blobs, manifests, rows, aliases, and the chain of the history.

    Exit code 1 if something is not; each finding names what it is about.

    **Example**

    `lorchestra registry verify`
    """
    with opened(registry) as held:
        findings = held.verify(deep=not shallow)
        if as_json:
            printed([asdict(finding) for finding in findings])
        else:
            for finding in findings:
                typer.echo(str(finding))
            if not findings:
                known = counted(held.count(), "version")
                typer.echo(f"{known}, {counted(held.generation(), 'line')} of history: all as it was written")
    if findings:
        typer.echo(f"{counted(len(findings), 'finding')}; a backup has what is damaged whole", err=True)
        raise typer.Exit(1)


def gc(
    version: Annotated[
        list[str] | None,
        typer.Option(
            "--version", metavar="REF", help="This version too, if nothing needs it. Repeat.", autocompletion=references
        ),
    ] = None,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="HOURS", min=0, help="Spare what was put later.")
    ] = 1.0,
    why: Why = "",
    yes: Yes = False,
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """Show what nothing needs; on yes, remove it. Nothing goes that a version, an alias or a lineage needs.

    **Examples**

    `lorchestra registry gc`

    `lorchestra registry gc --version clinic@v1 --yes --why "superseded a year ago"`
    """
    from datetime import timedelta

    spared, wanted = timedelta(hours=older_than), tuple(version or ())
    with opened(registry) as held:
        plan = held.gc(True, spared, versions=wanted, why=why)
        if not as_json:
            _planned(plan)
        something = bool(plan.blobs or plan.leftovers or plan.versions)
        if something and not yes and not as_json and sys.stdin.isatty():
            yes = typer.confirm("remove it?", err=True)
        if something and yes:
            plan = held.gc(False, spared, versions=wanted, why=why)
            if not as_json:
                typer.echo(f"removed: {_counts(plan)}")
    if as_json:
        printed({**asdict(plan), "bytes": plan.bytes})
    elif something and not yes:
        typer.echo("nothing was removed; --yes does it", err=True)


def _planned(plan: GcPlan) -> None:
    for reference in plan.versions:
        typer.echo(f"version  {reference}")
    for digest, length in plan.blobs[:SHOWN]:
        typer.echo(f"blob     {digest} {size(length)}")
    if len(plan.blobs) > SHOWN:
        typer.echo(f"         and {len(plan.blobs) - SHOWN:,} more")
    for name in plan.leftovers:
        typer.echo(f"leftover {name}")
    typer.echo(
        f"nothing needs {_counts(plan)}" if plan.blobs or plan.leftovers or plan.versions else "nothing to remove"
    )


def _counts(plan: GcPlan) -> str:
    parts = [
        counted(len(plan.versions), "version") if plan.versions else "",
        f"{counted(len(plan.blobs), 'blob')} ({size(plan.bytes)})" if plan.blobs else "",
        counted(len(plan.leftovers), "leftover") if plan.leftovers else "",
    ]
    return ", ".join(filter(None, parts)) or "nothing"


def export(
    refs: Annotated[list[str], typer.Argument(metavar="REF…", help="The versions.", autocompletion=references)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle, a new file.")],
    lineage: Annotated[bool, typer.Option("--lineage", help="Their ancestors too.")] = False,
    registry: Where = "",
) -> None:
    """Put versions into one file, for another registry.

    **Example**

    `lorchestra registry export clinic@production terms@v2 -o clinic.bundle --lineage`
    """
    from lorchestra.registry.transport.bundle import export as write

    with opened(registry) as held:
        versions = write(held, refs, output, lineage=lineage, reporter=make_reporter())
    for version in versions:
        typer.echo(f"{version.reference} ({version.manifest.digest})")
    typer.echo(f"{counted(len(versions), 'version')} in {output} ({size(output.stat().st_size)})")


def import_(
    bundle: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle; it is not trusted.")],
    renumber: Annotated[
        bool, typer.Option("--renumber", help="Give versions whose number is taken the next free one.")
    ] = False,
    why: Why = "",
    registry: Where = "",
) -> None:
    """Bring the versions of a bundle here: every byte and every manifest is checked first, and it is all or none.

    **Example**

    `lorchestra registry import clinic.bundle --why "from the lab"`
    """
    from lorchestra.registry.transport.bundle import import_bundle

    with opened(registry) as held:
        found = import_bundle(held, bundle, renumber=renumber, why=why, reporter=make_reporter())
    for one in found:
        reference = one.version.reference
        told = "is new" if one.new else "was there already"
        typer.echo(f"{reference} {told}" + (f" (it was {one.was})" if one.was != reference else ""))


def backup(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The backup, a new file.")],
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """The whole registry in one file, as it is at one moment, while it is in use.

    **Example**

    `lorchestra registry backup -o backups/$(date +%F).backup`
    """
    from lorchestra.registry.transport.backup import backup as write

    with opened(registry) as held:
        found = write(held, output, reporter=make_reporter())
    _kept(found, f"are in {output}", as_json)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    why: Why = "",
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """Make the registry of a backup again, in an empty place: the same ids, history and aliases, in either database.

    **Example**

    `lorchestra registry restore backups/2026-03-15.backup --registry ~/adapters-restored`
    """
    from lorchestra.registry.transport.backup import restore as read

    if not registry:
        raise UserError("restore where? Add --registry URL: a new directory, or a database that is empty")
    found = read(file, registry, why=why, reporter=make_reporter())
    _kept(found, "are restored", as_json)


def _kept(found: Backup, where: str, as_json: bool) -> None:
    if as_json:
        printed(asdict(found))
        return
    typer.echo(
        f"{counted(found.versions, 'version')}, {counted(found.generation, 'line')} of history and "
        f"{counted(found.blobs, 'blob')} ({size(found.bytes)}) {where}"
    )
