"""A sweep: specification → tuned keys → cells → table, recommendation, page; what is finished is not done again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorchestra.base.home import write_whole
from lorchestra.errors import Interrupted, RecipeError
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import run_lock, storage, write_json
from lorchestra.pipeline.cache import sweep as tidy
from lorchestra.pipeline.journal import Journal
from lorchestra.report.sweep import render_sweep
from lorchestra.sweep.advice import Advice, advise
from lorchestra.sweep.cells import Cell, cells, grid, recipe_of, setting_key, stage_name, tuning_cells
from lorchestra.sweep.executors import Executor, executor
from lorchestra.sweep.halving import halved
from lorchestra.sweep.outcome import HeldOut, Outcome
from lorchestra.sweep.spec import DATA_KEYS, SweepSpec
from lorchestra.sweep.table import Row, rows
from lorchestra.sweep.worker import Work, Worker


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    Args:
        directory: ``sweep.json``, ``sweep.html``, ``events.jsonl``.
        spec: as asked.
        folds: K of a cross-validation.
        tuned: setting → what its tuned keys were set to.
        outcomes: of every cell.
        start: test scores of base and context.
        rows: one a setting.
        advice: one for every condition of the data (sizes, noise, imbalance).
        page: ``sweep.html``.
    """

    directory: Path
    spec: SweepSpec
    folds: int | None
    tuned: Mapping[str, Mapping[str, Any]]
    outcomes: tuple[Outcome, ...]
    start: HeldOut | None
    rows: tuple[Row, ...]
    advice: tuple[tuple[Mapping[str, Any], Advice], ...]
    page: Path

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: ``sweep.json``."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "folds": self.folds,
            "tuned": [{"settings": json.loads(key), "kept": dict(kept)} for key, kept in self.tuned.items()],
            "rows": [row.as_dict() for row in self.rows],
            "advice": [{"data": dict(data), **found.as_dict()} for data, found in self.advice],
            "start": asdict(self.start) if self.start else None,
            "cells": [outcome.as_dict() for outcome in self.outcomes],
        }


def run_sweep(
    spec: SweepSpec,
    *,
    directory: Path | None = None,
    kind: str = "local",
    jobs: int = 1,
    reporter: Reporter = SILENT,
    wait: bool = False,
) -> SweepResult:
    """Carry out a sweep; finished cells are reused, an unfinished one goes on where it stopped.

    Args:
        spec: see :meth:`SweepSpec.load`.
        directory: of the results; ``sweeps/<name>`` under the working directory by default.
        kind: ``local`` or ``ray``.
        jobs: cells at a time.
        reporter: progress.
        wait: wait for another sweep in the same directory instead of refusing.

    Raises:
        UserError: something in the specification, the recipe, its sources or its data is to be mended.
        TrainingError: a law did not hold.
        StorageError: the disk is full or cannot be written.
    """
    _check(spec)
    where = (directory or Path("sweeps") / spec.name).resolve()
    with storage(where), run_lock(where, wait, reporter.say):
        tidy(where)
        journal = Journal(reporter, where / "events.jsonl")
        try:
            return _Sweep(spec, where, kind, jobs, journal).go()
        except KeyboardInterrupt:
            raise Interrupted("stopped; finished cells are kept, and the same command goes on from there") from None
        finally:
            journal.close()


def _check(spec: SweepSpec) -> None:
    """Every cell's recipe, before anything is fetched."""
    for settings in grid({**spec.axes, **spec.tune}):
        try:
            recipe_of(spec, Cell(settings, 0)).check_sources()
        except RecipeError as error:
            raise RecipeError(str(error).replace("--set ", "")) from None


