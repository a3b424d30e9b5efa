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
from lorchestra.errors import RecipeError
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import write_json
from lorchestra.report.sweep import render_sweep
from lorchestra.report.values import metric_name
from lorchestra.sweep.advice import Advice, advise
from lorchestra.sweep.cells import (
    Cell,
    cells,
    condition,
    grid,
    is_of_stage,
    recipe_of,
    setting_key,
    stage_name,
    tuning_cells,
)
from lorchestra.sweep.executors import Executor, check_executor, executor
from lorchestra.sweep.halving import halved
from lorchestra.sweep.outcome import HeldOut, Outcome
from lorchestra.sweep.place import held
from lorchestra.sweep.spec import DATA_KEYS, SweepSpec
from lorchestra.sweep.table import Row, grouped, row_of
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
        readings: how often the sealed test has been read, by this sweep and by anything else.
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
    readings: int
    page: Path

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: ``sweep.json``."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "folds": self.folds,
            "tuned": [{"settings": json.loads(key), "kept": dict(kept)} for key, kept in self.tuned.items()],
            "rows": [row.as_dict() for row in self.rows],
            "advice": [{"data": dict(data), **found.as_dict()} for data, found in self.advice],
            "readings": self.readings,
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
    inside: Reporter | None = None,
    wait: bool = False,
) -> SweepResult:
    """Carry out a sweep; finished cells are reused, an unfinished one goes on where it stopped.

    Args:
        spec: see :meth:`SweepSpec.load`.
        directory: of the results; ``sweeps/<name>`` under the working directory by default.
        kind: ``local`` or ``ray``.
        jobs: cells at a time.
        reporter: progress.
        inside: progress within a cell; ``reporter`` unless given.
        wait: wait for another sweep in the same directory instead of refusing.

    Raises:
        UserError: something in the specification, the recipe, its sources or its data is to be mended.
        TrainingError: a law did not hold.
        StorageError: the disk is full or cannot be written.
    """
    check_executor(kind)
    _check(spec)
    where = (directory or Path("sweeps") / spec.name).resolve()
    with held(where, "cells", reporter, inside, wait) as (journal, quiet):
        return _Sweep(spec, where, kind, jobs, journal, quiet).go()


def _check(spec: SweepSpec) -> None:
    """Every cell's recipe, before anything is fetched."""
    for settings in grid({**spec.axes, **spec.tune}):
        try:
            recipe_of(spec, Cell(settings, 0)).check_sources()
        except RecipeError as error:
            raise RecipeError(str(error).replace("--set ", "")) from None


