"""One stage on its own, as ``lorchestra ft`` and ``dpo`` ask for it: a run's steps, the adapter where it is wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.home import home
from lorchestra.base.load import choose_device, choose_format
from lorchestra.data.check import EmptyPartError
from lorchestra.errors import UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import StepCache, storage
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared, prepare
from lorchestra.pipeline.prototyping import copy_prototypes
from lorchestra.pipeline.training import context_of, load_trained, stage_digest, stage_inputs, train
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Split
from lorchestra.recipe.suggestions import Suggestion, lines


@dataclass(frozen=True)
class Tuned:
    """A finished adapter.

    Args:
        directory: the PEFT directory.
        adapter: what it holds.
        training: how it went (``training.json`` of the step).
        examples: part → number of examples.
        cached: it had been trained before.
        suggestions: what the examples settled, and the advice on how to judge with so many.
    """

    directory: Path
    adapter: Adapter
    training: Mapping[str, Any]
    examples: Mapping[str, int]
    cached: bool
    suggestions: tuple[Suggestion, ...]

    @property
    def before(self) -> float | None:
        """Validation loss before the first step; ``None`` without validation examples."""
        rows = self.training["validation"]
        return float(rows[0]["loss"]) if rows else None

    @property
    def after(self) -> float | None:
        """Validation loss of the adapter that was kept."""
        best = self.training["best_loss"]
        return None if best is None else float(best)


def tune(
    recipe: Recipe,
    out: Path,
    *,
    logs: Path,
    validation_optional: bool = False,
    reporter: Reporter = SILENT,
    spelled: Callable[[str], str] = str,
) -> Tuned:
    """Train the only stage of ``recipe`` and put its adapter into ``out``.

    A killed run goes on from its last checkpoint, a repeated one is answered from the cache.

    Args:
        recipe: with one stage.
        out: where the adapter goes, whole or not at all; an adapter that is there is replaced.
        logs: where trackers write, if the recipe reports to any.
        validation_optional: if there are too few examples to hold some back, train without validation.
        reporter: progress.
        spelled: how keys of the recipe are called to the person who is watching.

    Raises:
        UserError: ``out`` is taken by something else; or what the sources, the data or the settings lack.
        TrainingError: a law did not hold, or training diverged.
        StorageError: the disk is full or closed.
    """
    check_place(out)
    device = choose_device(recipe.device)
    held = choose_format(device, recipe.dtype)
    prepared = _prepared(recipe, validation_optional, reporter)
    recipe, stage = prepared.recipe, prepared.recipe.stages[0]
    for line in data_lines(prepared):
        reporter.say(line)
    for line in lines(prepared.suggestions):
        reporter.say(spelled(line))
    inputs = stage_inputs(prepared, stage, context_of(recipe, stage, prepared.adapters))
    digest = stage_digest(prepared, inputs, device.type, str(held))
    cache = StepCache(home() / "steps")
    step = cache.lookup("stage", digest)
    if step is not None:
        found = load_trained(step, inputs, prepared.base)
    else:
        base = LazyBase(prepared.directory, prepared.base.name, recipe.device, recipe.dtype, reporter)
        found = train(prepared, inputs, base, cache, digest, reporter, logs)
    found.adapter.save(out)
    copy_prototypes(found.step.directory / "adapter", out)
    counts = {part: len(items) for part, items in prepared.data[stage.name].splits.parts()}
    return Tuned(out, found.adapter, found.training, counts, step is not None, prepared.suggestions[stage.name])


def check_place(out: Path, what: str = "adapter", holds: str = "adapter_config.json") -> None:
    """Before an hour of training: can the adapter be put there?

    Args:
        out: where.
        what: it is.
        holds: a file by which an earlier one is known, whose place may be taken.

    Raises:
        UserError: a file or something that is no ``what`` is there.
        StorageError: it cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a directory for the {what}")
    if out.is_dir() and any(out.iterdir()) and not (out / holds).exists():
        raise UserError(f"{out} is not empty and holds no {what}; choose another directory")
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(13, "Permission denied", str(out.parent))


def data_lines(prepared: Prepared) -> list[str]:
    """What was found in the data, in a line or two, and the warnings."""
    check = prepared.check.stages[0]
    counts = " · ".join(f"{part} {count}" for part, count in check.counts.items() if count)
    about = (
        f"examples: {counts}; {check.supervised['train']:,} tokens to learn; {check.lengths['mean']:.0f} tokens an "
        f"example, at most {check.lengths['max']:.0f}; {check.truncated} truncated, {check.duplicates} repeated left "
        f"out, {check.near_duplicates} nearly repeated, {check.leakage} leaked; an answer ends with {check.end_of_turn}"
    )
    return [about, *(f"warning: {line}" for line in check.warnings)]


def _prepared(recipe: Recipe, validation_optional: bool, reporter: Reporter) -> Prepared:
    try:
        return prepare(recipe, reporter)
    except EmptyPartError as empty:
        if empty.part != "validation" or not validation_optional:
            raise
        reporter.say("warning: too few examples to hold some back: trained without validation, to the last step")
        return prepare(recipe.model_copy(update={"split": Split(train=1, validation=0, test=0)}))
