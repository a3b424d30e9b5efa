"""Trains cells, one after the other, in one process: the base and the data stay where they are between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import json_digest
from lorchestra.bank import Bank
from lorchestra.base.home import home
from lorchestra.base.load import choose_device, choose_dtype
from lorchestra.errors import DivergedError, PausedError
from lorchestra.evaluate.ledger import Ledger, item_digest
from lorchestra.evaluate.score import Domain, Kind, make_domain, score
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import StepCache, step_digest, write_json
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared, prepare
from lorchestra.pipeline.training import Trained, context_of, load_trained, stage_digest, stage_inputs, train
from lorchestra.recipe.recipe import Recipe
from lorchestra.sweep.cells import Cell, recipe_of, stage_name
from lorchestra.sweep.examples import folded, perturbed
from lorchestra.sweep.outcome import HeldOut, Outcome, finite_history
from lorchestra.sweep.spec import DATA_KEYS, SweepSpec
from lorchestra.train.context import final_weights
from lorchestra.train.stage import StageInputs

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
        self.cache = StepCache(home() / "steps")
        self._prepared: dict[str, Prepared] = {}
        self._bases: dict[tuple[str, str, str], LazyBase] = {}

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
        trains = stage_digest(prepared, inputs, base.device.type, str(base.dtype))
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
            write_json(work / "scores.json", asdict(self._scored(inputs, domain, base)))
            return {}

        step = self.cache.build("start", digest, make, self.reporter.say)
        return HeldOut.from_dict(json.loads((step.directory / "scores.json").read_text(encoding="utf-8")))

    def _ready(self, cell: Cell) -> tuple[Prepared, LazyBase, StageInputs, Domain | None]:
        """The data, base, inputs and test of ``cell``; stages that it rests on are trained."""
        prepared = self.prepared(cell)
        name = stage_name(self.spec, prepared.recipe)
        base = self._base(prepared)
        trained = self._earlier(prepared, name, base)
        stage = prepared.recipe.stage(name)
        context = context_of(prepared.recipe, stage, {**prepared.adapters, **trained})
        inputs = replace(stage_inputs(prepared, stage, context), init_seed=cell.seed, data_seed=cell.seed)
        return prepared, base, inputs, _domain(prepared, name, self.spec.test_limit)

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

    def _base(self, prepared: Prepared) -> LazyBase:
        recipe = prepared.recipe
        choose_dtype(choose_device(recipe.device), recipe.dtype)
        key = (prepared.base.weights, recipe.device, recipe.dtype)
        if key not in self._bases:
            for other in self._bases.values():  # one base at a time is in memory
                other.release()
            self._bases = {
                key: LazyBase(prepared.directory, prepared.base.name, recipe.device, recipe.dtype, self.reporter)
            }
        return self._bases[key]

    def _earlier(self, prepared: Prepared, name: str, base: LazyBase) -> dict[str, Adapter]:
        """Adapters of the stages that the context of stage ``name`` rests on, trained once."""
        recipe = prepared.recipe
        needed = _needed(recipe, name)
        trained: dict[str, Adapter] = {}
        for stage in recipe.stages:
            if stage.name in needed:
                context = context_of(recipe, stage, {**prepared.adapters, **trained})
                inputs = stage_inputs(prepared, stage, context)
                digest = stage_digest(prepared, inputs, base.device.type, str(base.dtype))
                trained[stage.name] = self._train(prepared, inputs, base, digest).adapter
        return trained

    def _train(
        self, prepared: Prepared, inputs: StageInputs, base: LazyBase, digest: str, pause: float | None = None
    ) -> Trained:
        step = self.cache.lookup("stage", digest)
        if step is not None:
            return load_trained(step, inputs, prepared.base)
        logs = home() / "logs" / f"sweep-{digest[:12]}"
        return train(prepared, inputs, base, self.cache, digest, self.reporter, logs, pause)

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
            trained = self._train(prepared, inputs, base, trains, pause)
        except DivergedError as error:
            write_json(work / "outcome.json", {"state": "diverged", "step": error.step})
            return {"state": "diverged"}
        told: dict[str, Any] = _told(trained)
        if domain is not None:
            data = prepared.data[inputs.name]
            items = [item_digest(example) for example in data.splits.test[: self.spec.test_limit]]
            Ledger.here().enter(items, inputs.name, digest, domain.digest)
            told["test"] = asdict(self._scored(inputs, domain, base, trained.adapter))
        write_json(work / "outcome.json", told)
        if new and not self.spec.keep_adapters:
            shutil.rmtree(trained.step.directory)
        return {"state": "done", "adapter": trained.adapter.digest}

    def _scored(self, inputs: StageInputs, domain: Domain, base: LazyBase, adapter: Adapter | None = None) -> HeldOut:
        """Scores of base and context, and of ``adapter`` on top of them."""
        loaded = base.load()
        bank = Bank(loaded.model, loaded.id)
        members = {name: member for name, (member, _) in inputs.context.items()}
        weights = final_weights({name: member for name, (_, member) in inputs.context.items()})
        if adapter is not None:
            members[inputs.name] = adapter
            weights[inputs.name] = 1.0
        try:
            for name, member in members.items():
                bank.load(name, member)
            with self.reporter.task("test", len(domain.items), "item") as task, bank.using(weights):
                return HeldOut.of(score(loaded.model, domain, loaded.pad_id, task.advance))
        finally:
            bank.unmount()


def _needed(recipe: Recipe, name: str) -> set[str]:
    """Stages that stage ``name`` needs, directly or through others."""
    stages = {stage.name: stage for stage in recipe.stages}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for other in stages[waiting.pop()].context:
            if other in stages and other not in found:
                found.add(other)
                waiting.append(other)
    return found


def _domain(prepared: Prepared, name: str, limit: int | None) -> Domain | None:
    data = prepared.data[name]
    kind: Kind = "dpo" if data.task == "dpo" else "sft"
    examples = data.splits.test[:limit]
    return make_domain(name, kind, examples, prepared.renderer) if examples else None


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
