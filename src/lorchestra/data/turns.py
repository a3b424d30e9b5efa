"""What stands in a cell → texts, conversations, options: the conversions that every format shares."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lorchestra.data.example import Message
from lorchestra.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class Unusable(Exception):  # noqa: N818 (counted, not an error)
    """A row with nothing to learn from; its reason is counted and told, the row left out."""


def shown(value: Any) -> str:
    """``value`` in an error message: its type and how it begins."""
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"


def text_of(value: Any, column: str) -> str:
    """A cell that must be text. Numbers are written out; nothing (``None``) is the empty text.

    Raises:
        DataError: another type, or text that no tokenizer can take (half of a surrogate pair).
    """
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"column {column!r}: expected text, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"column {column!r}: a broken character at position {error.start + 1} (half of a surrogate pair, "
            "\\ud800–\\udfff); write the text out as UTF-8 again"
        ) from error
    return value


def conversation(value: Any, column: str) -> tuple[Message, ...]:
    """A list of ``{"role", "content"}`` or ``{"from", "value"}``, or the same as JSON text (a CSV cell).

    Raises:
        DataError: not such a list, an unknown role, content that is not text.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"column {column!r}: expected a JSON list of turns, got {shown(value)}: {error}") from error
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"column {column!r}: expected a list of turns with role and content, got {shown(value)}")
    return tuple(_turn(turn, column, number) for number, turn in enumerate(value, start=1))


def _turn(turn: Any, column: str, number: int) -> Message:
    where = f"column {column!r}, turn {number}"
    if isinstance(turn, Mapping) and "role" in turn and "content" in turn:
        role, content = turn["role"], turn["content"]
    elif isinstance(turn, Mapping) and "from" in turn and "value" in turn:
        role, content = turn["from"], turn["value"]
    else:
        raise DataError(f'{where}: expected {{"role", "content"}} or {{"from", "value"}}, got {shown(turn)}')
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        near = get_close_matches(str(role), list(ROLES), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{where}: unknown role {role!r}; expected one of {', '.join(ROLES)}{hint}")
    if content is None and turn.get("tool_calls"):
        raise DataError(f"{where}: calls of tools are not supported; write the call into the content as text")
    if isinstance(content, list):  # the parts of OpenAI's multi-part messages
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise DataError(f"{where}: only text is supported, got {shown(content)}")
        content = "".join(part["text"] for part in content)
    return Message(known, text_of(content, f"{column}[{number - 1}].content"))


def prompt_turns(value: Any, column: str) -> tuple[Message, ...]:
    """A prompt as text (one user turn) or as a conversation."""
    if isinstance(value, list | tuple):
        return conversation(value, column)
    return (Message("user", text_of(value, column)),)


_LABEL = re.compile(r"\s*\(?([A-Za-z]|\d{1,2})[.):]\s+")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a multiple-choice item.

    Args:
        labels: ``A``, ``B``, …: as given, else by place.
        bare: the texts without their labels.
        written: the texts as they stood.
        places: where each stood, from 0; an empty option is left out, and those after it keep their places.
    """

    labels: tuple[str, ...]
    bare: tuple[str, ...]
    written: tuple[str, ...]
    places: tuple[int, ...]


def options_of(value: Any, column: str) -> Options:
    """A list, a text with one option a line, ``{"A": …, "B": …}`` or ``{"text": […], "label": […]}``.

    Where every option begins with its own label (``A. …``), ``bare`` is without it.

    Raises:
        Unusable: fewer than two options, or two that are equal.
        DataError: neither list nor text.
    """
    labels: tuple[str, ...] = ()
    if isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple):
        labels = tuple(str(label) for label in value.get("label") or ())
        value = value["text"]
    elif isinstance(value, Mapping):
        labels, value = tuple(map(str, value)), list(value.values())
    elif isinstance(value, str):
        value = _json_list(value) or [line for line in value.splitlines() if line.strip()]
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r}: expected a list of options or one a line, got {shown(value)}")
    texts = [text_of(option, column).strip() for option in value]
    places = tuple(i for i, text in enumerate(texts) if text)
    written = bare = tuple(texts[i] for i in places)
    labels = tuple(labels[i] for i in places) if len(labels) == len(texts) else ()
    marks = [mark for mark in map(_LABEL.match, written) if mark]
    found = tuple(mark.group(1) for mark in marks)
    if not labels and len(found) == len(written) and len(set(found)) == len(found):
        labels = found
        bare = tuple(text[mark.end() :].strip() for text, mark in zip(written, marks, strict=True))
    if len(bare) < 2:
        raise Unusable("fewer than two options")
    if len(set(bare)) < len(bare) or not all(bare):
        raise Unusable("options that are equal or empty")
    return Options(labels or tuple(chr(ord("A") + i) for i in places), bare, written, places)


def _json_list(text: str) -> list[Any] | None:
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, list) else None


def answer_of(value: Any, options: Options, column: str) -> int:
    """Index of the option that ``value`` names: by its text, by its label (with or without the text), by its index
    from 0. In this order, so that a text ``"2"`` among the options is that option.

    Raises:
        DataError: none of these.
    """
    text = text_of(value, column).strip()
    for known in (options.bare, options.written, options.labels):
        if text in known:
            return known.index(text)
    mark = _LABEL.match(text + " ")
    if mark and mark.group(1) in options.labels:
        index = options.labels.index(mark.group(1))
        if text[mark.end() :].strip() in ("", options.bare[index]):
            return index
    if text.isdecimal() and int(text) in options.places:
        return options.places.index(int(text))
    raise DataError(
        f"column {column!r}: the answer {shown(value)} is none of the options {shown(list(options.written))}; expected "
        f"the text of one, its label ({', '.join(options.labels)}) or its index from 0"
    )
