"""What the types of a recipe cannot say: names, references, order, settings that contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lorchestra.recipe.gate import gate_problems
from lorchestra.recipe.publish import publish_problems
from lorchestra.recipe.sections import AUTO, EITHER
from lorchestra.recipe.sources import variable_problem
from lorchestra.recipe.words import Location, Problem, near, problems
from lorchestra.train.context import final_weights
from lorchestra.train.settings import LoraSettings, TrainSettings

if TYPE_CHECKING:
    from lorchestra.recipe.recipe import Recipe
    from lorchestra.recipe.sections import Stage

NAME = re.compile(r"^[a-z][a-z0-9_-]{0,63}$")
RESERVED = {"base", "auto", "uniform", "stack", "mixed", "chosen", "delivered", "new", "static", "oracle", "gate"}
DEVICE = re.compile(r"^(auto|cpu|mps|cuda(:\d+)?)$")


def mistakes(recipe: Recipe) -> list[Problem]:
    """Every mistake that one of :data:`RULES` finds."""
    return [problem for rule in RULES for problem in rule(recipe)]


def names(recipe: Recipe) -> Iterable[Problem]:
    """Names are spelt as file names may be, none is reserved, and none is used twice."""
    if not NAME.match(recipe.name):
        yield ("name",), f"{recipe.name!r}: a name is lower-case letters, digits, - and _"
    for name in recipe.adapters:
        yield from _name(("adapters", name), name)
    known = set(recipe.adapters)
    for i, stage in enumerate(recipe.stages):
        place = ("stages", i, "name")
        yield from _name(place, stage.name)
        if stage.name in known:
            yield place, f"the name {stage.name!r} is used twice"
        known.add(stage.name)
    stages = {stage.name for stage in recipe.stages}
    for name in recipe.evaluate.domains:
        yield from _name(("evaluate", "domains", name), name)
        if name in stages:
            yield ("evaluate", "domains", name), f"{name!r} is a stage, which is a domain already"


def contexts(recipe: Recipe) -> Iterable[Problem]:
    """A context names earlier stages, or adapters that are brought in."""
    stages = [stage.name for stage in recipe.stages]
    known = list(recipe.adapters)
    for i, stage in enumerate(recipe.stages):
        for member in stage.context:
            if member in known:
                continue
            if member == stage.name:
                problem = f"stage {stage.name!r} cannot be its own context"
            elif member in stages:
                problem = (
                    f"context {member!r} comes later than {stage.name!r}; a context names earlier stages (this would "
                    "be a cycle)"
                )
            else:
                problem = f"context {member!r} names no earlier stage or adapter{near(member, known)}"
            yield ("stages", i, "context", member), problem
        known.append(stage.name)


def stage_settings(recipe: Recipe) -> Iterable[Problem]:
    """What a stage overrides makes whole settings together with the recipe's defaults, and an adapter of something."""
    for i, stage in enumerate(recipe.stages):
        try:
            if not recipe.lora_of(stage).target_modules:
                yield (
                    targets_place(recipe, stage),
                    "is empty, so there is nothing to train; name modules (q_proj, v_proj …), or write all-linear",
                )
        except ValidationError as error:
            yield from problems(error, type(recipe), LoraSettings, ("stages", i, "lora"))
        try:
            recipe.train_of(stage)
        except ValidationError as error:
            yield from problems(error, type(recipe), TrainSettings, ("stages", i, "train"))


def how_long(recipe: Recipe) -> Iterable[Problem]:
    """``epochs`` or ``max_steps`` says how long to train, not both at one place."""
    both = "give epochs or max_steps, not both"
    for i, stage in enumerate(recipe.stages):
        if all(stage.train.get(key) not in (None, AUTO) for key in EITHER):
            yield ("stages", i, "train"), both
    if recipe.train.max_steps is not None and recipe.train.epochs != TrainSettings.model_fields["epochs"].default:
        yield ("train",), both


def preference_losses(recipe: Recipe) -> Iterable[Problem]:
    """IPO has no label smoothing."""
    for i, stage in enumerate(recipe.stages):
        if stage.loss == "ipo" and stage.label_smoothing:
            yield (
                ("stages", i, "label_smoothing"),
                "belongs to loss: sigmoid; ipo has no label smoothing. Leave it out, or use loss: sigmoid",
            )


def members(recipe: Recipe) -> Iterable[Problem]:
    """The fusion's members are stages or adapters, each once."""
    known = [*recipe.adapters, *(stage.name for stage in recipe.stages)]
    given = recipe.fusion.members
    for member in given:
        if member not in known:
            yield ("fusion", "members"), f"{member!r} is no stage or adapter of this recipe{near(member, known)}"
    for member in dict.fromkeys(member for member in given if given.count(member) > 1):
        yield ("fusion", "members"), f"{member!r} is here twice"


