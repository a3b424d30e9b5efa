"""The recipe: what a user writes, checked before anything is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from lorchestra.errors import RecipeError
from lorchestra.pipeline.recipe_sources import expand as expand
from lorchestra.pipeline.recipe_sources import source_problem, variable_problem
from lorchestra.pipeline.recipe_text import Document
from lorchestra.pipeline.recipe_words import Location, Problem, near, problems
from lorchestra.train.settings import ContextMember, LoraSettings, Objective, Settings, TrainSettings

if TYPE_CHECKING:
    from lorchestra.data.load import DataSpec

NAME = re.compile(r"^[a-z][a-z0-9_-]{0,63}$")
RESERVED = {"base", "auto", "uniform", "stack", "mixed", "chosen", "delivered", "new"}
# Keys of `train` that may stand directly on a stage, as in `--set stages.0.epochs=1`.
SHORTHAND = ("epochs", "max_steps", "learning_rate")
EITHER = {"epochs": "max_steps", "max_steps": "epochs"}  # one of them says how long to train
DEVICE = re.compile(r"^(auto|cpu|mps|cuda(:\d+)?)$")

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
        value = _without_empty(value)
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
    """How the members' coefficients are chosen. ``rank`` null keeps the exact sum."""

    members: tuple[str, ...] = ()
    weights: Weights = "search"
    candidates: Annotated[int, Field(ge=1)] = 12
    validation_limit: Annotated[int, Field(ge=1)] | None = 20
    rank: Annotated[int, Field(ge=1)] | None = None


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


class Deliver(Settings):
    """What is written at the end: the fused adapter always, a merged model if wished."""

    merged: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"


