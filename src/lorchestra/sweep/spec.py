"""The sweep's specification: what a user writes, checked before anything is fetched."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from lorchestra.errors import RecipeError
from lorchestra.recipe.text import Document
from lorchestra.recipe.words import near, problems, shown
from lorchestra.train.settings import Positive, Settings

# Keys of ours beside those of the recipe: what is done to the training examples of the stage.
DATA_KEYS = ("data.size", "data.noise", "data.imbalance")
IDLE = ("name", "fusion", "evaluate", "deliver")  # keys of a recipe that come after its stages
RANKS = (4, 8, 16, 32)  # of a sweep that was asked for without axes: the article's table
NAME_RULE = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Anchor(Settings):
    """All scalings have the same scale γ at one rank: alpha of a cell follows from it.

    γ = ``scale`` at ``rank``; elsewhere it falls as 1/r (``lora``), as 1/√r (``rslora``) or not at all (``constant``).
    """

    rank: Annotated[int, Field(ge=1)] = 8
    scale: Positive = 2.0

    def alpha(self, scaling: Literal["lora", "rslora", "constant"]) -> float:
        """The alpha that gives this scale at this rank."""
        return self.scale * {"lora": float(self.rank), "rslora": math.sqrt(self.rank), "constant": 1.0}[scaling]


class Halving(Settings):
    """Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943; asynchronous: Li et al. 2020, arXiv 1810.05934).

    A cell is looked at after ``first`` of its steps, then after ``reduction`` times as many, and so on; it goes on
    while its validation loss is among the best 1/``reduction`` of those that were looked at there before it.
    """

    first: Annotated[float, Field(gt=0, lt=1)] = 0.25
    reduction: Annotated[int, Field(ge=2)] = 3

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of the steps after which a cell is looked at."""
        found = []
        share = self.first
        while share < 1:
            found.append(share)
            share *= self.reduction
        return tuple(found)