def given_weights(recipe: Recipe) -> Iterable[Problem]:
    """Given weights belong to members, and one of them at least is not zero."""
    weights = recipe.fusion.weights
    if not isinstance(weights, dict):
        return
    for name in weights:
        if name not in recipe.members:
            problem = f"{name!r} is no member of the fusion{near(name, recipe.members)}"
            yield ("fusion", "weights", name), problem
    if not any(weights.values()):
        yield (
            ("fusion", "weights"),
            "every member has weight 0, which is the base itself; give one of them at least a weight "
            f"({', '.join(recipe.members)})",
        )


def something_to_search_on(recipe: Recipe) -> Iterable[Problem]:
    """A search chooses on the validation part."""
    if recipe.fusion.weights == "search" and recipe.split.validation == 0:
        yield (
            ("split", "validation"),
            "is 0, but fusion.weights: search chooses on this part; give it a share, or set fusion.weights "
            "(equal, later, specialised, last, or a number for each member)",
        )


def goal(recipe: Recipe) -> Iterable[Problem]:
    """A goal weighs domains that the search sees, the stages', and one of them at least."""
    if not isinstance(recipe.fusion.goal, dict):
        return
    stages = [stage.name for stage in recipe.stages]
    for name in recipe.fusion.goal:
        if name not in stages:
            yield ("fusion", "goal", name), f"{name!r} is no stage of this recipe{near(name, stages)}"
    if not any(recipe.fusion.goal.values()):
        yield ("fusion", "goal"), f"no domain counts; give one of them at least a weight ({', '.join(stages)})"


def strategy(recipe: Recipe) -> Iterable[Problem]:
    """CMA-ES has nothing to adapt along one axis, and a grid has as many points as it has."""
    fusion = recipe.fusion
    if fusion.strategy == "grid" and fusion.candidates is not None:
        yield ("fusion", "candidates"), "a grid has its own number of points; leave it out, or take another strategy"
    if fusion.weights == "search" and fusion.strategy == "cmaes" and len(recipe.members) < 2:
        yield ("fusion", "strategy"), "cmaes needs two members at least; with one take gradient or surrogate"


def something_to_judge_on(recipe: Recipe) -> Iterable[Problem]:
    """Of a domain nothing but the sealed test is read."""
    if recipe.evaluate.domains and recipe.split.test == 0:
        yield ("split", "test"), "is 0, so evaluate.domains would never be scored; give it a share, or leave them out"


def device(recipe: Recipe) -> Iterable[Problem]:
    """The device is one that torch could have."""
    if not DEVICE.match(recipe.device):
        yield ("device",), f"expected auto, cpu, cuda, cuda:0 … or mps, got {recipe.device!r}"


def variables(recipe: Recipe) -> Iterable[Problem]:
    """``${NAME}`` in a source is one of the allowed names."""
    for path, text, _, _ in recipe.sources():
        if problem := variable_problem(text):
            yield path, problem


def publishing(recipe: Recipe) -> Iterable[Problem]:
    """What is published goes by a name, an alias and gates that a registry takes, and the recipe holds no password."""
    if recipe.deliver.publish is not None:
        yield from ((("deliver", "publish", *place), text) for place, text in publish_problems(recipe))


def gating(recipe: Recipe) -> Iterable[Problem]:
    """A gate has adapters to choose among, examples to be chosen on, and a sealed test to win on."""
    yield from ((("fusion", "gate", *place), text) for place, text in gate_problems(recipe))


def whole_stack(recipe: Recipe) -> Iterable[Problem]:
    """``weights: last`` delivers the last member as it was trained: all of its context takes part in the fusion."""
    last = next((stage for stage in recipe.stages if stage.name == recipe.members[-1]), None)
    if recipe.fusion.weights != "last" or last is None:
        return
    absent = [name for name, weight in final_weights(last.context).items() if weight and name not in recipe.members]
    if absent:
        yield (
            ("fusion", "weights"),
            f"last is {last.name!r} as it was trained, beside {', '.join(absent)}, which "
            f"{'is no member' if len(absent) == 1 else 'are no members'} of the fusion; add to members, or give "
            "weights",
        )


RULES = (
    names, contexts, stage_settings, how_long, preference_losses, members, given_weights, whole_stack,
    something_to_search_on, goal, strategy, something_to_judge_on, device, variables,
    publishing, gating,
)  # fmt: skip


def targets_place(recipe: Recipe, stage: Stage) -> Location:
    """Where the ``target_modules`` of ``stage`` are said: on the stage, or for all."""
    if "target_modules" in stage.lora:
        return ("stages", recipe.stages.index(stage), "lora", "target_modules")
    return ("lora", "target_modules")


def _name(path: Location, name: str) -> Iterable[Problem]:
    if not NAME.match(name):
        yield path, f"{name!r}: a name is lower-case letters, digits, - and _, and starts with a letter"
    elif name in RESERVED:
        yield path, f"{name!r} is a reserved word; choose another name"
