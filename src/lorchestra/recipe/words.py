"""What pydantic found in a recipe, in plain words: what was expected, what stands there, the nearest valid key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

Location = tuple[str | int, ...]
Problem = tuple[Location, str]

_NUMBER, _WHOLE, _SWITCH, _TEXT = "a number", "a whole number", "true or false", "a text"
_MAPPING, _LIST = "a mapping (key: value)", "a list"
_EXPECTED = {
    "int_type": _WHOLE, "int_parsing": _WHOLE, "int_from_float": _WHOLE, "int_parsing_size": _WHOLE,
    "float_type": _NUMBER, "float_parsing": _NUMBER, "finite_number": "a finite number",
    "bool_type": _SWITCH, "bool_parsing": _SWITCH,
    "string_type": _TEXT, "invalid_key": "a text as key",
    "dict_type": _MAPPING, "mapping_type": _MAPPING, "model_type": _MAPPING, "model_attributes_type": _MAPPING,
    "tuple_type": _LIST, "list_type": _LIST,
}  # fmt: skip
_TAGS = ("str", "float", "int", "constrained-str", "constrained-int")  # branches of a union
_BOUNDS = {
    "greater_than": ("more than", "gt"), "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"), "less_than_equal": ("at most", "le"),
}  # fmt: skip


def problems(
    error: ValidationError, root: type[BaseModel], model: type[BaseModel] | None = None, at: Location = ()
) -> list[Problem]:
    """Every mistake once, with its place.

    Args:
        error: from validating ``model``.
        root: the whole recipe's settings, to say where a key belongs.
        model: the settings that were validated; ``root`` by default.
        at: where they stand in the recipe.
    """
    model = model or root
    found: dict[Location, list[Any]] = {}
    for item in error.errors():
        path = tuple(part for part in item["loc"] if not _is_union_tag(part))
        found.setdefault(path, []).append(item)
    misspelt = {
        (*path[:-1], _nearest(str(path[-1]), _model_at(model, path[:-1]), root))
        for path, items in found.items()
        if items[0]["type"] == "extra_forbidden"
    }
    out: list[Problem] = []
    for path, items in found.items():
        if items[0]["type"] == "missing" and path in misspelt:
            continue  # it is there, under another spelling, which is told
        # A branch of a union, or a list, is wrong only because of something inside it: that is told, this is not.
        inner = any(other[: len(path)] == path and len(other) > len(path) for other in found)
        if inner and all(item["type"] in (*_EXPECTED, "literal_error", "too_short") for item in items):
            continue
        out.append(((*at, *path), _sentence(items, path, _model_at(model, path[:-1]), root)))
    return out


def _sentence(items: Sequence[Any], path: Location, model: type[BaseModel] | None, root: type[BaseModel]) -> str:
    kind, key = items[0]["type"], str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        return unknown_key(key, model, root)
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind == "value_error":
        return str(items[0]["msg"]).removeprefix("Value error, ")
    got = items[0].get("input")
    expected, words = [], list[str]()
    for item in items:
        kind, context = item["type"], item.get("ctx", {})
        if kind == "literal_error":
            words += [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
            expected.append(f"one of {', '.join(words)}")
        elif kind == "too_short":
            expected.append(f"at least {context['min_length']} of them")
        elif kind in _BOUNDS:
            bound, name = _BOUNDS[kind]
            expected.append(f"{bound} {context[name]:g}")
        elif kind in _EXPECTED:
            expected.append(_EXPECTED[kind])
        else:
            expected.append(str(item["msg"])[:1].lower() + str(item["msg"])[1:])
    hint = near(str(got), words) if isinstance(got, str) else ""
    return f"expected {' or '.join(dict.fromkeys(expected))}, got {shown(got)}{hint or _hint(expected, got)}"


def _hint(expected: Sequence[str], got: Any) -> str:
    """What to write instead, where it is plain."""
    if _TEXT in expected and not isinstance(got, (dict, list, tuple)) and got is not None:
        return f"; put it in quotes: '{got}'"
    if _LIST in expected and isinstance(got, str):
        return f"; write [{got}]"
    if _LIST in expected and isinstance(got, dict):
        return "; begin each entry with '- '"
    return ""


def unknown_key(key: str, model: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """Says where the key belongs, or its nearest neighbour, or what there is."""
    known = _keys(model)
    homes: dict[str, str] = {}
    for name, home in _homes(root):
        homes[name] = f"{homes[name]} or {home}" if name in homes else home
    homes = dict(_inner_homes(root)) | homes  # a key of an outer section is meant before its namesake inside another
    if key in homes:
        return f"unknown key {key!r} here; it belongs {homes[key]}"
    nearest = _nearest(key, model, root)
    if nearest in known:
        return f"unknown key {key!r}; did you mean {nearest!r}?"
    if nearest:
        return f"unknown key {key!r}; did you mean {nearest!r}? It belongs {homes[nearest]}"
    return f"unknown key {key!r}; there are {', '.join(known)}"


def _nearest(key: str, model: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """A valid key here of which ``key`` is a word (``steps`` of ``max_steps``), or the one, here or elsewhere in the
    recipe, that is spelt most like it; empty if none is.
    """
    parts = [name for name in _keys(model) if key in name.split("_")]
    if len(parts) == 1:
        return parts[0]
    homes = dict.fromkeys(name for name, _ in (*_homes(root), *_inner_homes(root)))
    return next(iter(difflib.get_close_matches(key, [*_keys(model), *homes], 1)), "")


def _keys(model: type[BaseModel] | None) -> list[str]:
    return sorted([*model.model_fields, *getattr(model, "SHORTHAND", ())]) if model else []


def near(word: str, words: Sequence[str], cutoff: float = 0.5) -> str:
    """``; did you mean 'x'?``, or nothing."""
    found = difflib.get_close_matches(word, list(words), 1, cutoff=cutoff)
    return f"; did you mean {found[0]!r}?" if found else ""


def shown(value: Any) -> str:
    """A value as it was written, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping" + (f" with {', '.join(map(str, value))}" if value else "")
    text = repr(list(value)) if isinstance(value, list | tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _homes(root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Key and the section of the recipe it belongs to."""
    yield from ((name, "at the top of the recipe") for name in root.model_fields)
    for name, field in root.model_fields.items():
        annotation = _settings_in(field.annotation)
        if _is_settings(annotation):
            yield from ((key, f"under {name}") for key in annotation.model_fields)
        elif typing.get_origin(annotation) is tuple:
            entry = next((a for a in typing.get_args(annotation) if _is_settings(a)), None)
            if entry is not None:
                own = entry.model_fields.keys() - root.model_fields.keys()
                yield from ((key, f"in an entry of {name}") for key in sorted(own))


def _inner_homes(root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Key and section, for sections inside sections (``fusion.gate``)."""
    for name, field in root.model_fields.items():
        section = _settings_in(field.annotation)
        for inner, below in section.model_fields.items() if _is_settings(section) else ():
            annotation = _settings_in(below.annotation)
            if _is_settings(annotation):
                yield from ((key, f"under {name}.{inner}") for key in annotation.model_fields)


def _is_settings(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _is_union_tag(part: str | int) -> bool:
    """pydantic adds the branch of a union to an error's place; it is no key of the recipe."""
    return isinstance(part, str) and ("[" in part or part in _TAGS)


def _model_at(model: Any, path: Location) -> type[BaseModel] | None:
    """The settings class that the keys at ``path`` belong to."""
    for part in path:
        if _is_settings(model):
            field = model.model_fields.get(str(part))
            if field is None:
                return None
            model = field.annotation
        else:
            model = next((a for a in typing.get_args(model) if a is not type(None) and a is not Ellipsis), None)
        model = _settings_in(model)
    return model if _is_settings(model) else None


def _settings_in(annotation: Any) -> Any:
    """The annotation without Optional and Annotated; the value type of a mapping stays inside it."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return next((a for a in typing.get_args(annotation) if a is not type(None)), annotation)
    if origin is dict:
        return tuple[typing.get_args(annotation)[1]]  # type: ignore[misc]  # a one-type container to step into
    return annotation
