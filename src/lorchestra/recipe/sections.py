"""The sections of a recipe: what each may hold, and its short forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lorchestra.recipe.gate import Gate, gate_form
from lorchestra.recipe.sources import expand
from lorchestra.train.settings import ContextMember, Objective, Settings

if TYPE_CHECKING:
    from lorchestra.data.load import DataSpec
    from lorchestra.evaluate.goal import Goal

# Keys of `train` that may stand directly on a stage, as in `--set stages.0.epochs=1`.
SHORTHAND = ("epochs", "max_steps", "learning_rate")
EITHER = {"epochs": "max_steps", "max_steps": "epochs"}  # one of them says how long to train

# Keys that the examples settle where the recipe does not (see recipe/suggestions.py): not written, or written as auto.
AUTO = "auto"
SETTLED = {"lora": ("rank", "alpha", "dropout"), "train": ("epochs", "learning_rate", "patience")}

Weights = Literal["search", "equal", "later", "specialised", "last"] | dict[str, float]


class DataEntry(Settings):
    """One source of examples; see :class:`lorchestra.data.load.DataSpec`."""

    source: str
    format: str = "auto"
    fields: dict[str, str] = Field(default_factory=dict)
    group: str | None = None
    where: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    system: str | None = None

    def spec(self) -> DataSpec:
        """For the data room, with allowed environment names filled in."""
        from lorchestra.data.load import DataSpec

        return DataSpec(**{**self.model_dump(), "source": expand(self.source)})


class Seeds(Settings):
    """Initialisation of adapters, and order of the data and splits, apart."""

    init: int = 0
    data: int = 0


class Split(Settings):
    """Shares of the groups: training, λ-validation, sealed test."""

    train: Annotated[float, Field(gt=0, le=1)] = 0.8
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _whole(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + validation + test must be 1; they are {total:g}")
        return self


class Stage(Settings):
    """One stage; ``train`` and ``lora`` override the recipe's defaults key by key."""

    SHORTHAND: ClassVar = SHORTHAND

    name: str
    task: Literal["sft", "dpo"] = "sft"
    data: Annotated[tuple[DataEntry, ...], Field(min_length=1)]
    context: dict[str, ContextMember] = Field(default_factory=dict)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    train: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = without_empty(value)
        if "data" in value:
            value["data"] = data_entries(value["data"])
        if "context" in value:
            value["context"] = _context(value["context"])
        short = {key: value.pop(key) for key in SHORTHAND if key in value}
        train = value.get("train", {})
        if short and isinstance(train, dict):
            if twice := [key for key in short if key in train]:
                raise ValueError(f"{twice[0]!r} stands on the stage and again in its train; keep one of them")
            value["train"] = {**train, **short}
        if value.get("task", "sft") == "sft":
            for key in ("loss", "beta", "label_smoothing"):
                if key in value and value[key] != cls.model_fields[key].default:
                    raise ValueError(f"{key!r} belongs to task: dpo; this stage is sft")
        return value

    @property
    def objective(self) -> Objective:
        """Task, loss and its numbers."""
        return Objective(task=self.task, loss=self.loss, beta=self.beta, label_smoothing=self.label_smoothing)


class Fusion(Settings):
    """How the members' coefficients are chosen. ``candidates`` null leaves their number to the strategy, ``rank`` null
    keeps the exact sum, ``gate`` null fits none."""

    members: tuple[str, ...] = ()
    weights: Weights = "search"
    strategy: Literal["gradient", "surrogate", "tpe", "cmaes", "sobol", "grid", "heuristics"] = "gradient"
    candidates: Annotated[int, Field(ge=1)] | None = None
    validation_limit: Annotated[int, Field(ge=1)] | None = 20
    goal: Literal["mean", "worst"] | dict[str, Annotated[float, Field(ge=0)]] = "mean"
    tolerance: Annotated[float, Field(ge=0)] | None = None
    rule: Literal["one_se", "minimum"] = "one_se"
    folds: Annotated[int, Field(ge=2)] = 5
    repeats: Annotated[int, Field(ge=1)] = 10
    refit: bool = False
    rank: Annotated[int, Field(ge=1)] | None = None
    gate: Gate | None = None

    @field_validator("gate", mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        return gate_form(value)

    def aim(self) -> Goal:
        """The goal with its limit, for the search and the verdict."""
        from lorchestra.evaluate.goal import Goal

        if isinstance(self.goal, dict):
            return Goal("weighted", self.goal, self.tolerance)
        return Goal(self.goal, tolerance=self.tolerance)


class Evaluate(Settings):
    """The verdict on the sealed test. ``domains`` are data sets beside the stages' own."""

    test_limit: Annotated[int, Field(ge=1)] | None = 40
    mixed_baseline: bool = False
    samples: Annotated[int, Field(ge=0)] = 3
    sample_tokens: Annotated[int, Field(ge=1)] = 48
    domains: dict[str, tuple[DataEntry, ...]] = Field(default_factory=dict)

    @field_validator("domains", mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        return {name: data_entries(entry) for name, entry in value.items()} if isinstance(value, dict) else value


class Publish(Settings):
    """Where the fused adapter is pushed after the verdict: a registry, and what it is called there.

    Without a ``name`` it is the recipe's. ``gates`` guard the ``alias``. ``stages`` pushes their adapters too.
    """

    registry: str = "${LORCHESTRA_REGISTRY}"
    name: str = ""
    alias: str = ""
    gates: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    note: str = ""
    stages: bool = False


class Deliver(Settings):
    """What is written at the end: the fused adapter always, a merged model if wished; and where it is published."""

    merged: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    publish: Publish | None = None

    @field_validator("publish", mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        """Anything else would be quoted in the message, and an URL may hold a password."""
        if isinstance(value, dict):
            if not isinstance(value.get("registry", ""), str):
                raise ValueError("its registry is a text: a directory, a URL, or ${LORCHESTRA_REGISTRY}")
            return without_empty(value)
        if value is not None and not isinstance(value, Publish):
            raise ValueError("write a mapping, as in publish: {registry: ~/adapters, name: clinic}")
        return value


def data_entries(value: Any) -> Any:
    """A bare string, one mapping or a list of either, as a list of mappings."""
    values = value if isinstance(value, list | tuple) else [value]
    return [{"source": v} if isinstance(v, str) else v for v in values if v is not None]


def without_auto(values: dict[Any, Any], section: str) -> dict[Any, Any]:
    """The values of ``section`` (``lora``, ``train``) without keys that are left to the examples by the word auto."""
    return {key: value for key, value in values.items() if not (value == AUTO and key in SETTLED[section])}


def without_empty(values: dict[Any, Any]) -> dict[Any, Any]:
    """A section whose lines are all commented out (``fusion:`` and nothing) is as good as not there."""
    return {key: value for key, value in values.items() if value is not None}


def _context(value: Any) -> Any:
    """A name, names, or name → weight or settings, as name → settings."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, list):
        if not all(isinstance(name, str) for name in value):
            raise ValueError("context: expected a list of names ([general]) or a mapping (general: 0.5)")
        return {name: {} for name in value}
    if isinstance(value, dict):
        return {name: _member(setting) for name, setting in value.items()}
    return value


def _member(setting: Any) -> Any:
    if setting is None:
        return {}
    return {"weight": setting} if isinstance(setting, int | float | str) and not isinstance(setting, bool) else setting
