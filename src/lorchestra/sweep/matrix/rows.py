"""``departments.csv`` → departments, and a department → its recipe; every row is checked before anything is fetched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorchestra.base.source import parse_source
from lorchestra.data.records import Record, read_records
from lorchestra.errors import DataError, RecipeError, SourceError
from lorchestra.recipe.mistakes import RESERVED
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import SHORTHAND, DataEntry, Deliver, Evaluate, Fusion, Stage
from lorchestra.recipe.sources import expand
from lorchestra.recipe.words import near
from lorchestra.train.settings import ContextMember, LoraSettings, Orthogonality, TrainSettings

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
SHOWN = 10  # problems in one message
_OF_STAGE = (*SHORTHAND, "loss", "beta", "label_smoothing")
_OF_FUSION = ("weights", "rank")


@dataclass(frozen=True)
class Department:
    """One row.

    Args:
        name: of the department, and of its directory.
        origin: ``departments.csv:3``.
        overrides: of the recipe, as ``--set`` takes them.
        settings: column → cell, of those that are filled in.
    """

    name: str
    origin: str
    overrides: tuple[str, ...]
    settings: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True)
class Matrix:
    """A recipe, and the departments that its last stage is trained for; :meth:`load` reads one.

    Args:
        path: of the table.
        recipe: of the recipe.
        overrides: of the recipe, for all departments.
        stage: the last stage's name.
        departments: in the table's order.
    """

    path: Path
    recipe: Path
    overrides: tuple[str, ...]
    stage: str
    departments: tuple[Department, ...]

    @classmethod
    def load(cls, path: Path, recipe: Path, overrides: Sequence[str] = ()) -> Matrix:
        """Read and check table and recipe.

        Args:
            path: a ``.csv``, ``.tsv`` or ``.jsonl`` with a column ``name``, one or more of ``data`` and ``data.…``,
                and further keys of the last stage.
            recipe: a YAML file.
            overrides: of the recipe.

        Raises:
            RecipeError: one message that lists what is wrong, with lines and nearest valid keys.
        """
        plain = Recipe.load(recipe, overrides)
        records = _records(path)
        columns = _Columns(plain, path)
        columns.check(list(dict.fromkeys(column for record in records for column in record.values)))
        rows = [{key: text for key, value in record.values.items() if (text := _text(value))} for record in records]
        found = [
            Department(cells.get("name", ""), record.origin, tuple(columns.overrides(cells)), cells)
            for record, cells in zip(records, rows, strict=True)
        ]
        matrix = cls(path.resolve(), recipe.resolve(), tuple(overrides), plain.stages[-1].name, tuple(found))
        matrix.shared().check_sources()
        problems, lines = list[str](), dict[str, str]()
        for department in found:
            problems += _name_problems(department.name, department.origin, lines)
            problems += matrix._problems(department, columns)
        if problems:
            more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise RecipeError("\n".join([*problems[:SHOWN], *more]))
        return matrix

    def recipe_of(self, department: Department) -> Recipe:
        """The recipe with the department's data and settings in its last stage, to be trained and judged on it.

        Raises:
            RecipeError: a value that the recipe does not take.
        """
        return _narrowed(Recipe.load(self.recipe, [*self.overrides, *department.overrides]))

    def shared(self) -> Recipe:
        """The recipe without its last stage; it may have no stage at all."""
        recipe = _narrowed(Recipe.load(self.recipe, self.overrides))
        return recipe.model_copy(update={"stages": recipe.stages[:-1], "fusion": Fusion()})

    def published_name(self, department: Department) -> str:
        """What a department's adapter is called in a registry: its own name, after the recipe's ``publish.name``."""
        publish = self.shared().deliver.publish
        return f"{publish.name}-{department.name}" if publish and publish.name else department.name

    def left_out(self) -> list[str]:
        """What the recipe asks for and departments do not get, a sentence each."""
        recipe = Recipe.load(self.recipe, self.overrides)
        found = []
        if recipe.fusion.weights == "search":
            found.append(
                "fusion.weights: search is not run for every department: each is delivered with the weights that its "
                "stage was trained in (the stack). `lorchestra search` finds weights for one of them"
            )
        if recipe.deliver.merged:
            found.append("deliver.merged: no merged models are made; `lorchestra merge BASE ADAPTER` makes one")
        if recipe.deliver.publish is not None and recipe.deliver.publish.stages:
            found.append(
                f"deliver.publish.stages: the shared stages are pushed; a department's own {self.stage!r} is pushed "
                "only as part of its adapter"
            )
        others = {
            "fusion.refit": recipe.fusion.refit,
            "evaluate.mixed_baseline": recipe.evaluate.mixed_baseline,
            "evaluate.domains": recipe.evaluate.domains,
        }
        if asked := [key for key, value in others.items() if value]:
            found.append(f"{', '.join(asked)}: left out; a run of one department's recipe has them")
        return found

    def _problems(self, department: Department, columns: _Columns) -> list[str]:
        """What is wrong with one row, but for its name."""
        if not any(map(_is_data, map(columns.canonical, department.settings))):
            return [f"{department.origin}: no data: give a source (data), or choose rows of the recipe's (data.where)"]
        try:
            recipe = self.recipe_of(department)
            recipe.check_sources()
        except RecipeError as error:
            return [_at(department, columns, line) for line in str(error).splitlines()]
        weights = recipe.fusion.weights
        if self.stage not in recipe.members or (isinstance(weights, dict) and not weights.get(self.stage)):
            return [
                f"{department.origin}: the fusion gives {self.stage!r} no weight, so nothing of the department would "
                "be delivered; make it a member of the fusion, and give it a weight"
            ]
        return []


def _narrowed(recipe: Recipe) -> Recipe:
    """Without what is not done for every department (:meth:`Matrix.left_out`)."""
    return recipe.model_copy(
        update={
            "fusion": recipe.fusion.model_copy(update={"refit": False}),
            "evaluate": Evaluate(test_limit=recipe.evaluate.test_limit),
            "deliver": Deliver(merged=False, dtype=recipe.deliver.dtype, publish=recipe.deliver.publish),
        }
    )


class _Columns:
    """Which columns there may be, and what they set."""

    def __init__(self, recipe: Recipe, path: Path) -> None:
        self.recipe, self.path = recipe, path
        self.stage = recipe.stages[-1]
        self.known = list(_known(recipe))

    def canonical(self, column: str) -> str:
        """``stages.clinic.lora.rank`` and ``stages.1.lora.rank`` as ``lora.rank``."""
        for name in (self.stage.name, str(len(self.recipe.stages) - 1)):
            column = column.removeprefix(f"stages.{name}.")
        return column

    def check(self, columns: Sequence[str]) -> None:
        """One message about all columns that cannot be.

        Raises:
            RecipeError: a column that is missing, unknown, there twice, or of something that is shared.
        """
        problems, seen = list[str](), dict[str, str]()
        if "name" not in columns:
            problems.append("there is no column 'name', which names the departments")
        for column in columns:
            key = self.canonical(column)
            if key in seen:
                problems.append(f"the columns {seen[key]!r} and {column!r} are the same key")
            seen[key] = column
            if problem := self._problem(column, key):
                problems.append(problem)
        if any(key == "data" or key.startswith("data.") for key in seen) and len(self.stage.data) > 1:
            problems.append(
                f"stage {self.stage.name!r} has {len(self.stage.data)} sources in the recipe, and a department has one "
                "in their place; leave one there (its fields, format, group … hold for every department)"
            )
        if problems:
            raise RecipeError("\n".join(f"{self.path.name}: {problem}" for problem in problems))

    def _problem(self, column: str, key: str) -> str:
        if not column.strip():
            return "a column has no name"
        if key in self.known or key.startswith("data.fields."):
            return ""
        first = column.split(".")[0]
        fields = {"stages": Stage, "fusion": Fusion}
        if first in Recipe.model_fields and first not in fields and first not in ("name", "lora", "train"):
            return (
                f"column {column!r}: what is not of the last stage is the same for all departments, so that shared "
                "stages are trained once; set it in the recipe, or with --set"
            )
        if column.startswith("stages.") and column.split(".")[1] in [stage.name for stage in self.recipe.stages[:-1]]:
            return f"column {column!r}: that stage is shared by all departments; set it in the recipe, or with --set"
        return f"unknown column {column!r}{near(column, self.known) or _hint()}"

    def overrides(self, cells: Mapping[str, str]) -> list[str]:
        """Of one row's cells."""
        found = {self.canonical(key): value for key, value in cells.items() if key != "name"}
        made = [] if not any(_is_data(key) for key in found) else [self._data(found)]
        for key, value in found.items():
            if not _is_data(key):
                made.append(f"{key if key.startswith('fusion.') else f'stages.{self.stage.name}.{key}'}={value}")
        return made

    def _data(self, cells: Mapping[str, str]) -> str:
        """The recipe's one source, with the row's in its place and the row's settings."""
        entry: dict[str, Any] = self.stage.data[0].model_dump(mode="json", exclude_unset=True)
        if "data" in cells:
            entry["source"] = self._source(cells["data"])
        for key, value in cells.items():
            if key.startswith("data."):
                part = key.removeprefix("data.")
                if part.startswith("fields."):
                    entry["fields"] = {**entry.get("fields", {}), part.removeprefix("fields."): value}
                else:
                    entry[part] = value
        return f"stages.{self.stage.name}.data={json.dumps([entry], ensure_ascii=False)}"

    def _source(self, text: str) -> str:
        """A path beside the table, as seen from the recipe; everything else as it is written."""
        beside, here = self.path.resolve().parent, self.recipe.directory
        if beside == here or text.startswith("$"):
            return text
        try:
            body = expand(text)
            file = beside / Path(body.split("#sha256=")[0]).expanduser()
            if parse_source(body, is_path=file.exists()).kind != "path" or Path(body).expanduser().is_absolute():
                return text
        except (SourceError, RecipeError):
            return text  # told with its line when the recipe is checked
        try:
            return Path(os.path.relpath(beside / text, here)).as_posix()
        except ValueError:  # another drive
            return str(file)


