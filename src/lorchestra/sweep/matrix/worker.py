"""Trains, fuses and judges departments, one after the other, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import DivergedError, LorchestraError, StorageError
from lorchestra.evaluate.ledger import Ledger, item_digest, sealed_digest
from lorchestra.evaluate.score import Domain, Scores
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import place, step_digest, write_json
from lorchestra.pipeline.choosing import Chosen, settled
from lorchestra.pipeline.delivering import fuse_step
from lorchestra.pipeline.figures import tools_of
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared, prepare, prepare_beside
from lorchestra.pipeline.prototyping import combine_prototypes
from lorchestra.pipeline.training import Trained
from lorchestra.recipe.recipe import Recipe
from lorchestra.sweep.matrix.outcome import BASE, DELIVERED, SHARED, Outcome, judged
from lorchestra.sweep.matrix.rows import Department, Matrix
from lorchestra.sweep.trainer import Trainer, sealed_test
from lorchestra.train.context import final_weights
from lorchestra.train.stage import StageInputs

VERSION = 2  # raise it when the same department would be delivered or judged otherwise


class DepartmentWorker:
    """Does the rows of one matrix.

    Args:
        matrix: recipe and departments.
        reporter: progress.
    """

    def __init__(self, matrix: Matrix, reporter: Reporter = SILENT) -> None:
        self.matrix = matrix
        self.reporter = reporter
        self.trainer = Trainer(reporter)
        self._shared: tuple[Prepared, dict[str, Trained]] | None = None

    def elsewhere(self) -> Callable[[], DepartmentWorker]:
        """Makes the same worker in another process."""
        return partial(DepartmentWorker, self.matrix)

    def quieten(self, reporter: Reporter) -> None:
        """From now on another one hears of the progress."""
        self.reporter = self.trainer.reporter = reporter

    def shared(self) -> tuple[Prepared, dict[str, Trained]]:
        """What all departments stand on, and the shared stages, trained or found."""
        if self._shared is None:
            prepared = prepare(self.matrix.shared(), self.reporter)
            names = [stage.name for stage in prepared.recipe.stages]
            self._shared = prepared, self.trainer.stages(prepared, self.trainer.base(prepared), names)
        return self._shared

    def work(self, piece: Department) -> Outcome:
        """Train, deliver and judge one department, or find it done.

        What is wrong with this row alone is an outcome: the others go on.

        Raises:
            StorageError: the disk is full or closed.
        """
        known = Outcome(piece.name, piece.origin, dict(piece.settings), "done")
        try:
            return self._work(piece, known)
        except StorageError:
            raise
        except LorchestraError as error:
            return replace(known, state="failed", reason=str(error))

    def _work(self, department: Department, known: Outcome) -> Outcome:
        shared, stages = self.shared()
        prepared = prepare_beside(self.matrix.recipe_of(department), shared, self.reporter)
        name, recipe = self.matrix.stage, prepared.recipe
        others = {**prepared.adapters, **{key: found.adapter for key, found in stages.items()}}
        base = self.trainer.base(prepared)
        inputs = self.trainer.inputs(prepared, name, others)
        trains = self.trainer.digest(prepared, inputs, base)
        domain = sealed_test(prepared, name, recipe.evaluate.test_limit)
        digest = department_digest(recipe, department, trains, others, domain)
        items = [item_digest(example) for example in prepared.data[name].splits.test[: recipe.evaluate.test_limit]]

        def make(work: Path) -> dict[str, Any]:
            try:
                trained = self.trainer.train(prepared, inputs, base, trains)
            except DivergedError as error:
                write_json(work / "outcome.json", {"state": "diverged", "reason": str(error), "step": error.step})
                return {"state": "diverged"}
            members = {**others, name: trained.adapter}
            chosen = weights_of(prepared, name, members)
            parts = {key: found.step.directory / "adapter" for key, found in {**stages, name: trained}.items()}
            fused, told = self._deliver(work, prepared, department, members, chosen, parts)
            write_json(work / "outcome.json", {**_told(trained, inputs), **told})
            if domain is not None:
                Ledger.here().enter(items, department.name, digest, domain.digest)
                scores = self._scores(inputs, domain, base, fused)
                write_json(work / "scores.json", {model: asdict(found) for model, found in scores.items()})
            return {"state": "done", "adapter": fused.digest}

        step = self.trainer.cache.build("department", digest, make, self.reporter.say)
        found = json.loads((step.directory / "outcome.json").read_text(encoding="utf-8"))
        if found.get("state") == "diverged":
            self.trainer.abandon(trains)
        found["warnings"] = (*found.get("warnings", ()), *_warnings(prepared, name))
        scored = step.directory / "scores.json"
        return replace(
            known,
            **found,
            examples={part: len(examples) for part, examples in prepared.data[name].splits.parts()},
            data={loaded.source: loaded.digest for loaded in prepared.data[name].loaded},
            tests=judged(_read(scored)) if scored.exists() else (),
            readings=Ledger.here().count(items, domain.digest) if domain and scored.exists() else 0,
            sealed=sealed_digest(items) if scored.exists() else "",
            directory=str(step.directory),
            cached=step.cached,
        )

    def _deliver(
        self,
        work: Path,
        prepared: Prepared,
        department: Department,
        members: Mapping[str, Adapter],
        chosen: Chosen,
        parts: Mapping[str, Path],
    ) -> tuple[Adapter, dict[str, Any]]:
        """The department's adapter into ``work/adapter``, under its own name; what is told of it.

        It is known by its own prompts: those of the shared stages are every department's, and tell none from another.
        ``parts``: stage → directory of its adapter.
        """
        weights = {key: weight for key, weight in chosen.weights.items() if weight}
        taking = {key: members[key] for key in weights}
        called = replace(prepared, recipe=prepared.recipe.model_copy(update={"name": department.name}))
        cache, own, summed = self.trainer.cache, self.matrix.stage, replace(chosen, weights=weights)
        stages = {key: directory for key, directory in parts.items() if weights.get(key, 0.0) > 0}
        fused, step = fuse_step(called, taking, summed, cache, self.reporter, stages)
        place(step.directory / "adapter", work / "adapter")
        combine_prototypes(fused, {own: parts[own]} if own in stages else {}, work / "adapter")
        told = {
            "weights": weights,
            "members": {key: adapter.digest for key, adapter in taking.items()},
            "digest": fused.digest,
            "retained": step.info["retained"],
            "tools": tools_of(taking.values()),
            "warnings": list(chosen.warnings),
        }
        return fused, told

    def _scores(self, inputs: StageInputs, domain: Domain, base: LazyBase, fused: Adapter) -> dict[str, Scores]:
        """Of the base, of the context alone, and of what is delivered; on the base itself if it was quantised."""
        plain = base.plain()
        scores = {
            BASE: self.trainer.score(domain, plain, {}, {}),
            DELIVERED: self.trainer.score(domain, plain, {DELIVERED: fused}, {DELIVERED: 1.0}),
        }
        scores[SHARED] = self.trainer.scored(inputs, domain, plain) if inputs.context else scores[BASE]
        if plain is not base:
            plain.release()
        return scores


def department_digest(
    recipe: Recipe, department: Department, trains: str, others: Mapping[str, Adapter], domain: Domain | None
) -> str:
    """Digest of a department's step.

    Args:
        recipe: the department's.
        department: the row.
        trains: digest of its training step.
        others: what it may be summed with: shared stages, and adapters that were brought in.
        domain: its sealed test.
    """
    fusion = recipe.fusion.model_dump(mode="json", include={"members", "weights", "rank"})
    needs = {
        "stage": trains,
        "others": {key: adapter.digest for key, adapter in others.items()},
        "test": domain.digest if domain else None,
    }
    return step_digest("department", VERSION, {"name": department.name, "fusion": fusion}, needs)


def weights_of(prepared: Prepared, name: str, members: Mapping[str, Adapter]) -> Chosen:
    """Coefficients of a department: as the recipe's fusion says; in place of a search, those it was trained with."""
    recipe = prepared.recipe
    if recipe.fusion.weights == "search":
        return Chosen({**final_weights(recipe.stage(name).context), name: 1.0}, None, (), None)
    chosen = settled(recipe, {member: members[member] for member in recipe.members})
    assert chosen is not None  # nothing else is searched
    return chosen


def _told(trained: Trained, inputs: StageInputs) -> dict[str, Any]:
    training = trained.training
    validation = training["validation"]
    return {
        "rank": inputs.lora.rank,
        "trainable": training["trainable"],
        "step": training["step"],
        "steps": training["steps"],
        "best_step": training["best_step"],
        "before": validation[0]["loss"] if validation else None,
        "after": training["best_loss"],
        "seconds": training["seconds"],
        "tokens": training["tokens"],
    }


def _warnings(prepared: Prepared, name: str) -> tuple[str, ...]:
    return next(stage.warnings for stage in prepared.check.stages if stage.name == name)


def _read(path: Path) -> dict[str, Scores]:
    return {model: Scores.from_dict(found) for model, found in json.loads(path.read_text(encoding="utf-8")).items()}
