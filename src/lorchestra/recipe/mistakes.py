"""What the types of a recipe cannot say: names, references, order, settings that contradict each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lorchestra.recipe.sections import EITHER
from lorchestra.recipe.sources import variable_problem
from lorchestra.recipe.words import Problem, near, problems
from lorchestra.train.settings import LoraSettings, TrainSettings

if TYPE_CHECKING:
    from lorchestra.recipe.recipe import Recipe

NAME = re.compile(r"^[a-z][a-z0-9_-]{0,63}$")
RESERVED = {"base", "auto", "uniform", "stack", "mixed", "chosen", "delivered", "new"}
DEVICE = re.compile(r"^(auto|cpu|mps|cuda(:\d+)?)$")


def mistakes(recipe: Recipe) -> list[Problem]:
    """What the types cannot say: names, references, order."""
    found: list[Problem] = []
    known: list[str] = list(recipe.adapters)
    for name in recipe.adapters:
        found += _name_problem(("adapters", name), name)
    names = [stage.name for stage in recipe.stages]
    for i, stage in enumerate(recipe.stages):
        at = ("stages", i)
        found += _name_problem((*at, "name"), stage.name)
        if stage.name in known:
            found.append(((*at, "name"), f"the name {stage.name!r} is used twice"))
        for member in stage.context:
            if member not in known:
                found.append(((*at, "context", member), _context_problem(member, stage.name, names, known)))
        for key, read in (("lora", recipe.lora_of), ("train", recipe.train_of)):
            try:
                read(stage)
            except ValidationError as error:
                model = LoraSettings if key == "lora" else TrainSettings
                found += problems(error, type(recipe), model, (*at, key))
        if all(stage.train.get(key) is not None for key in EITHER):
            found.append(((*at, "train"), "give epochs or max_steps, not both"))
        known.append(stage.name)
    for member in recipe.fusion.members:
        if member not in known:
            found.append(
                (("fusion", "members"), f"{member!r} is no stage or adapter of this recipe{near(member, known)}")
            )
    if isinstance(recipe.fusion.weights, dict):
        for name in recipe.fusion.weights:
            if name not in recipe.members:
                found.append(
                    (("fusion", "weights", name), f"{name!r} is no member of the fusion{near(name, recipe.members)}")
                )
    if recipe.fusion.weights == "search" and recipe.split.validation == 0:
        found.append(
            (
                ("split", "validation"),
                "is 0, but fusion.weights: search chooses on this part; give it a share, or set fusion.weights "
                "(equal, later, specialised, last, or a number for each member)",
            )
        )
    for name in recipe.evaluate.domains:
        found += _name_problem(("evaluate", "domains", name), name)
        if name in names:
            found.append((("evaluate", "domains", name), f"{name!r} is a stage, which is a domain already"))
    if not NAME.match(recipe.name):
        found.append((("name",), f"{recipe.name!r}: a name is lower-case letters, digits, - and _"))
    if recipe.train.max_steps is not None and recipe.train.epochs != TrainSettings.model_fields["epochs"].default:
        found.append((("train",), "give epochs or max_steps, not both"))
    members = recipe.fusion.members
    for member in dict.fromkeys(member for member in members if members.count(member) > 1):
        found.append((("fusion", "members"), f"{member!r} is here twice"))
    if not DEVICE.match(recipe.device):
        found.append((("device",), f"expected auto, cpu, cuda, cuda:0 … or mps, got {recipe.device!r}"))
    for path, text, _, _ in recipe.sources():
        if problem := variable_problem(text):
            found.append((path, problem))
    return found


def _name_problem(path: tuple[str | int, ...], name: str) -> list[tuple[tuple[str | int, ...], str]]:
    if not NAME.match(name):
        return [(path, f"{name!r}: a name is lower-case letters, digits, - and _, and starts with a letter")]
    if name in RESERVED:
        return [(path, f"{name!r} is a reserved word; choose another name")]
    return []


def _context_problem(member: str, stage: str, names: list[str], known: list[str]) -> str:
    if member == stage:
        return f"stage {stage!r} cannot be its own context"
    if member in names:
        return f"context {member!r} comes later than {stage!r}; a context names earlier stages (this would be a cycle)"
    return f"context {member!r} names no earlier stage or adapter{near(member, known)}"