class _Sweep:
    def __init__(self, spec: SweepSpec, directory: Path, kind: str, jobs: int, reporter: Reporter) -> None:
        self.spec = spec
        self.directory = directory
        self.kind, self.jobs = kind, jobs
        self.reporter = reporter
        self.found: dict[Cell, Outcome] = {}

    def go(self) -> SweepResult:
        spec = self.spec
        worker = Worker(spec, None, self.reporter)
        first = cells(spec)[0]
        prepared = worker.prepared(first)
        stage = stage_name(spec, prepared.recipe)
        for line in prepared.check.warnings:
            self.reporter.say(f"warning: {line}")
        folds = self._folds(len(prepared.data[stage].splits.train))
        worker.folds = folds
        with executor(self.kind, worker, self.jobs, self.reporter) as run:
            tuned = self._tune(run, folds) if spec.tune else {}
            todo = cells(spec, tuned, folds)
            for cell, outcome in self._told(halved(todo, spec.halving, run, self.reporter), len(todo)):
                self.found[cell] = outcome
                self._write(todo, tuned, folds, None)
        start = worker.start(todo[0]) if folds is None else None
        return self._write(todo, tuned, folds, start)

    def _folds(self, examples: int) -> int | None:
        if self.spec.folds != "auto":
            return self.spec.folds
        from lorchestra.recipe.suggestions import suggest_folds

        found = suggest_folds(examples)
        self.reporter.say(f"folds: {found.value or 'none'} ({found.reason})")
        return None if found.value is None else int(found.value)

    def _tune(self, run: Executor[Work, Outcome], folds: int | None) -> dict[str, dict[str, Any]]:
        """Setting → the values of its tuned keys with the lowest validation loss."""
        spec, best = self.spec, dict[str, tuple[float, dict[str, Any]]]()
        todo = tuning_cells(spec, folds)
        for cell, outcome in self._told(halved(todo, spec.halving, run, self.reporter), len(todo)):
            key = setting_key({name: cell.settings[name] for name in spec.axes})
            tried = {name: cell.settings[name] for name in spec.tune}
            loss = outcome.validation_loss if outcome.state == "done" else None
            if loss is not None and loss < best.get(key, (float("inf"), {}))[0]:
                best[key] = loss, tried
        kept = {key: tried for key, (_, tried) in best.items()}
        for settings in grid(spec.axes):  # all diverged: the first value stands for them
            kept.setdefault(setting_key(settings), {key: values[0] for key, values in spec.tune.items()})
        return kept

    def _told(self, found: Iterator[tuple[Cell, Outcome]], total: int) -> Iterator[tuple[Cell, Outcome]]:
        with self.reporter.task(f"sweep {self.spec.name}", total, "cell") as task:
            for number, (cell, outcome) in enumerate(found, start=1):
                self.reporter.event("cell", number=number, total=total, **_brief(outcome))
                self.reporter.say(f"{number}/{total} {cell.name}: {_line(outcome)}")
                task.advance()
                yield cell, outcome

    def _write(
        self, todo: Sequence[Cell], tuned: Mapping[str, Mapping[str, Any]], folds: int | None, start: HeldOut | None
    ) -> SweepResult:
        """Results so far; the same finished cells give the same files."""
        outcomes = tuple(self.found[cell] for cell in todo if cell in self.found)
        table = rows(outcomes, list(self.spec.axes))
        found = tuple(_advice(table, outcomes))
        page = self.directory / "sweep.html"
        result = SweepResult(self.directory, self.spec, folds, tuned, outcomes, start, tuple(table), found, page)
        made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "lorchestra": version("lorchestra")}
        told = {**made, "cells_in_all": len(todo), **result.as_dict()}
        write_json(self.directory / "sweep.json", told)
        write_whole(page, render_sweep(told))
        return result


def _advice(table: Sequence[Row], outcomes: Sequence[Outcome]) -> Iterator[tuple[Mapping[str, Any], Advice]]:
    """One for every condition of the data: losses with more noise or fewer examples are not compared with others."""
    conditions: dict[str, list[Row]] = {}
    for row in table:
        conditions.setdefault(setting_key(_data(row.settings)), []).append(row)
    for key, group in conditions.items():
        data = json.loads(key)
        mine = [outcome for outcome in outcomes if setting_key(_data(outcome.settings)) == key]
        yield data, advise(group, dict(mine[0].examples or {}))


def _data(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in DATA_KEYS}


def _brief(outcome: Outcome) -> dict[str, Any]:
    return {
        "settings": dict(outcome.settings),
        "seed": outcome.seed,
        "fold": outcome.fold,
        "state": outcome.state,
        "validation_loss": outcome.validation_loss,
        "test": outcome.test.score if outcome.test else None,
        "seconds": round(outcome.seconds, 2),
    }


def _line(outcome: Outcome) -> str:
    if outcome.state == "diverged":
        return f"diverged at step {outcome.step}"
    if outcome.state == "stopped":
        return f"stopped after {outcome.step} of {outcome.steps} steps"
    parts = [] if outcome.validation_loss is None else [f"validation loss {outcome.validation_loss:.3f}"]
    if outcome.test is not None:
        parts.append(f"test {outcome.test.metric.replace('_', ' ')} {outcome.test.score:.3f}")
    return ", ".join([*parts, f"{outcome.seconds:.0f} s"])
