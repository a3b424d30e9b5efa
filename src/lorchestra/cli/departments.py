"""``lorchestra run`` and ``plan RECIPE --matrix departments.csv``: one last stage a row, one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorchestra.cli.terminal import console
from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.sweep.matrix.execute import MatrixResult
    from lorchestra.sweep.matrix.outcome import Outcome
    from lorchestra.sweep.matrix.plan import MatrixPlan, PlannedDepartment


def run_departments(
    recipe: Path,
    table: Path,
    overrides: list[str] | None,
    run_dir: Path | None,
    executor: str,
    jobs: int,
    wait: bool,
    as_json: bool,
) -> None:
    """Carry out the matrix and show it; exit code 1 if a department could not be delivered."""
    from lorchestra.sweep.executors import check_executor

    check_executor(executor)
    from lorchestra.sweep.matrix.rows import Matrix

    matrix = Matrix.load(table, recipe, overrides or ())
    from lorchestra.cli.progress import make_reporter, within
    from lorchestra.sweep.matrix.execute import run_matrix

    reporter = make_reporter()
    reporter.say(f"{table.name}: {counted(len(matrix.departments), 'department')}, each with its own {matrix.stage!r}")
    result = run_matrix(
        matrix, directory=run_dir, kind=executor, jobs=jobs, reporter=reporter, inside=within(reporter), wait=wait
    )
    if as_json:
        typer.echo(json.dumps({"directory": str(result.directory), **result.as_dict()}, indent=2, ensure_ascii=False))
    else:
        _show(result)
    if result.failed or result.unpublished:
        raise typer.Exit(1)


def plan_departments(recipe: Path, table: Path, overrides: list[str] | None, as_json: bool) -> None:
    """Show what the matrix would do; exit code 1 if a department could not be delivered as it is."""
    from lorchestra.sweep.matrix.rows import Matrix

    matrix = Matrix.load(table, recipe, overrides or ())
    from lorchestra.sweep.matrix.plan import plan_matrix

    found = plan_matrix(matrix)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _show_plan(found)
    if found.failed:
        raise typer.Exit(1)


def _show_plan(found: MatrixPlan) -> None:
    from rich.padding import Padding

    from lorchestra.cli.recipe_view import plain_table, show_steps, show_total

    out = console(markup=False)
    marked = console()
    show_steps(marked, found.plan, found.plan.steps[: found.shared], "`lorchestra run` does, or put it there")
    columns = ("department", "state", "examples", "rank", "steps", "trainable", "time", "memory", "remarks")
    marked.print(plain_table(columns, [_planned(row) for row in found.departments], left=2))
    out.print()
    for row in found.departments:
        for line in row.note.splitlines() if row.state != "trained" else ():
            out.print(Padding(f"{row.name}: {line}", (0, 0, 0, 2), expand=False))
    if any(row.warnings for row in found.departments):
        out.print("warnings about the data: with --json, and with the run")
    for line in found.left_out:
        out.print(f"note: {line}")
    show_total(marked, found.plan)


def _planned(row: PlannedDepartment) -> tuple[str, ...]:
    from rich.markup import escape

    from lorchestra.cli.recipe_view import STATES, about, count, gigabytes

    state = f"[{STATES[row.state]}]{row.state}[/]" if row.state in STATES else row.state
    look = row.outlook
    seen = ("", "", "", "")
    if look is not None:
        rank = "from the examples" if look.rank is None else str(look.rank)
        seen = (count(look.examples.get("train")), rank, count(look.steps), count(look.trainable))
    time = "" if row.seconds is None else "–" if row.state in ("cached", "diverged") else about(row.seconds)
    remarks = counted(len(row.warnings), "warning") if row.warnings else ""
    return (escape(row.name), state, *seen, time, gigabytes(row.memory), remarks)


def _show(result: MatrixResult) -> None:
    from rich.table import Table

    from lorchestra.report.values import metric_name

    out = console(markup=False)
    metrics = list(dict.fromkeys(outcome.test.metric for outcome in result.outcomes if outcome.test))
    shared = ("shared",) if result.context else ()
    tested = ("base", *shared, "delivered", f"over {'shared' if result.context else 'base'}") if metrics else ()
    table = Table("department", "examples", "validation", *tested, "parameters", "time", "remarks", box=None)
    for outcome in result.outcomes:
        row = [outcome.name, f"{outcome.examples['train']:,}" if outcome.examples else "", _validation(outcome)]
        row += _test(outcome, result.context, len(metrics) > 1) if metrics else []
        row += [f"{outcome.trainable:,}" if outcome.trainable else "", _time(outcome)]
        told = [_brief(text) for text in result.remarks[outcome.name]]
        row.append("; ".join([outcome.state, *told] if outcome.state != "done" else told))
        table.add_row(*row)
    out.print(table)
    if metrics:
        names = " or ".join(map(metric_name, metrics))
        lower = ", lower is better" if metrics == ["nll"] else ""
        out.print(f"base, delivered: {names} on the department's sealed test{lower}; intervals are 95 %")
    done = len(result.outcomes) - len(result.failed)
    if any(outcome.warnings for outcome in result.outcomes):
        out.print("warnings about the data are on the page and in departments.json")
    out.print(f"{done} of {counted(len(result.outcomes), 'department')} delivered")
    if result.published or result.unpublished:
        out.print(f"{len(result.published)} of {counted(len(result.outcomes), 'department')} published")
    out.print(f"adapters: {result.directory / 'departments'}")
    out.print(f"page: {result.page}")


def _validation(outcome: Outcome) -> str:
    if outcome.before is None or outcome.after is None:
        return "–" if outcome.state == "done" else ""
    return f"{outcome.before:.3f} → {outcome.after:.3f}"


def _test(outcome: Outcome, context: bool, named: bool) -> list[str]:
    from lorchestra.report.values import metric_name

    test = outcome.test
    if test is None:
        return ["–" if outcome.state == "done" else ""] * (4 if context else 3)
    delivered, over = test.models["delivered"], test.over_shared if context else test.over_base
    metric = f" ({metric_name(test.metric)})" if named else ""
    models = [f"{test.models['base'].estimate:.3f}{metric}"]
    models += [f"{test.models['shared'].estimate:.3f}"] if context else []
    return [
        *models,
        f"{delivered.estimate:.3f} [{delivered.low:.3f}, {delivered.high:.3f}]",
        f"{over.estimate:+.3f} [{over.low:+.3f}, {over.high:+.3f}]",
    ]


def _time(outcome: Outcome) -> str:
    from lorchestra.cli.progress import duration

    return duration(outcome.seconds) if outcome.state == "done" else ""


def _brief(text: str) -> str:
    """The first line, cut where it is long: all of it is on the page and in ``departments.json``."""
    line = text.splitlines()[0]
    return line if len(line) <= 160 else line[:159] + "…"
