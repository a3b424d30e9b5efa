"""Trains cells, one after the other, in one process: the base and the data stay where they are between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorchestra.adapter.digest import json_digest
from lorchestra.errors import DivergedError, PausedError
from lorchestra.evaluate.ledger import Ledger, item_digest
from lorchestra.evaluate.score import Domain
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import step_digest, write_json
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared, prepare
from lorchestra.pipeline.training import Trained
from lorchestra.recipe.recipe import Recipe
from lorchestra.sweep.cells import Cell, recipe_of, stage_name
from lorchestra.sweep.examples import folded, perturbed
from lorchestra.sweep.outcome import HeldOut, Outcome, finite_history
from lorchestra.sweep.spec import DATA_KEYS, SweepSpec
from lorchestra.sweep.trainer import Trainer, sealed_test
from lorchestra.train.stage import StageInputs

Work = tuple[Cell, float | None]  # a cell, and the share of its steps after which it pauses
VERSION = 1  # raise it when the same training would be measured otherwise


class Worker:
    """Runs cells of one sweep.

    Args:
        spec: the specification.
        folds: K of a cross-validation.
        reporter: progress.
    """

    def __init__(self, spec: SweepSpec, folds: int | None = None, reporter: Reporter = SILENT) -> None:
        self.spec = spec
        self.folds = folds
        self.reporter = reporter
        self.trainer = Trainer(reporter)
        self.cache = self.trainer.cache
        self._prepared: dict[str, Prepared] = {}

    def elsewhere(self) -> Callable[[], Worker]:
        """Makes the same worker in another process."""
        return partial(_worker, self.spec.model_dump(mode="json"), self.spec.directory, self.folds)

    def work(self, piece: Work) -> Outcome:
        """:meth:`run`, for an executor."""
        return self.run(*piece)

    def run(self, cell: Cell, pause: float | None = None) -> Outcome:
        """Train and judge ``cell``, or find it done.

        Args:
            cell: which one.
            pause: stop at the first validation after this share of its steps; the outcome says ``stopped`` then, and
                running the cell again goes on from there.

        Raises:
            UserError: in the recipe, its sources or its data.
            TrainingError: a law did not hold. A training that diverged is an outcome.
        """
        prepared, base, inputs, domain = self._ready(cell)
        trains = self.trainer.digest(prepared, inputs, base)
        digest = step_digest("cell", VERSION, {}, {"stage": trains, "test": domain.digest if domain else None})
        known = Outcome(
            settings=dict(cell.settings), seed=cell.seed, fold=cell.fold, state="done", step=0, steps=0,
            examples={part: len(examples) for part, examples in prepared.data[inputs.name].splits.parts()},
            scale=inputs.lora.scale, learning_rate=inputs.train.learning_rate, digest=trains,
        )  # fmt: skip
        try:
            step = self.cache.build("cell", digest, lambda work: self._make(
                work, prepared, inputs, domain, base, digest, trains, pause
            ), self.reporter.say)  # fmt: skip
        except PausedError as paused:
            row = () if paused.loss is None else ((paused.step, paused.loss),)
            return replace(known, state="stopped", step=paused.step, steps=paused.steps, validation=row)
        found = json.loads((step.directory / "outcome.json").read_text(encoding="utf-8"))
        return Outcome.from_dict({**known.as_dict(), **found})

    def start(self, cell: Cell) -> HeldOut | None:
        """The test score of what ``cell`` starts from: the base and the stage's context; ``None`` without a test."""
        prepared, base, inputs, domain = self._ready(cell)
        if domain is None:
            return None
        context = {name: adapter.digest for name, (adapter, _) in inputs.context.items()}
        members = {name: member.model_dump(mode="json") for name, (_, member) in inputs.context.items()}
        needs = {"base": prepared.base_digest, "context": context, "test": domain.digest}
        settings = {"context": members, "device": base.device.type, "dtype": str(base.dtype)}
        digest = step_digest("start", VERSION, settings, needs)

        def make(work: Path) -> dict[str, Any]:
            write_json(work / "scores.json", asdict(HeldOut.of(self.trainer.scored(inputs, domain, base))))
            return {}

        step = self.cache.build("start", digest, make, self.reporter.say)
        return HeldOut.from_dict(json.loads((step.directory / "scores.json").read_text(encoding="utf-8")))

    def _ready(self, cell: Cell) -> tuple[Prepared, LazyBase, StageInputs, Domain | None]:
        """The data, base, inputs and test of ``cell``; stages that it rests on are trained."""
        prepared = self.prepared(cell)
        name = stage_name(self.spec, prepared.recipe)
        base = self.trainer.base(prepared)
        inputs = self.trainer.inputs(prepared, name, self.trainer.earlier(prepared, name, base))
        seeded = replace(inputs, init_seed=cell.seed, data_seed=cell.seed)
        return prepared, base, seeded, sealed_test(prepared, name, self.spec.test_limit)

    def prepared(self, cell: Cell) -> Prepared:
        """The data of ``cell``; cells that differ in how the stage is trained alone share them."""
        recipe = recipe_of(self.spec, cell)
        name = stage_name(self.spec, recipe)
        amounts = {key: value for key, value in {**self.spec.set, **cell.settings}.items() if key in DATA_KEYS}
        plain = self._shared(json_digest(_but_for_training(recipe, name)), lambda: prepare(recipe, self.reporter))
        found = replace(plain, recipe=recipe)
        if cell.fold is not None and self.folds:
            found = folded(found, name, cell.fold, self.folds)
        return perturbed(found, name, amounts, cell.seed) if amounts else found

    def _shared(self, key: str, make: Any) -> Prepared:
        if key not in self._prepared:
            self._prepared[key] = make()
        return self._prepared[key]

    def _make(
        self,
        work: Path,
        prepared: Prepared,
        inputs: StageInputs,
        domain: Domain | None,
        base: LazyBase,
        digest: str,
        trains: str,
        pause: float | None,
    ) -> dict[str, Any]:
        """Fill the work directory of a cell's step."""
        new = self.cache.lookup("stage", trains) is None
        try:
            trained = self.trainer.train(prepared, inputs, base, trains, pause)
        except DivergedError as error:
            write_json(work / "outcome.json", {"state": "diverged", "step": error.step})
            return {"state": "diverged"}
        told: dict[str, Any] = _told(trained)
        if domain is not None:
            data = prepared.data[inputs.name]
            items = [item_digest(example) for example in data.splits.test[: self.spec.test_limit]]
            Ledger.here().enter(items, inputs.name, digest, domain.digest)
            told["test"] = asdict(HeldOut.of(self.trainer.scored(inputs, domain, base, trained.adapter)))
        write_json(work / "outcome.json", told)
        if new and not self.spec.keep_adapters:
            shutil.rmtree(trained.step.directory)
        return {"state": "done", "adapter": trained.adapter.digest}


def _worker(values: dict[str, Any], directory: Path, folds: int | None) -> Worker:
    return Worker(SweepSpec.from_dict(values, directory), folds)


def _told(trained: Trained) -> dict[str, Any]:
    training: Mapping[str, Any] = trained.training
    return {
        "state": "done",
        "step": training["step"],
        "steps": training["steps"],
        "steps_per_epoch": training["steps_per_epoch"],
        "trainable": training["trainable"],
        "history": finite_history(training["history"]),
        "validation": [(row["step"], row["loss"]) for row in training["validation"]],
        "best_step": training["best_step"],
        "seconds": training["seconds"],
        "tokens": training["tokens"],
        "adapter": trained.adapter.digest,
    }


def _but_for_training(recipe: Recipe, name: str) -> dict[str, Any]:
    """What the data of a recipe depend on: all of it but how stage ``name`` is trained."""
    plain = recipe.model_dump(mode="json", exclude={"fusion", "deliver"})
    for stage in plain["stages"]:
        if stage["name"] == name:
            for key in ("lora", "train", "loss", "beta", "label_smoothing"):
                del stage[key]
    return plain
