"""A specification → its cells, and a cell → its recipe."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorchestra.errors import RecipeError
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import SHORTHAND
from lorchestra.recipe.words import near, shown
from lorchestra.sweep.spec import DATA_KEYS, SweepSpec
from lorchestra.train.settings import LoraSettings


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        settings: key → value: the axes, and of the tuned keys the value that is tried.
        seed: of initialisation and data order.
        fold: which fold is the test, of a cross-validation; ``None`` for the recipe's own split.
    """

    settings: Mapping[str, Any] = field(hash=False)
    seed: int
    fold: int | None = None

    def of(self, keys: Sequence[str]) -> str:
        """The cell's values of ``keys`` as one text: what cells have in common."""
        return json.dumps([self.settings[key] for key in keys], default=str)

    @property
    def name(self) -> str:
        """``rank 8 · scaling rslora · seed 0``: as it is called on a terminal."""
        parts = [*called(self.settings)]
        parts.append(f"seed {self.seed}")
        return " · ".join(parts if self.fold is None else [*parts, f"fold {self.fold + 1}"])


def called(settings: Mapping[str, Any]) -> list[str]:
    """``rank 8``, ``scaling rslora``, ``learning_rate 1e-05``, ``context general 1``."""
    return [f"{key.rpartition('.')[2]} {worded(value)}" for key, value in settings.items()]


def worded(value: Any) -> str:
    """A value in few words: of a mapping all of it, ``mode penalty, weight 0.1``; of an empty one ``none``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {worded(inner)}" for key, inner in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else shown(value).strip("'")


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last axis fastest; one empty combination without axes."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cells(
    spec: SweepSpec, tuned: Mapping[str, Mapping[str, Any]] | None = None, folds: int | None = None
) -> list[Cell]:
    """Cells of the sweep, seed by seed: a sweep that is stopped has every setting with the first seeds.

    Args:
        spec: the specification.
        tuned: a setting (:func:`setting_key`) → the values of the tuned keys it keeps; without it they are left out.
        folds: K of a cross-validation.
    """
    out = []
    for seed in spec.seeds:
        for fold in range(folds) if folds else (None,):
            for settings in grid(spec.axes):
                kept = (tuned or {}).get(setting_key(settings), {})
                out.append(Cell({**settings, **kept}, seed, fold))
    return out


def tuning_cells(spec: SweepSpec, folds: int | None = None) -> list[Cell]:
    """What is trained to choose the tuned keys: all their values in every setting, with the first seed and fold."""
    fold = 0 if folds else None
    return [
        Cell({**settings, **tried}, spec.seeds[0], fold) for settings in grid(spec.axes) for tried in grid(spec.tune)
    ]


def setting_key(settings: Mapping[str, Any]) -> str:
    """A setting as one text, whatever the order of its keys."""
    return json.dumps(dict(sorted(settings.items())), default=str)


def stage_name(spec: SweepSpec, recipe: Recipe) -> str:
    """The stage that is swept.

    Raises:
        RecipeError: no stage of the recipe is called that.
    """
    names = [stage.name for stage in recipe.stages]
    if spec.stage is not None and spec.stage not in names:
        raise RecipeError(
            f"stage: the recipe has no stage {spec.stage!r}; there are {', '.join(names)}{near(spec.stage, names)}"
        )
    return spec.stage or names[-1]


def recipe_of(spec: SweepSpec, cell: Cell) -> Recipe:
    """The recipe with the cell's settings in it.

    Raises:
        RecipeError: a key that a recipe does not have, or a value that it does not take.
    """
    path = spec.directory / spec.recipe
    settings = {**spec.set, **cell.settings}
    plain = Recipe.load(path)
    name = stage_name(spec, plain)
    places: dict[str, str] = {}
    for key in settings:
        if (place := _place(name, key)) in places:
            raise RecipeError(f"{places[place]} and {key} are the same key of the recipe; keep one of them")
        places[place] = key
    given = {_override(name, key, value): key for key, value in settings.items() if key not in DATA_KEYS}
    overrides = list(given)
    try:
        recipe = Recipe.load(path, overrides)
    except RecipeError as error:
        raise RecipeError("\n".join(_blamed(spec, given, line) for line in str(error).splitlines())) from None
    derived = _derived(spec, recipe.lora_of(recipe.stage(name)))
    if derived:
        recipe = Recipe.load(path, [*overrides, *(_override(name, key, value) for key, value in derived.items())])
    return recipe


def _blamed(spec: SweepSpec, given: Mapping[str, str], line: str) -> str:
    """A line of a recipe's message, at the key of the specification instead of ``--set …``.

    Args:
        spec: the specification.
        given: override → the key it was made of.
        line: ``--set stages.clinic.lora.rnk=4: stages.1.lora.rnk: unknown key …``.
    """
    for override, key in given.items():
        if (head := f"--set {override}: ") in line:
            section = next(name for name in ("axes", "tune", "set") if key in getattr(spec, name))
            path, colon, said = line.split(head, 1)[1].partition(": ")
            if " " in path:  # not a place, but the beginning of a sentence
                path, said = key, path + colon + said
            if is_of_stage(key):
                path = re.sub(r"^stages\.\d+\.", "", path)
            return f"{section}: {path}: {said}"
    return line


def _derived(spec: SweepSpec, lora: LoraSettings) -> dict[str, Any]:
    """Settings that follow from the cell's: alpha from the anchor, the learning rate from the scale."""
    found: dict[str, Any] = {}
    if spec.anchor is not None:
        found["lora.alpha"] = spec.anchor.alpha(lora.scaling)
        lora = lora.model_copy(update={"alpha": found["lora.alpha"]})
    if spec.scaled_learning_rate is not None:
        found["lora.rank"] = lora.rank  # left open, it would be settled later, and the scale with it
        found["lora.alpha"] = lora.alpha
        found["train.learning_rate"] = spec.scaled_learning_rate / lora.scale
    return found


def _override(stage: str, key: str, value: Any) -> str:
    """``lora.rank`` is the stage's: stages before it stay what they are."""
    return f"{_place(stage, key)}={json.dumps(value)}"


def _place(stage: str, key: str) -> str:
    return f"stages.{stage}.{key}" if is_of_stage(key) else key


def is_of_stage(key: str) -> bool:
    """Whether a key says how the swept stage is trained, without naming it."""
    return key.split(".")[0] in ("lora", "train", *SHORTHAND)


def condition(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What two cells must have in common for their validation losses to be compared: all but how they are trained.

    Losses on the same items are compared across ranks, learning rates, contexts; not across noise, sizes, bases.
    """
    return {key: value for key, value in settings.items() if not _is_training(key)}


def _is_training(key: str) -> bool:
    words = key.split(".")
    if words[0] == "stages" and len(words) > 2:
        return words[2] in ("context", "lora", "train", *SHORTHAND)
    return is_of_stage(key)
