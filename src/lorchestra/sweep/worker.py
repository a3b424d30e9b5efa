"""Trains cells, one after the other, in one process: the base and the data stay where they are between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorchestra.adapter.digest import json_digest
from lorchestra.data.example import Example
from lorchestra.errors import DivergedError, PausedError, RecipeError, UserError
from lorchestra.evaluate.ledger import Ledger, item_digest
from lorchestra.evaluate.score import Domain
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import discard, step_digest, write_json
from lorchestra.pipeline.estimate import empty_model
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared, prepare
from lorchestra.pipeline.training import Trained
from lorchestra.recipe.recipe import Recipe
from lorchestra.sweep.cells import Cell, recipe_of, stage_name
from lorchestra.sweep.examples import changed, folded, perturbed
from lorchestra.sweep.outcome import HeldOut, Outcome, finite_history
from lorchestra.sweep.spec import DATA_KEYS, SweepSpec
from lorchestra.sweep.trainer import Trainer, sealed_test
from lorchestra.train.lora import target_paths
from lorchestra.train.settings import LoraSettings
from lorchestra.train.stage import StageInputs

VERSION = 1  # raise it when the same training would be measured otherwise


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Args:
        cell: what to train.
        pause: stop at the first validation after this share of its steps.
        judged: score it on the test too; what is trained to choose settings by is not.
    """

    cell: Cell
    pause: float | None = None
    judged: bool = True


