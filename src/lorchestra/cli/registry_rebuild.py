"""``lorchestra registry rebuild``: recipes on record, carried out on a new base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.cli.completion import models
from lorchestra.cli.options import Json
from lorchestra.cli.registry_options import Where, opened, printed, references
from lorchestra.errors import Interrupted, UserError, counted

if TYPE_CHECKING:
    from lorchestra.pipeline.rebuilding import Rebuilt


def rebuild(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="References, or patterns as 'med_*'.",
            autocompletion=references,
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str, typer.Option("--base", metavar="NEW", help="The new base, a source.", autocompletion=models)
    ] = "",
    on: Annotated[
        str, typer.Option("--on", metavar="OLD", help="Only what stands on this base: its name or weights' digest.")
    ] = "",
    tag: Annotated[str, typer.Option("--tag", metavar="TAG", help="Only what has this tag.")] = "",
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Where the recipes lay: their relative paths are found from there.",
            show_default="the working directory",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the runs go.", show_default="runs/rebuilt")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Rebuilds at a time; each holds a base.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look whether it can be done.")] = False,
    registry: Where = "",
    as_json: Json = False,
) -> None:
    """Carry out the recipes on record of versions on a new base; compare, and push candidates.

    The data must be what it was, and the sealed test the same. No alias is moved. What fails does not stop the others.

    **Examples**

    `lorchestra registry rebuild clinic --base hf:org/new-base --from recipes/clinic --dry-run`

    `lorchestra registry rebuild 'med_*' --on models/old-base --base models/new-base --jobs 2`
    """
    if not base:
        raise UserError("which base? Add --base NEW: a model directory, or hf:org/name")
    where = (source or Path()).resolve()
    if not where.is_dir():
        raise UserError(f"--from {source}: there is no such directory; it is where the recipes lay")
    with opened(registry) as held:
        from lorchestra.pipeline.rebuilding import selected

        versions = selected(held, names or (), tag, _absolute(on))
    from lorchestra.cli.progress import make_reporter, within
    from lorchestra.pipeline.rebuilding import Rebuilder
    from lorchestra.sweep.executors import executor

    reporter = make_reporter()
    runs = (run_dir or Path("runs") / "rebuilt").resolve()
    inside = reporter if len(versions) == 1 else within(reporter)
    worker = Rebuilder(registry, _absolute(base), where, runs, dry_run, inside)
    found: dict[str, Rebuilt] = {}
    try:
        with (
            executor("local", worker, min(jobs, len(versions)), reporter) as run,
            reporter.task("versions", len(versions), "version") as task,
        ):
            for piece, outcome in run.run(versions):
                found[piece] = outcome
                task.advance()
    except KeyboardInterrupt:
        raise Interrupted("stopped; what is finished is kept, and the same command goes on from there") from None
    outcomes = [found[version] for version in versions]
    if as_json:
        printed([outcome.as_dict() for outcome in outcomes])
    else:
        _show(outcomes)
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _absolute(source: str) -> str:
    """A path of this directory for recipes that lie elsewhere; anything else as it is."""
    return os.path.abspath(Path(source).expanduser()) if source and Path(source).expanduser().exists() else source


def _show(outcomes: list[Rebuilt]) -> None:
    from rich.table import Table

    from lorchestra.cli.terminal import console

    out = console(markup=False)
    table = Table("version", "candidate", "loss", "difference", "verdict", box=None, padding=(0, 2, 0, 0))
    for outcome in outcomes:
        compared, cells = outcome.compared, ["", "", ""]
        if compared is not None:
            change = compared.difference
            cells = [
                f"{compared.before:.3f} → {compared.after:.3f}",
                f"{change.estimate:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
                compared.said,
            ]
        elif outcome.state != "done":
            cells[2] = outcome.state
        table.add_row(outcome.version, outcome.candidate, *cells)
    out.print(table)
    for outcome in outcomes:
        for text in (outcome.reason, *outcome.remarks):
            if text:
                out.print(f"{outcome.version}: {text}", soft_wrap=True)
    if any(outcome.compared for outcome in outcomes):
        out.print("loss: nats a token on the sealed test, lower is better; differences with 95 % intervals")
    done = sum(outcome.state == "done" for outcome in outcomes)
    if done:
        out.print(f"{counted(done, 'candidate')} pushed, no alias moved; `lorchestra registry promote` moves one")