def _is_data(key: str) -> bool:
    return key == "data" or key.startswith("data.")


def _known(recipe: Recipe) -> Iterator[str]:
    """Columns, without ``stages.<last>.`` in front."""
    yield from ("name", "data")
    yield from (f"data.{key}" for key in DataEntry.model_fields if key not in ("source", "fields"))
    yield from (f"lora.{key}" for key in LoraSettings.model_fields)
    yield from (f"lora.orthogonality.{key}" for key in Orthogonality.model_fields)
    yield from (f"train.{key}" for key in TrainSettings.model_fields)
    yield from _OF_STAGE
    for name in (*recipe.adapters, *(stage.name for stage in recipe.stages[:-1])):
        yield f"context.{name}"
        yield from (f"context.{name}.{key}" for key in ContextMember.model_fields)
        yield f"fusion.weights.{name}"
    yield f"fusion.weights.{recipe.stages[-1].name}"
    yield from (f"fusion.{key}" for key in _OF_FUSION)


def _hint() -> str:
    return "; a column is name, data, data.where …, or a key of the last stage: lora.rank, train.epochs, context.NAME …"


def _records(path: Path) -> list[Record]:
    """Rows of the table.

    Raises:
        RecipeError: it is not there, cannot be read, or has no rows.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "is not there"
        raise RecipeError(f"the table of departments {path} {what}; it is a CSV file with the columns name and data")
    try:
        found = list(read_records(path))
    except DataError as error:
        raise RecipeError(str(error)) from None
    if not found:
        raise RecipeError(f"{path.name} has no rows; expected one department at least (columns name and data)")
    return [
        Record(record.origin, {str(key).strip(): value for key, value in record.values.items()}) for record in found
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _name_problems(name: str, origin: str, lines: dict[str, str]) -> Iterator[str]:
    """What is wrong with a name; ``lines`` holds those before it, as file systems without capitals see them."""
    if not name:
        yield f"{origin}: the department has no name"
        return
    if not NAME.match(name) or name.endswith("."):
        path = "; it becomes a directory, so it is no path" if "/" in name or "\\" in name or ".." in name else ""
        yield (
            f"{origin}: {name!r}: a name is letters, digits, '.', '_' and '-', begins with a letter or digit, does not "
            f"end with '.', and has 64 characters at most{path}"
        )
    elif name.casefold() in RESERVED:
        yield f"{origin}: {name!r} is a reserved word; choose another name"
    if name.casefold() in lines:
        yield f"{origin}: the name {name!r} is taken by {lines[name.casefold()]}"
    lines.setdefault(name.casefold(), origin)


def _at(department: Department, columns: _Columns, line: str) -> str:
    """A line of a recipe's message, at the row's line and column instead of ``--set …``."""
    for override in department.overrides:
        if f"--set {override}: " in line:
            key = columns.canonical(override.split("=", 1)[0])
            text = line.split(f"--set {override}: ", 1)[1]
            path, _, said = text.partition(": ")
            if " " in path:  # not a place, but the beginning of a sentence
                path, said = "", text
            part = re.search(r"\.data\.(?:0\.)?(\w+)$", path)
            return f"{department.origin}: {f'data.{part[1]}' if part else key}: {said}"
    return f"{department.origin}: {line}"