class _Sweep:
    def __init__(
        self, spec: SweepSpec, directory: Path, kind: str, jobs: int, reporter: Reporter, inside: Reporter
    ) -> None:
        self.spec = spec
        self.directory = directory
        self.kind, self.jobs = kind, jobs
        self.reporter, self.inside = reporter, inside
        self.found: dict[Cell, Outcome] = {}
        self.rows: dict[str, Row] = {}  # setting → its row

    def go(self) -> SweepResult:
        spec = self.spec
        worker = Worker(spec, None, self.reporter, self.inside)
        first = cells(spec)[0]
        prepared = worker.prepared(first)
        for line in prepared.check.warnings:
            self.reporter.say(f"warning: {line}")
        parts = prepared.data[stage_name(spec, prepared.recipe)].splits.parts()
        worker.folds = folds = self._folds(sum(len(examples) for _, examples in parts))
        worker.check([cell for cell in cells(spec, None, folds) if cell.seed == spec.seeds[0]])
        worker.begin(first)
        with executor(self.kind, worker, self.jobs, self.reporter) as run:
            tuned = self._tune(run, worker) if spec.tune else {}
            todo = cells(spec, tuned, folds)
            work = [Work(cell) for cell in todo]
            for cell, outcome in self._told(f"sweep {spec.name}", halved(work, spec.halving, run), len(todo)):
                self.found[cell] = outcome
                self._write(todo, tuned, folds, cell)
                if outcome.state == "stopped":
                    worker.forget(outcome)
        start = worker.start(first) if folds is None and all(map(_leaves_the_start, spec.axes)) else None
        return self._write(todo, tuned, folds, todo[0], start, worker.readings(first))

    def _folds(self, examples: int) -> int | None:
        """K, or ``None`` for the recipe's split; ``examples`` are all there are before any split."""
        if self.spec.folds != "auto":
            return self.spec.folds
        from lorchestra.recipe.suggestions import suggest_folds

        found = suggest_folds(examples)
        self.reporter.say(f"folds: {found.said}")
        return None if found.value is None else int(found.value)

    def _tune(self, run: Executor[Work, Outcome], worker: Worker) -> dict[str, dict[str, Any]]:
        """Setting → the values of its tuned keys with the lowest validation loss; the test is not read for it.

        With halving the candidates of one setting compete with each other alone, so that every setting keeps one.
        """
        spec = self.spec
        tried: dict[str, list[tuple[Outcome, dict[str, Any]]]] = {}
        todo = [Work(cell, judged=False) for cell in tuning_cells(spec, worker.folds)]
        found = halved(todo, spec.halving, run, apart=list(spec.axes))
        for cell, outcome in self._told(f"tune {spec.name}", found, len(todo)):
            key = setting_key({name: cell.settings[name] for name in spec.axes})
            tried.setdefault(key, []).append((outcome, {name: cell.settings[name] for name in spec.tune}))
        kept = {}
        for key, candidates in tried.items():
            # Where all diverged the first value stands for them: the table says so.
            best, kept[key] = min(candidates, key=lambda candidate: _rank(candidate[0]))
            for outcome, _ in candidates:
                if outcome.digest != best.digest:
                    worker.forget(outcome)
        return {setting_key(settings): kept[setting_key(settings)] for settings in grid(spec.axes)}

    def _told(self, name: str, found: Iterator[tuple[Cell, Outcome]], total: int) -> Iterator[tuple[Cell, Outcome]]:
        with self.reporter.task(name, total, "cell") as task:
            for number, (cell, outcome) in enumerate(found, start=1):
                self.reporter.event("cell", number=number, total=total, **_brief(outcome))
                self.reporter.say(f"{number}/{total} {cell.name}: {_line(outcome)}")
                task.advance()
                yield cell, outcome

    def _write(
        self,
        todo: Sequence[Cell],
        tuned: Mapping[str, Mapping[str, Any]],
        folds: int | None,
        last: Cell,
        start: HeldOut | None = None,
        readings: int = 0,
    ) -> SweepResult:
        """Results so far, ``last`` being the cell that came in; the same finished cells give the same files."""
        outcomes = tuple(self.found[cell] for cell in todo if cell in self.found)
        axes = list(self.spec.axes)
        groups = grouped(outcomes, axes)
        mine = setting_key({key: last.settings[key] for key in axes})
        self.rows[mine] = row_of(groups[mine], axes, folds)
        table = [self.rows[key] for key in groups]
        found = tuple(_advice(table, outcomes))
        page = self.directory / "sweep.html"
        result = SweepResult(
            self.directory, self.spec, folds, tuned, outcomes, start, tuple(table), found, readings, page
        )
        made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "lorchestra": version("lorchestra")}
        told = {**made, "cells_in_all": len(todo), **result.as_dict()}
        write_json(self.directory / "sweep.json", told)
        write_whole(page, render_sweep(told))
        return result


def _rank(outcome: Outcome) -> tuple[bool, int, float]:
    """Finished trainings come first, then those that went further, then lower losses."""
    loss = outcome.validation_loss
    if outcome.state == "diverged" or loss is None:
        return True, 0, 0.0
    return outcome.state != "done", -outcome.step if outcome.state == "stopped" else 0, loss


def _leaves_the_start(key: str) -> bool:
    """Whether all values of an axis start from the same base and context."""
    return is_of_stage(key) or key in DATA_KEYS


def _advice(table: Sequence[Row], outcomes: Sequence[Outcome]) -> Iterator[tuple[Mapping[str, Any], Advice]]:
    """One for every condition of the data: losses with more noise or fewer examples are not compared with others."""
    conditions: dict[str, list[Row]] = {}
    for row in table:
        conditions.setdefault(setting_key(condition(row.settings)), []).append(row)
    for key, group in conditions.items():
        mine = [outcome for outcome in outcomes if group[0].settings.items() <= outcome.settings.items()]
        examples = dict(mine[0].examples or {})
        if mine[0].fold is not None:  # the folds of a seed make up one test
            examples["test"] = sum(
                (found.examples or {}).get("test", 0) for found in mine if found.seed == mine[0].seed
            )
        yield json.loads(key), advise(group, examples)


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
        parts.append(f"test {metric_name(outcome.test.metric)} {outcome.test.score:.3f}")
    return ", ".join([*parts, f"{outcome.seconds:.0f} s"])
