"""``lorchestra sweep``: one stage trained over and over, to see which settings hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli import terminal
from lorchestra.cli.completion import among, recipes
from lorchestra.cli.options import Json
from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.sweep.execute import SweepResult
    from lorchestra.sweep.table import Row

EXECUTORS = ("local", "ray")


def sweep(
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC",
            help="A specification in YAML, or a recipe: its last stage over four ranks.",
            show_default=False,
            autocompletion=recipes,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the specification, as in seeds=5. Repeat."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", "-o", metavar="DIR", help="Where results go.", show_default="sweeps/NAME"),
    ] = None,
    executor: Annotated[
        str,
        typer.Option("--executor", help="local, or ray: a cluster (RAY_ADDRESS).", autocompletion=among(*EXECUTORS)),
    ] = "local",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Trainings at a time; each holds the base.")] = 1,
    wait: Annotated[bool, typer.Option("--wait", help="If the directory is in use, wait for it.")] = False,
    as_json: Json = False,
) -> None:
    """Train one stage with every combination of settings and seeds; say which to take, and what that rests on.

    Prints rank → stability, test score with interval, overfitting, parameters, time (or whatever the axes are).
    Finished trainings are kept and reused. Stopped at any moment, the same command goes on from there.

    **Examples**

    `lorchestra sweep recipe.yaml` (ranks 4, 8, 16, 32 with three seeds each)

    `lorchestra sweep ranks.yaml --jobs 2 -o sweeps/ranks`

    `lorchestra sweep recipe.yaml --set 'axes={lora.rank: [4, 8], data.noise: [0, 0.2]}' --set seeds=5`
    """
    from lorchestra.sweep.spec import SweepSpec

    loaded = SweepSpec.load(spec, overrides or ())
    from lorchestra.cli.progress import make_reporter, within
    from lorchestra.sweep.execute import run_sweep

    reporter = make_reporter()
    result = run_sweep(
        loaded, directory=output_dir, kind=executor, jobs=jobs, reporter=reporter, inside=within(reporter), wait=wait
    )
    if as_json:
        told = {key: value for key, value in result.as_dict().items() if key not in ("cells", "start")}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    _show(result)


def _show(result: SweepResult) -> None:
    from rich.table import Table

    from lorchestra.report.values import metric_name
    from lorchestra.sweep.cells import called

    console = terminal.console(markup=False)
    axes = list(result.spec.axes)
    metric = metric_name(next((row.metric for row in result.rows if row.metric), ""))
    table = Table(
        *(axis.rpartition(".")[2] for axis in axes), "runs", "validation", "over seeds", "gradient", "over seeds",
        *((f"test {metric}", "95 %") if metric else ()), "gap", "rises", "parameters", "time", box=None,
    )  # fmt: skip
    for row in result.rows:
        table.add_row(*_cells(row, axes, bool(metric)))
    console.print(table)
    if result.start is not None:
        console.print(f"before training: test {metric} {_number(result.start.score, '.3f')}")
    console.print()
    for data, found in result.advice:
        condition = ", ".join(called(data))
        console.print(f"{condition}: {found.sentence}" if condition else found.sentence)
        console.print(found.rests_on)
    if result.readings:
        console.print(f"sealed test: read {counted(result.readings, 'time')} so far, by these trainings and any others")
    console.print(f"page: {result.page}")


def _cells(row: Row, axes: list[str], tested: bool) -> list[str]:
    from lorchestra.cli.progress import duration
    from lorchestra.sweep.cells import worded

    settings: Mapping[str, Any] = row.settings
    runs = f"{row.done}/{row.runs}" + "".join(
        f", {count} {word}" for count, word in ((row.diverged, "diverged"), (row.stopped, "stopped")) if count
    )
    spread = "–" if row.gradient_spread is None else f"± {row.gradient_spread:.0%}"
    test = ["–", ""] if row.test is None else [f"{row.test.estimate:.3f}", f"[{row.test.low:.3f}, {row.test.high:.3f}]"]
    return [
        *(worded(settings[axis]) for axis in axes),
        runs,
        _number(row.validation, ".4f"),
        "–" if row.validation_spread is None else f"± {row.validation_spread:.4f}",
        _number(row.gradient, ".3g"),
        spread,
        *(test if tested else ()),
        _number(row.gap, "+.3f"),
        "–" if not row.done else "no" if row.onset is None else f"from epoch {row.onset:.1f}",
        f"{row.trainable:,}",
        duration(row.seconds) if row.done else "–",
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
