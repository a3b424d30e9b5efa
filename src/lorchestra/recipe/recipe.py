"""The recipe: what a user writes, checked before anything is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    FieldSerializationInfo,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_validator,
)

from lorchestra.errors import RecipeError
from lorchestra.recipe.mistakes import mistakes
from lorchestra.recipe.sections import (
    AUTO,
    EITHER,
    SETTLED,
    SHORTHAND,
    DataEntry,
    Deliver,
    Evaluate,
    Fusion,
    Seeds,
    Split,
    Stage,
    without_auto,
    without_empty,
)
from lorchestra.recipe.sources import source_problem
from lorchestra.recipe.text import Document
from lorchestra.recipe.words import Location, Problem, problems
from lorchestra.train.settings import LoraSettings, Settings, TrainSettings


class Recipe(Settings):
    """A whole recipe; :meth:`load` reads one, and says what is wrong with it in one message."""

    name: str
    base: str
    seeds: Seeds = Seeds()
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "nf4"] = "auto"
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
        if found := mistakes(recipe):
            raise RecipeError(document.listed(found))
        recipe._document = document
        return recipe

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = without_empty(value)
        for section in SETTLED:
            if isinstance(value.get(section), dict):
                value[section] = without_auto(value[section], section)
        return value

    @field_serializer(*SETTLED, mode="wrap")
    def _open(
        self, settings: Settings, dump: SerializerFunctionWrapHandler, info: FieldSerializationInfo
    ) -> dict[str, Any]:
        """What the examples settle is no value of the recipe: it is dumped, and read again, as auto."""
        open_here = [key for key in SETTLED[info.field_name] if key not in settings.model_fields_set]
        return {**dump(settings), **dict.fromkeys(open_here, AUTO)}

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
        """The recipe's defaults with the stage's overrides; what is open has the value of :class:`LoraSettings`."""
        return LoraSettings.model_validate(without_auto({**self.lora.model_dump(), **stage.lora}, "lora"))

    def train_of(self, stage: Stage) -> TrainSettings:
        """The recipe's defaults with the stage's overrides; a stage's ``epochs`` undoes a default ``max_steps``."""
        defaults = self.train.model_dump()
        if "epochs" in stage.train:
            defaults["max_steps"] = None
        return TrainSettings.model_validate(without_auto({**defaults, **stage.train}, "train"))

    def open_keys(self, stage: Stage) -> tuple[str, ...]:
        """``lora.rank``, ``train.epochs`` …: what is set neither on the stage nor for all, and left to its examples.

        A stage's ``auto`` undoes what is set for all. Where ``max_steps`` says how long to train, that is not open.
        """
        found = []
        for section, keys in SETTLED.items():
            given, own = getattr(self, section).model_fields_set, getattr(stage, section)
            found += [f"{section}.{key}" for key in keys if own.get(key, None if key in given else AUTO) == AUTO]
        if self.train_of(stage).max_steps is not None:
            found = [key for key in found if key not in ("train.epochs", "train.patience")]
        return tuple(found)

    def check_sources(self) -> None:
        """Before anything is fetched: are files there, sources in the grammar, mappings of columns sound?

        Raises:
            RecipeError: one message that lists what is wrong, with lines.
        """
        found = []
        for path, text, entry, task in self.sources():
            if problem := source_problem(text, self.directory, entry, task):
                found.append((path, problem))
        self.refuse(found)

    def refuse(self, found: Sequence[Problem]) -> None:
        """Tell what is wrong, whoever found it, with the lines where it stands.

        Raises:
            RecipeError: unless nothing was found.
        """
        if found:
            raise RecipeError(self._document.listed(found))

    def sources(self) -> Iterator[tuple[Location, str, DataEntry | None, Literal["sft", "dpo"]]]:
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
