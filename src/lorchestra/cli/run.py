"""``lorchestra run``, ``plan`` and ``check``: what is done with a recipe."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.completion import among, recipes
from lorchestra.cli.options import Json
from lorchestra.errors import Interrupted, UserError, counted

if TYPE_CHECKING:
    from lorchestra.pipeline.execute import RunResult
    from lorchestra.recipe.recipe import Recipe

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe, in YAML; `lorchestra init` writes one.",
        show_default=False,
        autocompletion=recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, as in stages.0.epochs=1 or stages.clinic.lora.rank=4. Repeat for more.",
    ),
]


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Where results go.", show_default="runs/NAME")
    ] = None,
    matrix: Annotated[
        Path | None,
        typer.Option(
            "--matrix",
            metavar="TABLE",
            help="Departments (CSV, a name and data each): the last stage is trained for each of them.",
            show_default=False,
            rich_help_panel="Departments",
        ),
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            help="Where departments are trained: local, or ray (RAY_ADDRESS).",
            autocompletion=among("local", "ray"),
            rich_help_panel="Departments",
        ),
    ] = "local",
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", "-j", min=1, help="Departments at a time; each holds the base.", rich_help_panel="Departments"
        ),
    ] = 1,
    wait: Annotated[bool, typer.Option("--wait", help="If the directory is in use, wait for it.")] = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: train its stages, fuse them, deliver a model and a verdict.

    Finished steps are kept and reused. Stopped at any moment, the same command goes on from there.

    **Examples**

    `lorchestra run recipe.yaml`

    `lorchestra run recipe.yaml --set stages.0.epochs=1 --set fusion.weights=equal --run-dir runs/quick`

    `lorchestra run recipe.yaml --matrix departments.csv --jobs 2`
    """
    if matrix is not None:
        from lorchestra.cli.departments import run_departments

        run_departments(recipe, matrix, overrides, run_dir, executor, jobs, wait, as_json)
        return
    if (executor, jobs) != ("local", 1):
        raise UserError("--executor and --jobs belong to --matrix: a recipe alone trains one stage after the other")
    loaded = _load(recipe, overrides)
    from lorchestra.cli.progress import make_reporter

    reporter = make_reporter()
    reporter.say(f"{loaded.name}: {counted(len(loaded.stages), 'stage')} on {loaded.base}")
    from lorchestra.pipeline.execute import run as execute

    try:
        result = execute(loaded, directory=run_dir, reporter=reporter, wait=wait)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted("stopped; what is finished is kept, and the same command goes on from there") from None
    if as_json:
        typer.echo(json.dumps(_plain(result), indent=2, ensure_ascii=False))
        return
    from lorchestra.cli.recipe_view import show_result

    show_result(result)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    matrix: Annotated[
        Path | None,
        typer.Option("--matrix", metavar="TABLE", help="Departments, as `run` takes them.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what `run` would do: the steps, what is cached, time, memory, trainable parameters.

    Nothing is fetched and nothing is trained. Times and memory are estimates.

    **Examples**

    `lorchestra plan recipe.yaml`

    `lorchestra plan recipe.yaml --set lora.rank=16 --json`

    `lorchestra plan recipe.yaml --matrix departments.csv`
    """
    if matrix is not None:
        from lorchestra.cli.departments import plan_departments

        plan_departments(recipe, matrix, overrides, as_json)
        return
    loaded = _load(recipe, overrides)
    from lorchestra.pipeline.plan import plan as look_ahead

    found = look_ahead(loaded)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    from lorchestra.cli.recipe_view import show_plan

    show_plan(found)


def check(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Look at the data as training will see it: counts, tokens, truncation, leakage, rendered examples.

    Sources are fetched if they are not here; no model weights are loaded.

    **Examples**

    `lorchestra check recipe.yaml`

    `lorchestra check recipe.yaml --set max_length=1024 --json`
    """
    loaded = _load(recipe, overrides)
    from lorchestra.cli.progress import make_reporter, without_lines
    from lorchestra.pipeline.prepare import prepare
    from lorchestra.pipeline.publishing import check_publish
    from lorchestra.recipe.suggestions import plain

    check_publish(loaded)
    prepared = prepare(loaded, without_lines(make_reporter()))
    if as_json:
        found = {
            "recipe": loaded.name,
            "stages": prepared.check.as_dict(),
            "warnings": prepared.check.warnings,
            "suggestions": plain(prepared.suggestions),
        }
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from lorchestra.cli.recipe_view import show_check

    show_check(prepared.check, prepared.suggestions)


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    """The recipe, and whether what it names is there, before the slow imports."""
    from lorchestra.recipe.recipe import Recipe

    loaded = Recipe.load(path, overrides or ())
    loaded.check_sources()
    return loaded


def _plain(result: RunResult) -> dict[str, Any]:
    from lorchestra.recipe.suggestions import plain

    return {
        "directory": os.fspath(result.directory),
        "adapter": os.fspath(result.adapter),
        "merged": os.fspath(result.merged) if result.merged else None,
        "report": os.fspath(result.report),
        "weights": dict(result.weights),
        "verdict": result.verdict,
        "sealed_test_readings": dict(result.readings),
        "digests": dict(result.digests),
        "published": asdict(result.published) if result.published else None,
        "suggestions": plain(result.suggestions),
    }