class SweepSpec(Settings):
    """A whole sweep; :meth:`load` reads one.

    Args:
        recipe: the recipe, a path relative to the specification.
        stage: whose adapter is trained over and over; the last one by default. Earlier ones are trained once.
        name: of the sweep, and of the directory of its results.
        set: dotted keys that all cells share.
        axes: dotted key → its values. ``lora.…`` and ``train.…`` are the stage's; ``data.size``, ``data.noise`` and
            ``data.imbalance`` change its training examples; everything else is a key of the recipe.
        tune: as ``axes``, but of these values every cell keeps the one with the lowest validation loss (first seed).
        seeds: of initialisation and data order; a number stands for 0, 1, … The split stays the recipe's.
        anchor: let ``lora.alpha`` follow from scaling and rank.
        scaled_learning_rate: γ·lr, held in all cells: a cell's learning rate is this over its scale γ.
        folds: cross-validate K-fold instead of holding one test set out; ``auto`` asks the number of examples.
        test_limit: test items a cell is judged on.
        halving: stop cells early that are hopeless.
        keep_adapters: keep every cell's adapter in the cache, not its scores alone.
    """

    recipe: str
    stage: str | None = None
    name: Annotated[str, Field(pattern=f"^{NAME_RULE}$")]
    set: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, tuple[Any, ...]] = Field(default_factory=lambda: {"lora.rank": RANKS})
    tune: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    anchor: Anchor | None = None
    scaled_learning_rate: Positive | None = None
    folds: Annotated[int, Field(ge=2)] | Literal["auto"] | None = None
    test_limit: Annotated[int, Field(ge=1)] | None = None
    halving: Halving | None = None
    keep_adapters: bool = False

    _directory: Path = PrivateAttr(default_factory=Path)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> SweepSpec:
        """Read a specification; a recipe is one too: its last stage, over the ranks of the article's table.

        Args:
            path: a YAML file.
            overrides: ``seeds=5``, or ``axes={lora.rank: [4, 8]}``; values are YAML.

        Raises:
            RecipeError: one message that lists what is wrong, with lines and nearest valid keys.
        """
        path = Path(path)
        document = Document.read(path)
        if "stages" in document.values:
            document = Document.of({"recipe": path.name}, "sweep")
        document.values.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "sweep")
        for override in overrides:
            document.override(override)
        spec = cls._checked(document)
        spec._directory = path.resolve().parent
        return spec

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], directory: Path | None = None) -> SweepSpec:
        """From plain values; ``recipe`` is relative to ``directory``."""
        spec = cls._checked(Document.of(dict(values), "sweep"))
        spec._directory = (directory or Path()).resolve()
        return spec

    @classmethod
    def _checked(cls, document: Document) -> SweepSpec:
        try:
            return cls.model_validate(document.values)
        except ValidationError as error:
            raise RecipeError(document.listed(problems(error, cls))) from None

    @field_validator("seeds", mode="before")
    @classmethod
    def _numbered(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"expected at least one seed, got {value}")
            return tuple(range(value))
        return value

    @field_validator("axes", "tune", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: inner if isinstance(inner, list | tuple) else [inner] for key, inner in value.items()}

    @field_validator("halving", "anchor", mode="before")
    @classmethod
    def _switched_on(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, bool | Mapping | Settings):
            raise ValueError(f"expected true, or its settings (key: value), got {shown(value)}")
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _sound(self) -> SweepSpec:
        for section, axes in (("axes", self.axes), ("tune", self.tune), ("set", self.set)):
            for key in axes:
                if key.startswith("data.") and key not in DATA_KEYS:
                    raise ValueError(
                        f"{section}: unknown key {key!r}; there are {', '.join(DATA_KEYS)}{near(key, DATA_KEYS)}"
                    )
                if key.startswith("seeds"):
                    raise ValueError(f"{section}: seeds have a key of their own here: seeds: [0, 1, 2]")
        for section, lists in (("axes", self.axes), ("tune", self.tune)):
            for key, values in lists.items():
                if (first := key.split(".")[0]) in IDLE:
                    raise ValueError(
                        f"{section}: {key} changes nothing here: a sweep trains one stage and judges it alone, {first} "
                        "comes after that"
                    )
                if not values:
                    raise ValueError(f"{section}: {key} has no values")
                if any(value in values[:k] for k, value in enumerate(values)):
                    raise ValueError(f"{section}: {key} names a value twice")
        for key, value in self._amounts():
            expected = _amount_problem(key, value)
            if expected:
                raise ValueError(f"{key}: expected {expected}, got {shown(value)}")
        if wrong := [key for key in self.tune if key in DATA_KEYS]:
            raise ValueError(f"tune: {wrong[0]} is no setting to choose by validation loss; make it an axis")
        keys = [*self.axes, *self.tune, *self.set]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{twice[0]} stands in more than one of axes, tune and set")
        rate = self.scaled_learning_rate
        settled = {"lora.alpha": ("anchor", self.anchor), "train.learning_rate": ("scaled_learning_rate", rate)}
        for key, (name, given) in settled.items():
            if given is not None and key in keys:
                raise ValueError(f"{name} settles {key}; leave one of them out")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError("seeds: expected different numbers, at least one")
        return self

    def _amounts(self) -> Iterator[tuple[str, Any]]:
        """Every value of a key that changes the examples."""
        for key in DATA_KEYS:
            yield from ((key, value) for value in (*self.axes.get(key, ()), *self.tune.get(key, ())))
            if key in self.set:
                yield key, self.set[key]

    @property
    def directory(self) -> Path:
        """What the recipe's path is relative to."""
        return self._directory


def _amount_problem(key: str, value: Any) -> str:
    """What a value of ``data.size``, ``data.noise`` or ``data.imbalance`` should be; empty if it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "data.size":
        return "" if isinstance(value, int) and number and value >= 1 else "a number of examples, 1 or more"
    if key == "data.noise":
        return "" if number and 0 <= value <= 1 else "a share from 0 to 1 (0.2 is one label in five)"
    return "" if number and 1 <= value < math.inf else "largest class : smallest class, 1 or more"