class Recipe(Settings):
    """A whole recipe; :meth:`load` reads one, and says what is wrong with it in one message."""

    name: str
    base: str
    seeds: Seeds = Seeds()
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_length: Annotated[int, Field(ge=8)] = 512
    supervise: Literal["assistant", "last"] = "assistant"
    split: Split = Split()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    adapters: dict[str, str] = Field(default_factory=dict)
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    fusion: Fusion = Fusion()
    evaluate: Evaluate = Evaluate()
    deliver: Deliver = Deliver()

    _directory: Path = PrivateAttr(default_factory=Path)
    _document: Document = PrivateAttr(default_factory=lambda: Document.of({}))
    _path: Path | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read and check a recipe.

        Args:
            path: a YAML file.
            overrides: ``stages.0.train.epochs=1`` or ``stages.clinic.lora.rank=4``; values are YAML.

        Raises:
            RecipeError: one message that lists what is wrong, with lines and nearest valid keys.
        """
        path = Path(path)
        document = Document.read(path)
        for override in overrides:
            _settle(document, document.override(override))
        recipe = cls._checked(document)
        recipe._directory = path.resolve().parent
        recipe._path = path.resolve()
        return recipe

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], directory: Path | None = None) -> Recipe:
        """A recipe from plain values; relative paths are relative to ``directory``."""
        recipe = cls._checked(Document.of(dict(values)))
        recipe._directory = (directory or Path()).resolve()
        recipe._document.text = recipe.model_dump_json(indent=2)
        return recipe

    @classmethod
    def _checked(cls, document: Document) -> Recipe:
        try:
            recipe = cls.model_validate(document.values)
        except ValidationError as error:
            raise RecipeError(document.listed(problems(error, cls))) from None
        if found := recipe._problems():
            raise RecipeError(document.listed(found))
        recipe._document = document
        return recipe

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, value: Any) -> Any:
        return _without_empty(value) if isinstance(value, dict) else value

    @property
    def directory(self) -> Path:
        """What relative paths are relative to."""
        return self._directory

    @property
    def path(self) -> Path | None:
        """The file it was read from, if any."""
        return self._path

    @property
    def text(self) -> str:
        """As it was written: ``${NAME}`` is not filled in."""
        return self._document.text

    @property
    def members(self) -> tuple[str, ...]:
        """Adapters that take part in the fusion, in order."""
        return self.fusion.members or tuple(stage.name for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage called ``name``."""
        return next(stage for stage in self.stages if stage.name == name)

    def lora_of(self, stage: Stage) -> LoraSettings:
        """The recipe's defaults with the stage's overrides."""
        return LoraSettings.model_validate({**self.lora.model_dump(), **stage.lora})

    def train_of(self, stage: Stage) -> TrainSettings:
        """The recipe's defaults with the stage's overrides; a stage's ``epochs`` undoes a default ``max_steps``."""
        defaults = self.train.model_dump()
        if "epochs" in stage.train:
            defaults["max_steps"] = None
        return TrainSettings.model_validate({**defaults, **stage.train})

    def check_sources(self) -> None:
        """Before anything is fetched: are files there, sources in the grammar, mappings of columns sound?

        Raises:
            RecipeError: one message that lists what is wrong, with lines.
        """
        found = []
        for path, text, entry, task in self._sources():
            if problem := source_problem(text, self.directory, entry, task):
                found.append((path, problem))
        if found:
            raise RecipeError(self._document.listed(found))

    def _sources(self) -> Iterator[tuple[Location, str, DataEntry | None, Literal["sft", "dpo"]]]:
        """Place, text, data entry (``None`` of a base or adapter) and task of everything that is read."""
        yield ("base",), self.base, None, "sft"
        for name, text in self.adapters.items():
            yield ("adapters", name), text, None, "sft"
        for i, stage in enumerate(self.stages):
            for k, entry in enumerate(stage.data):
                yield ("stages", i, "data", k), entry.source, entry, stage.task
        for name, entries in self.evaluate.domains.items():
            for k, entry in enumerate(entries):
                yield ("evaluate", "domains", name, k), entry.source, entry, "sft"

    def _problems(self) -> list[Problem]:
        """What the types cannot say: names, references, order."""
        found: list[Problem] = []
        known: list[str] = list(self.adapters)
        for name in self.adapters:
            found += _name_problem(("adapters", name), name)
        names = [stage.name for stage in self.stages]
        for i, stage in enumerate(self.stages):
            at = ("stages", i)
            found += _name_problem((*at, "name"), stage.name)
            if stage.name in known:
                found.append(((*at, "name"), f"the name {stage.name!r} is used twice"))
            for member in stage.context:
                if member not in known:
                    found.append(((*at, "context", member), _context_problem(member, stage.name, names, known)))
            for key, read in (("lora", self.lora_of), ("train", self.train_of)):
                try:
                    read(stage)
                except ValidationError as error:
                    model = LoraSettings if key == "lora" else TrainSettings
                    found += problems(error, type(self), model, (*at, key))
            if all(stage.train.get(key) is not None for key in EITHER):
                found.append(((*at, "train"), "give epochs or max_steps, not both"))
            known.append(stage.name)
        for member in self.fusion.members:
            if member not in known:
                found.append(
                    (("fusion", "members"), f"{member!r} is no stage or adapter of this recipe{near(member, known)}")
                )
        if isinstance(self.fusion.weights, dict):
            for name in self.fusion.weights:
                if name not in self.members:
                    found.append(
                        (("fusion", "weights", name), f"{name!r} is no member of the fusion{near(name, self.members)}")
                    )
        if self.fusion.weights == "search" and self.split.validation == 0:
            found.append(
                (
                    ("split", "validation"),
                    "is 0, but fusion.weights: search chooses on this part; give it a share, or set fusion.weights "
                    "(equal, later, specialised, last, or a number for each member)",
                )
            )
        for name in self.evaluate.domains:
            found += _name_problem(("evaluate", "domains", name), name)
            if name in names:
                found.append((("evaluate", "domains", name), f"{name!r} is a stage, which is a domain already"))
        if not NAME.match(self.name):
            found.append((("name",), f"{self.name!r}: a name is lower-case letters, digits, - and _"))
        if self.train.max_steps is not None and self.train.epochs != TrainSettings.model_fields["epochs"].default:
            found.append((("train",), "give epochs or max_steps, not both"))
        members = self.fusion.members
        for member in dict.fromkeys(member for member in members if members.count(member) > 1):
            found.append((("fusion", "members"), f"{member!r} is here twice"))
        if not DEVICE.match(self.device):
            found.append((("device",), f"expected auto, cpu, cuda, cuda:0 … or mps, got {self.device!r}"))
        for path, text, _, _ in self._sources():
            if problem := variable_problem(text):
                found.append((path, problem))
        return found


def data_entries(value: Any) -> Any:
    """A bare string, one mapping or a list of either, as a list of mappings."""
    values = value if isinstance(value, list | tuple) else [value]
    return [{"source": v} if isinstance(v, str) else v for v in values if v is not None]


def _settle(document: Document, path: Location) -> None:
    """An override wins over the other spelling of its key, and over the other way to say how long to train."""
    *above, key = path
    if key not in SHORTHAND or not (above == ["train"] or (len(above) in (2, 3) and above[0] == "stages")):
        return
    homes = [tuple(above)]
    if above[0] == "stages":
        homes = [tuple(above[:2]), (*above[:2], "train")]
    for home in homes:
        values: Any = document.values
        for part in home:
            values = values.get(part) if isinstance(values, dict) else values[part] if values else None
        for name in (key, EITHER.get(str(key))):
            if isinstance(values, dict) and name in values and (*home, name) != path:
                del values[name]
                document.forget((*home, str(name)))


def _without_empty(values: dict[Any, Any]) -> dict[Any, Any]:
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
