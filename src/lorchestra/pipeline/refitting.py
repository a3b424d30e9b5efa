"""After the weights are chosen: the stages once more, on their λ-validation examples too.

What validation was for, when to stop and how to mix, is decided by then. Every stage that acts is trained again from
the same start on all examples outside the sealed test, as many steps an example as its best checkpoint had taken,
without validation, and mixed with the weights that were chosen. Nothing can be measured on λ-validation after that:
whether the refit helped, the sealed test says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.pipeline.prepare import Prepared
from lorchestra.pipeline.training import context_of, stage_inputs
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Stage
from lorchestra.train.schedule import BatchPlan
from lorchestra.train.stage import StageInputs


def acting(recipe: Recipe, weights: Mapping[str, float]) -> list[Stage]:
    """The stages with a weight, and those that stand in their contexts, in the recipe's order."""
    needed = {name for name, weight in weights.items() if weight}
    for stage in reversed(recipe.stages):
        if stage.name in needed:
            needed |= stage.context.keys()
    return [stage for stage in recipe.stages if stage.name in needed]


def refit_inputs(
    prepared: Prepared,
    stage: Stage,
    training: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    refitted: Mapping[str, Adapter],
) -> StageInputs:
    """What the refit of ``stage`` depends on.

    Schedules (of the learning rate, of a curriculum) are those of the whole training, stretched with the data; it ends
    where its best checkpoint was taken, as a share of the whole.

    Args:
        prepared: the data.
        stage: of the recipe.
        training: how it went the first time (``training.json``).
        adapters: of the first training and brought in; the start is drawn as it was there.
        refitted: of the stages before, which take their places in the context.
    """
    first = stage_inputs(prepared, stage, context_of(prepared.recipe, stage, adapters))
    items = [*first.items, *first.validation]
    before, after = (BatchPlan([0] * len(part), first.train, 0, fixed=True) for part in (first.items, items))
    train, steps = first.train, after.steps
    if train.max_steps is not None:
        steps = max(1, round(train.max_steps * after.steps_per_epoch / before.steps_per_epoch))
        train = train.model_copy(update={"max_steps": steps})
    stop = None
    if training["best_step"] is not None:
        stop = max(1, round(int(training["best_step"]) * steps / before.steps))
    context = {name: (refitted.get(name, adapter), member) for name, (adapter, member) in first.context.items()}
    return replace(first, train=train, items=items, validation=[], context=context, stop=stop)
