"""``lorchestra registry feedback export``: what people said of answers, as data for the next stage."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from lorchestra.cli.options import either_dash
from lorchestra.cli.registry_options import Where, names, opened
from lorchestra.cli.verbs import Verb, Verbs
from lorchestra.errors import UserError, counted

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": either_dash},
    help="What people said of answers.",
)


@app.callback()
def feedback() -> None:
    """What people said of answers."""


@app.command(cls=Verb)
def export(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="For the pairs, .jsonl.")],
    singles: Annotated[
        Path | None, typer.Option("--singles", metavar="FILE", help="For scored answers that are in no pair, .jsonl.")
    ] = None,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Of one adapter alone.", autocompletion=names)
    ] = "",
    since: Annotated[str, typer.Option("--since", metavar="DATE", help="Given on that day or later.")] = "",
    registry: Where = "",
) -> None:
    """Write feedback as preference data: two answers to one prompt of which one was liked better.

    The pairs are data for a `dpo` stage; the singles for an `sft` stage, with `where: score >= 0.5`. Prompts are there
    only where the server logs them.

    **Example**

    `lorchestra registry feedback export -o pairs.jsonl --singles singles.jsonl --name clinic --since 2026-03-01`
    """
    from lorchestra.registry.canary.feedback import export as write

    if singles is not None and singles.absolute() == output.absolute():
        raise UserError(f"-o and --singles are both {output}; give each a file of its own")
    with opened(registry) as held:
        found = write(held, output, singles, name=name, since=_day(since))
    typer.echo(f"{output}: {counted(found.pairs, 'pair')}")
    if singles is not None:
        typer.echo(f"{singles}: {counted(found.singles, 'scored answer')}")
    elif found.singles:
        typer.echo(f"note: {counted(found.singles, 'scored answer')} in no pair; --singles FILE writes them", err=True)
    if found.without_prompt:
        typer.echo(
            f"note: {counted(found.without_prompt, 'opinion')} of answers whose prompts were not logged; "
            "the server keeps them with --log-prompts",
            err=True,
        )


def _day(text: str) -> datetime | None:
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"--since {text!r} is no time; write 2026-03-15 or 2026-03-15T12:00:00+00:00") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
