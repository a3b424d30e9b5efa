"""``lorchestra registry init|push|pull``: into a registry, and out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorchestra.cli.completion import adapters
from lorchestra.cli.options import number
from lorchestra.cli.registry_options import Ref, Where, Why, names, opened, short
from lorchestra.errors import UserError, counted


def init(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Where; else --registry.", show_default=False)] = "",
    registry: Where = "",
) -> None:
    """Make a registry: a catalog and the room for its weights. One that is there stays as it is.

    **Examples**

    `lorchestra registry init ~/adapters`

    `lorchestra registry init "postgresql://user:password@host/db?blobs=s3://bucket/adapters"`
    """
    with opened(url or registry, create=True) as held:
        typer.echo(f"registry {held.location.shown}: {counted(len(held.names()), 'name')}")


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter directory.", autocompletion=adapters)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called.", autocompletion=names)],
    alias: Annotated[str, typer.Option("--alias", metavar="ALIAS", help="Point this alias at it.")] = "",
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="What is to be known of it.")] = "",
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="To find it by. Repeat.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME=VALUE",
            help="loss=1.2, or loss=1.2[1.1,1.3] with its interval; +name=0.9 where higher is better. Repeat.",
        ),
    ] = None,
    why: Why = "",
    registry: Where = "",
) -> None:
    """Keep an adapter: its files by content, its manifest as the next version of NAME.

    The same weights under the same name are the version that is there already. A full name says version and tags
    itself: `medical_diagnosis_v2_20250315`.

    **Examples**

    `lorchestra registry push runs/clinic/final clinic --note "more notes of 2025"`

    `lorchestra registry push adapters/terms clinic --metric loss=1.21[1.18,1.24] --tag sft --alias staging`
    """
    from lorchestra.registry.naming import almost

    measured = dict(_metric(text) for text in metric or ())
    with opened(registry) as held:
        before = held.generation()  # ids are those of the audit log
        version = held.push(
            directory, name, note=note, tags=tuple(tag or ()), metrics=measured or None, alias=alias, why=why
        )
        there = "was there already: the same weights" if version.id <= before else "is new"
        typer.echo(f"{version.manifest.reference} {there} ({short(version.manifest.digest)})")
        if alias:
            typer.echo(f"{version.manifest.name}@{alias} → {version.manifest.reference}")
        if version.id > before and (why_plain := almost(name)):
            typer.echo(f"note: {name} is kept as a plain name, version and all; {why_plain}", err=True)


def pull(
    ref: Ref,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write it.")],
    registry: Where = "",
) -> None:
    """Write a version as an adapter directory, every byte as it was pushed, verified.

    **Example**

    `lorchestra registry pull clinic@production -o adapters/clinic`
    """
    with opened(registry) as held:
        version = held.pull(ref, output)
        typer.echo(f"{version.manifest.reference} ({short(version.manifest.digest)}) is in {output}")


def _metric(text: str) -> tuple[str, Any]:
    from lorchestra.registry.describing import direction
    from lorchestra.registry.manifest import Metric

    context = f"--metric {text!r}: write NAME=VALUE, as in loss=1.2, loss=1.2[1.1,1.3] or +accuracy=0.9"
    name, sign, rest = text.partition("=")
    value, bracket, interval = rest.partition("[")
    low, comma, high = interval.removesuffix("]").partition(",")
    if not sign or not name.strip("+ ") or (bracket and not (comma and interval.endswith("]"))):
        raise UserError(context)
    bounds = (number(low, context), number(high, context)) if bracket else (None, None)
    if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
        raise UserError(f"{context}; the interval [{low}, {high}] ends before it begins")
    return name.strip("+ "), Metric(
        value=number(value, context),
        low=bounds[0],
        high=bounds[1],
        better="higher" if name.startswith("+") else direction(name),
    )