class Worker:
    """Runs cells of one sweep.

    Args:
        spec: the specification.
        folds: K of a cross-validation.
        reporter: what is found in the sources and the data.
        inside: progress within a cell; ``reporter`` unless given.
    """

    def __init__(
        self, spec: SweepSpec, folds: int | None = None, reporter: Reporter = SILENT, inside: Reporter | None = None
    ) -> None:
        self.spec = spec
        self.folds = folds
        self.reporter = reporter
        self.inside = inside or reporter
        self.trainer = Trainer(self.inside)
        self.cache = self.trainer.cache
        self._prepared: dict[str, Prepared] = {}
        self._models: dict[Path, Any] = {}

    def elsewhere(self) -> Callable[[], Worker]:
        """Makes the same worker in another process."""
        return partial(_worker, self.spec.model_dump(mode="json"), self.spec.directory, self.folds)

    def check(self, cells: Sequence[Cell]) -> None:
        """Before the first training: are there examples enough for every cell, and modules of the names it gives?

        Raises:
            UserError: there are not.
        """
        seen = set()
        for cell in cells:
            amounts = self._amounts(cell)
            prepared = self._dealt(cell)
            name = stage_name(self.spec, prepared.recipe)
            lora = prepared.recipe.lora_of(prepared.recipe.stage(name))
            key = json.dumps([amounts, lora.target_modules, cell.seed, cell.fold, id(prepared.data[name])])
            if key not in seen:
                seen.add(key)
                changed(prepared.data[name].splits.train, amounts, cell.seed)
                try:
                    self._trainable(prepared, lora)
                except UserError as error:
                    raise RecipeError(f"lora.{error}") from None

    def begin(self, cell: Cell) -> None:
        """Train the stages that ``cell`` rests on, in the open; the base is released again."""
        trainer = Trainer(self.reporter)
        prepared = self.prepared(cell)
        trainer.earlier(prepared, stage_name(self.spec, prepared.recipe), trainer.base(prepared))
        trainer.release()

    def work(self, piece: Work) -> Outcome:
        """Train and judge a cell, or find it done. Where it pauses its outcome is ``stopped``; run again without the
        pause it goes on from there.

        Raises:
            UserError: in the recipe, its sources or its data.
            TrainingError: a law did not hold. A training that diverged is an outcome.
        """
        cell = piece.cell
        prepared, base, inputs, domain = self._ready(cell)
        trains = self.trainer.digest(prepared, inputs, base)
        if not piece.judged and self.cache.lookup("cell", _cell_digest(trains, domain)) is None:
            domain = None
        digest = _cell_digest(trains, domain)
        known = Outcome(
            settings=dict(cell.settings), seed=cell.seed, fold=cell.fold, state="done", step=0, steps=0,
            examples={
                "train": len(prepared.data[inputs.name].splits.train),
                "validation": len(inputs.validation[: inputs.train.eval_limit]),
                "test": len(self._test(prepared, inputs.name)),
            },
            trainable=self._trainable(prepared, inputs.lora),
            scale=inputs.lora.scale, learning_rate=inputs.train.learning_rate, digest=trains,
        )  # fmt: skip
        ours = self._is_ours(trains)
        rung = None if piece.pause is None else step_digest("rung", VERSION, {"pause": piece.pause}, {"stage": trains})
        if rung and not self.cache.lookup("cell", digest) and (paused := self.cache.lookup("rung", rung)):
            return _at_rung(known, paused.info)
        try:
            with self.inside.task(cell.name):
                step = self.cache.build("cell", digest, lambda work: self._make(
                    work, prepared, inputs, domain, base, digest, trains, piece.pause
                ), self.reporter.say)  # fmt: skip
        except PausedError as pause:
            assert rung is not None  # nothing else pauses
            place = {"step": pause.step, "steps": pause.steps, "loss": pause.loss}
            self.cache.abandon("cell", digest)
            return _at_rung(known, self.cache.build("rung", rung, lambda work: place, self.reporter.say).info)
        found = Outcome.from_dict(
            known.as_dict() | json.loads((step.directory / "outcome.json").read_text(encoding="utf-8"))
        )
        if found.state == "diverged":
            self.trainer.abandon(trains)
        if self.spec.keep_adapters and found.state == "done":
            self.trainer.train(prepared, inputs, base, trains)  # it is there, but where an earlier sweep kept none
        elif piece.judged and ours and not step.cached:
            discard(self.cache.path("stage", trains))
        return found

    def forget(self, outcome: Outcome) -> None:
        """Remove what is left of a training that goes no further: its checkpoints if it was stopped, its adapter if it
        was made to choose settings by and was not chosen."""
        self.trainer.abandon(outcome.digest)
        if self._is_ours(outcome.digest) and not self.spec.keep_adapters:
            discard(self.cache.path("stage", outcome.digest))

    def _is_ours(self, trains: str) -> bool:
        """Whether a training step is not there yet, or was made by a sweep to choose settings by: nobody else's."""
        if self.cache.lookup("stage", trains) is None:
            return True
        chosen_by = self.cache.lookup("cell", _cell_digest(trains, None))
        return chosen_by is not None and bool(chosen_by.info.get("ours"))

    def readings(self, cell: Cell) -> int:
        """How often the test of ``cell`` has been read, by this sweep and by anything else."""
        prepared = self._dealt(cell)
        test = self._test(prepared, stage_name(self.spec, prepared.recipe))
        return Ledger.here().count([item_digest(example) for example in test])

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
        """The data of ``cell``; cells that differ in how the stage is trained alone share them.

        The recipe is the cell's as it is written: what it leaves open is settled from the cell's own examples.
        """
        found = self._dealt(cell)
        amounts = self._amounts(cell)
        return perturbed(found, stage_name(self.spec, found.recipe), amounts, cell.seed) if amounts else found

    def _dealt(self, cell: Cell) -> Prepared:
        """Its data before they are changed on purpose."""
        recipe = recipe_of(self.spec, cell)
        name = stage_name(self.spec, recipe)
        key = json_digest(_but_for_training(recipe, name))
        if key not in self._prepared:  # the sources are told of once
            self._prepared[key] = prepare(recipe, self.inside if self._prepared else self.reporter)
        found = self._prepared[key]
        if cell.fold is not None and self.folds:
            folds = f"{key} {cell.fold}/{self.folds}"
            if folds not in self._prepared:
                self._prepared[folds] = folded(found, name, cell.fold, self.folds)
            found = self._prepared[folds]
        return replace(found, recipe=recipe)

    def _amounts(self, cell: Cell) -> dict[str, Any]:
        return {key: value for key, value in {**self.spec.set, **cell.settings}.items() if key in DATA_KEYS}

    def _test(self, prepared: Prepared, name: str) -> tuple[Example, ...]:
        return prepared.data[name].splits.test[: self.spec.test_limit]

    def _trainable(self, prepared: Prepared, lora: LoraSettings) -> int:
        """Parameters of the adapter."""
        if prepared.directory not in self._models:
            self._models[prepared.directory] = empty_model(prepared.directory)
        paths = target_paths(self._models[prepared.directory], lora.target_modules)
        return sum(lora.rank * (m + n) for m, n in paths.values())

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
        ours = self._is_ours(trains)
        try:
            trained = self.trainer.train(prepared, inputs, base, trains, pause)
        except DivergedError as error:
            told = {"step": error.step, "steps": error.steps, "validation": error.validation}
            write_json(work / "outcome.json", {"state": "diverged", **told})
            return {"state": "diverged"}
        told = _told(trained)
        if domain is not None:
            items = [item_digest(example) for example in self._test(prepared, inputs.name)]
            Ledger.here().enter(items, inputs.name, digest, domain.digest)
            told["test"] = asdict(HeldOut.of(self.trainer.scored(inputs, domain, base, trained.adapter)))
        write_json(work / "outcome.json", told)
        return {"state": "done", "adapter": trained.adapter.digest, "ours": ours}


def _cell_digest(trains: str, domain: Domain | None) -> str:
    return step_digest("cell", VERSION, {}, {"stage": trains, "test": domain.digest if domain else None})


def _at_rung(known: Outcome, place: Mapping[str, Any]) -> Outcome:
    """A cell where it pauses."""
    row = (place["step"], place["loss"])
    return replace(known, state="stopped", step=place["step"], steps=place["steps"], validation=(row,))


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
