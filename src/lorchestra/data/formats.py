"""The shapes that examples come in: one row of the table for each, found by columns and contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from lorchestra.data.example import Message
from lorchestra.data.turns import Unusable, answer_of, conversation, options_of, prompt_turns, shown, text_of
from lorchestra.errors import DataError

Row = Mapping[str, Any]
Columns = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a row says, before system prompt and group: everything before the gold answer, and the answers."""

    prompt: tuple[Message, ...]
    gold: str
    rejected: str | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Args:
        name: as in the recipe's ``format``.
        required: part → the column names (any case) that can hold it, best first.
        optional: the same, for parts that may be absent.
        convert: row and part → column to :class:`Draft`.
        holds: looks into the row when the columns alone do not decide.
        looks: what a row looks like, for messages.
    """

    name: str
    required: Mapping[str, Sequence[str]]
    convert: Callable[[Row, Columns], Draft]
    looks: str
    optional: Mapping[str, Sequence[str]] = field(default_factory=dict)
    holds: Callable[[Row, Columns], bool] = lambda row, columns: True

    def bind(self, names: Sequence[str], sometimes: Sequence[str] = ()) -> dict[str, str] | None:
        """Part → column, or ``None`` if a required part has none among ``names``. No column serves twice.

        Optional parts may be in columns that only some rows have: ``sometimes``.
        """
        found: dict[str, str] = {}
        for part, aliases in (*self.required.items(), *self.optional.items()):
            usable = names if part in self.required else (*names, *sometimes)
            free = {name.strip().lower(): name for name in usable if name not in found.values()}
            column = next((free[alias] for alias in aliases if alias in free), None)
            if column is not None:
                found[part] = column
            elif part in self.required:
                return None
        return found


def _finished(turns: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """A conversation as prompt and gold answer."""
    if turns[-1].role != "assistant":
        raise Unusable("does not end with an answer")
    if not any(turn.role == "user" for turn in turns[:-1]):
        raise Unusable("no question before the answer")
    return tuple(turns[:-1]), turns[-1].content


def _system(row: Row, columns: Columns) -> tuple[Message, ...]:
    text = text_of(row.get(columns["system"]), columns["system"]) if "system" in columns else ""
    return (Message("system", text),) if text.strip() else ()


def _messages(row: Row, columns: Columns) -> Draft:
    prompt, gold = _finished(conversation(row[columns["messages"]], columns["messages"]))
    return Draft((*(() if prompt[0].role == "system" else _system(row, columns)), *prompt), gold)


def _prompt_completion(row: Row, columns: Columns) -> Draft:
    prompt = _asked(row, columns)
    completion = row[columns["completion"]]
    if isinstance(completion, list | tuple):
        return Draft(*_finished((*_system(row, columns), *prompt, *conversation(completion, columns["completion"]))))
    return Draft((*_system(row, columns), *prompt), text_of(completion, columns["completion"]))


def _instruction(row: Row, columns: Columns, part: str) -> str:
    """Instruction and input on the lines below it."""
    instruction = text_of(row[columns[part]], columns[part])
    given = text_of(row.get(columns["input"]), columns["input"]) if "input" in columns else ""
    return f"{instruction}\n{given}" if given.strip() else instruction


def _asked(row: Row, columns: Columns) -> tuple[Message, ...]:
    """The prompt column as a conversation, or as one user turn with its input."""
    value = row.get(columns["prompt"])
    if isinstance(value, list | tuple):
        return prompt_turns(value, columns["prompt"])
    return (Message("user", _instruction(row, columns, "prompt")),)


def _alpaca(row: Row, columns: Columns) -> Draft:
    turns = list(_system(row, columns))
    if "history" in columns:
        for pair in row.get(columns["history"]) or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError(f"column {columns['history']!r}: expected [question, answer] pairs, got {shown(pair)}")
            turns.append(Message("user", text_of(pair[0], columns["history"])))
            turns.append(Message("assistant", text_of(pair[1], columns["history"])))
    turns.append(Message("user", _instruction(row, columns, "instruction")))
    return Draft(tuple(turns), text_of(row[columns["output"]], columns["output"]))


def _preference(row: Row, columns: Columns) -> Draft:
    prompt = _asked(row, columns) if "prompt" in columns else ()
    before_chosen, chosen = _answer(row[columns["chosen"]], columns["chosen"], prompt)
    before_rejected, rejected = _answer(row[columns["rejected"]], columns["rejected"], prompt)
    if before_chosen != before_rejected:
        raise DataError(
            "chosen and rejected differ before their last turn; a pair must share everything up to the answer"
        )
    if not before_chosen:
        raise DataError("a pair of plain texts needs a prompt column (prompt, question, query or instruction)")
    if chosen == rejected:
        raise Unusable("chosen equals rejected")
    system = () if before_chosen[0].role == "system" else _system(row, columns)
    return Draft((*system, *before_chosen), chosen, rejected)


def _answer(value: Any, column: str, prompt: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """One side of a pair: text, one turn, a continuation of the prompt, or a whole conversation that begins with it."""
    if not isinstance(value, list | tuple | Mapping):
        return prompt, text_of(value, column)
    turns = conversation(value, column)
    if turns[-1].role != "assistant":
        raise Unusable("does not end with an answer")
    if turns[0].role == "assistant":
        return (*prompt, *turns[:-1]), turns[-1].content
    return turns[:-1], turns[-1].content


def _choice(row: Row, columns: Columns) -> Draft:
    options = options_of(row[columns["options"]], columns["options"])
    gold = options.bare[answer_of(row[columns["answer"]], options, columns["answer"])]
    prompt = prompt_turns(row[columns["question"]], columns["question"])
    return Draft((*_system(row, columns), *prompt), gold, choices=options.bare)


def _turns_have(key: str) -> Callable[[Row, Columns], bool]:
    def holds(row: Row, columns: Columns) -> bool:
        value = row.get(columns["messages"])
        if isinstance(value, str):
            return value.lstrip().startswith("[") and f'"{key}"' in value
        return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and key in value[0]

    return holds


_CONVERSATION = ("messages", "conversations", "conversation", "dialogue", "dialog")
_QUESTION = ("prompt", "question", "query", "instruction")
_SYSTEM = {"system": ("system", "system_prompt")}

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "preference",
            {"chosen": ("chosen",), "rejected": ("rejected",)},
            _preference,
            "prompt, chosen, rejected (texts, or lists of turns)",
            {"prompt": (*_QUESTION, *_CONVERSATION), "input": ("input",), **_SYSTEM},
        ),
        Format(
            "messages",
            {"messages": _CONVERSATION},
            _messages,
            'messages: [{"role", "content"}, …]',
            _SYSTEM,
            _turns_have("role"),
        ),
        Format(
            "sharegpt",
            {"messages": ("conversations", *_CONVERSATION)},
            _messages,
            'conversations: [{"from", "value"}, …]',
            _SYSTEM,
            _turns_have("from"),
        ),
        Format(
            "choice",
            {
                "options": ("options", "choices"),
                "answer": ("answer", "answerkey", "label", "answer_idx"),
                "question": ("question", "prompt", "query"),
            },
            _choice,
            "question, options, answer",
            _SYSTEM,
        ),
        Format(
            "alpaca",
            {"instruction": ("instruction",), "output": ("output", "response")},
            _alpaca,
            "instruction, input (may be empty), output",
            {"input": ("input", "context"), "history": ("history",), **_SYSTEM},
        ),
        Format(
            "prompt_completion",
            {
                "prompt": (*_QUESTION, "input"),
                "completion": ("completion", "response", "answer", "output"),
            },
            _prompt_completion,
            "prompt, completion (or question, answer)",
            {"input": ("input",), **_SYSTEM},
        ),
    )
}


def detect(rows: Sequence[Row], source: str) -> tuple[Format, dict[str, str]]:
    """The first format of the table that fits ``rows`` (the first few of a source).

    Raises:
        DataError: none fits; says which columns there are, what each format expects, and the nearest names.
    """
    # A row that lacks a column or has a damaged cell is told by its line when it is read, so most rows decide here.
    count = Counter(name for row in rows for name in row)
    names = [name for name in count if 2 * count[name] > len(rows)]
    sometimes = [name for name in count if name not in names]
    for candidate in FORMATS.values():
        columns = candidate.bind(names, sometimes)
        if columns is not None and any(candidate.holds(row, columns) for row in rows):
            return candidate, columns
    raise DataError(f"{source}: cannot tell the format. {expected(rows[0], list(FORMATS.values()))}")


def known_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        DataError: no such format, with the nearest name.
    """
    if name not in FORMATS:
        near = get_close_matches(name, [*FORMATS, "auto"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown data format {name!r}; expected auto, {', '.join(FORMATS)}.{hint}")
    return FORMATS[name]


def named(name: str, rows: Sequence[Row], source: str) -> tuple[Format, dict[str, str]]:
    """The format called ``name``, bound to the columns of ``rows``.

    Raises:
        DataError: no such format, or required columns that are not there.
    """
    columns = known_format(name).bind(list(dict.fromkeys(column for row in rows for column in row)))
    if columns is None:
        raise DataError(f"{source} is not in the format {name}. {expected(rows[0], [FORMATS[name]])}")
    return FORMATS[name], columns


def expected(row: Row, formats: Sequence[Format]) -> str:
    """What a row has, what ``formats`` expect, the nearest names, and what to do."""
    got = [str(name) for name in row]
    wanted = "; ".join(f"{candidate.name} has {candidate.looks}" for candidate in formats)
    near = []
    for name in got:
        known = {alias for f in formats for group in (*f.required.values(), *f.optional.values()) for alias in group}
        match = get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.75)
        if match and match[0] != name.lower():
            near.append(f"{name!r} is close to {match[0]!r}")
    hint = f" {'; '.join(near)}." if near else ""
    return (
        f"Got the columns {', '.join(got) or '(none)'}. Expected: {wanted}.{hint} "
        "Rename the columns, or map them: fields: {prompt: <column or {{ template }}>, completion: <column>}."
    )
