"""A recipe as text: YAML with line numbers, dotted overrides, and errors that point at the line."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lorchestra.errors import RecipeError

SHOWN = 8  # problems in one message
Location = tuple[str | int, ...]


@dataclass
class Document:
    """Plain values, and where each stands in the file."""

    name: str
    text: str
    values: dict[str, Any]
    lines: dict[Location, int]

    @classmethod
    def read(cls, path: Path) -> Document:
        """Parse a YAML file.

        Raises:
            RecipeError: it cannot be read, is not YAML, has a key twice, or is no mapping.
        """
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe {path}; `lorchestra init` writes one") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from None
        try:
            tree = YAML(typ="rt").load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise RecipeError(f"{where}: {(error.problem or 'not YAML').strip()}") from None
        except YAMLError as error:
            raise RecipeError(f"{path}: not YAML: {error}") from None
        if not isinstance(tree, dict):
            raise RecipeError(f"{path}: a recipe is a mapping (name:, base:, stages:); this is {type(tree).__name__}")
        lines: dict[Location, int] = {}
        return cls(path.name, text, _plain_values(tree, (), lines), lines)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Document:
        """Values that have no file."""
        return cls("recipe", "", values, {})

    def explain(self, error: ValidationError, model: type[BaseModel]) -> str:
        """One message for all that pydantic found."""
        problems: list[tuple[Location, str]] = []
        for item in error.errors():
            path = tuple(part for part in item["loc"] if not _is_union_tag(part))
            problems.append((path, plain(item, _model_at(model, path[:-1]))))
        return self.listed(problems)

    def listed(self, problems: Sequence[tuple[Location, str]]) -> str:
        """``recipe.yaml:12: stages.0.epoch: unknown key; did you mean 'epochs'?``, one line a problem."""
        unique = list(dict.fromkeys(problems))
        shown = []
        for path, text in unique[:SHOWN]:
            line = self.line(path)
            place = f"{self.name}:{line}" if line else self.name
            dotted = ".".join(map(str, path))
            shown.append(f"{place}: {dotted}: {text}" if dotted else f"{place}: {text}")
        if len(unique) > SHOWN:
            shown.append(f"… and {len(unique) - SHOWN} more")
        return "\n".join(shown)

    def line(self, path: Location) -> int:
        """1-based line of the key, or of the nearest key above it; 0 if unknown."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return 0


def set_dotted(values: dict[str, Any], override: str) -> None:
    """Apply ``stages.0.train.epochs=1`` (or ``stages.NAME.…``) to plain values; the value is YAML.

    Raises:
        RecipeError: no ``=``, or a path through something that is not a mapping or list.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    dotted, sign, text = override.partition("=")
    if not sign or not dotted.strip():
        raise RecipeError(f"override {override!r}: write key.path=value, for example stages.0.train.epochs=1")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except YAMLError:
        value = text
    parts = dotted.strip().split(".")
    here: Any = values
    for depth, part in enumerate(parts[:-1]):
        here = _step(here, part, override, ".".join(parts[:depth]) or "the recipe")
    last = parts[-1]
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    else:
        here[last] = value


def plain(item: Any, model: type[BaseModel] | None) -> str:
    """A pydantic error in plain words."""
    kind, got = item["type"], item.get("input")
    key = str(item["loc"][-1]) if item["loc"] else ""
    if kind == "extra_forbidden":
        known = sorted(model.model_fields) if model else []
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = "" if kind == "value_error" else f" (got {_short(got)})"
    if kind == "literal_error":
        words = item["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        near = difflib.get_close_matches(str(got), words, 1, cutoff=0.5)
        shown += f"; did you mean {near[0]!r}?" if near else ""
    return message + shown


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _plain_values(node: Any, path: Location, lines: dict[Location, int]) -> Any:
    if isinstance(node, dict):
        for key in node:
            lines[(*path, key)] = node.lc.key(key)[0] + 1 if hasattr(node, "lc") else 0
        return {key: _plain_values(value, (*path, key), lines) for key, value in node.items()}
    if isinstance(node, list):
        for i in range(len(node)):
            lines[(*path, i)] = node.lc.item(i)[0] + 1 if hasattr(node, "lc") else 0
        return [_plain_values(value, (*path, i), lines) for i, value in enumerate(node)]
    for kind in (bool, int, float, str):  # ruamel's scalars carry their spelling; plain ones are wanted
        if isinstance(node, kind):
            return kind(node)
    return node


def _step(here: Any, part: str, override: str, where: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, override)]
    if isinstance(here, dict):
        if here.get(part) is None:
            here[part] = {}
        return here[part]
    raise RecipeError(f"override {override!r}: {where} is a plain value; nothing can be set inside it")


def _index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names if name) or f"0 to {len(items) - 1}"
    raise RecipeError(f"override {override!r}: there is no {part!r} in the list; there are {known}")


def _is_union_tag(part: str | int) -> bool:
    """pydantic adds the branch of a union to an error's place; it is no key of the recipe."""
    return isinstance(part, str) and ("[" in part or part in ("str", "float", "int", "constrained-str"))


def _model_at(model: Any, path: Location) -> type[BaseModel] | None:
    """The settings class that the keys at ``path`` belong to."""
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            if field is None:
                return None
            model = field.annotation
        else:
            model = next((a for a in typing.get_args(model) if a is not type(None) and a is not Ellipsis), None)
        model = _settings_in(model)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _settings_in(annotation: Any) -> Any:
    """The annotation without Optional and Annotated; the value type of a mapping stays inside it."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return next((a for a in typing.get_args(annotation) if a is not type(None)), annotation)
    if origin is dict:
        return tuple[typing.get_args(annotation)[1]]  # type: ignore[misc]  # a one-type container to step into
    return annotation
