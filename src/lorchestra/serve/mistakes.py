"""What pydantic found in a request, in a sentence: the field, what stands there, what was expected."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "a text",
    "string_unicode": "a text of whole characters", "list_type": "a list", "dict_type": "an object",
    "model_type": "an object", "model_attributes_type": "an object",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("more than", "gt"), "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"), "less_than_equal": ("at most", "le"),
}  # fmt: skip
_BRANCH = re.compile(r"str|int|float|bool|(?:list|dict|constrained|nullable|literal|function)[-\[].*", re.S)
_SHOWN = 60  # characters of a wrong value


def mistake(error: ValidationError, kind: type[BaseModel]) -> tuple[str, str | None]:
    """The first mistake.

    Returns:
        A sentence, and the field it is about (``messages.1.role``).
    """
    found: dict[tuple[str | int, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_place(item["loc"]), []).append(item)
    # A misspelt field is the cause of a missing one.
    # A branch of a union, or a list, is wrong only because of something inside it: that is told, this is not.
    for at in list(found):
        inner = any(other[: len(at)] == at and len(other) > len(at) for other in found)
        if inner and all(item["type"] in _EXPECTED for item in found[at]):
            del found[at]
    place = min(found, key=lambda at: (found[at][0]["type"] != "extra_forbidden", list(found).index(at)))
    items = found[place]
    name = ".".join(map(str, place))
    if items[0]["type"] == "value_error":
        said = str(items[0]["ctx"]["error"])
        field, colon, _ = said.partition(":")
        return (said, field) if colon and not place else (f"{name}: {said}" if name else said, name or None)
    return f"{name}: {_sentence(items, place, kind)}", name


def _sentence(items: list[Any], place: tuple[str | int, ...], kind: type[BaseModel]) -> str:
    first = items[0]
    if first["type"] == "extra_forbidden":
        return _unknown(str(place[-1]), _model_at(kind, place[:-1]))
    if first["type"] == "missing":
        return "it is missing, and must be there"
    expected = dict.fromkeys(_wanted(item) for item in items)
    return f"got {_shown(first['input'])}, expected {' or '.join(expected)}"


def _wanted(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"{words} {context[name]:g}" if abs(context[name]) < 1e6 else f"{words} {context[name]}"
    if kind in ("too_long", "string_too_long"):
        return f"at most {context['max_length']} {'characters' if kind[0] == 's' else 'of them'}"
    if kind in ("too_short", "string_too_short"):
        return "a text that is not empty" if kind[0] == "s" else f"at least {context['min_length']} of them"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    return _EXPECTED.get(kind) or str(item["msg"])[:1].lower() + str(item["msg"])[1:]


def _unknown(name: str, model: type[BaseModel]) -> str:
    near = difflib.get_close_matches(name, model.model_fields, 1)
    return (
        f"no such field; did you mean {near[0]!r}?"
        if near
        else f"no such field; there are {', '.join(model.model_fields)}"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _place(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """``loc`` without the names of a union's branches, which pydantic puts in between."""
    return tuple(part for part in loc if isinstance(part, int) or not (_BRANCH.fullmatch(part) or part == "[key]"))


def _model_at(kind: type[BaseModel], place: tuple[str | int, ...]) -> type[BaseModel]:
    """The object of a request that stands at ``place``."""
    for part in place:
        if isinstance(part, str) and part in kind.model_fields:
            kind = next(_models(kind.model_fields[part].annotation), kind)
    return kind


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)
