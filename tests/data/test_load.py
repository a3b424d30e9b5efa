# ruff: noqa: E501 (tables)
"""Formats, detection, field mappings, and the account that is given of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorchestra.data.example import Message
from lorchestra.data.load import DataSpec, Loaded, load_examples
from lorchestra.errors import DataError

U, A, S = (lambda t, role=role: Message(role, t) for role in ("user", "assistant", "system"))
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def load(tmp_path: Path, rows: list[dict[str, Any]], task: str = "sft", **spec: Any) -> Loaded:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(DataSpec(source=str(path), **spec), task, relative_to=tmp_path)  # type: ignore[arg-type]


# row, format it is detected as, messages, rejected, choices
FORMATS: list[tuple[dict[str, Any], str, list[Message], str | None, tuple[str, ...]]] = [
    ({"messages": TURNS}, "messages", [U("q"), A("a")], None, ()),
    ({"conversations": TURNS}, "messages", [U("q"), A("a")], None, ()),
    ({"messages": json.dumps(TURNS)}, "messages", [U("q"), A("a")], None, ()),
    ({"messages": [{"role": "system", "content": "s"}, *TURNS]}, "messages", [S("s"), U("q"), A("a")], None, ()),
    ({"messages": TURNS, "system": "s"}, "messages", [S("s"), U("q"), A("a")], None, ()),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TURNS[1]]},
        "messages", [U("q"), A("a")], None, (),
    ),
    ({"conversations": SHAREGPT}, "sharegpt", [U("q"), A("a")], None, ()),
    ({"conversations": SHAREGPT, "system": "s"}, "sharegpt", [S("s"), U("q"), A("a")], None, ()),
    ({"prompt": "q", "completion": "a"}, "prompt_completion", [U("q"), A("a")], None, ()),
    ({"Question": "q", "Answer": "a"}, "prompt_completion", [U("q"), A("a")], None, ()),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion", [U("q"), A("a")], None, ()),
    ({"prompt": "q", "completion": 42}, "prompt_completion", [U("q"), A("42")], None, ()),
    ({"instruction": "q", "output": "a"}, "alpaca", [U("q"), A("a")], None, ()),
    ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [U("q"), A("a")], None, ()),
    ({"instruction": "q", "input": "i", "output": "a", "system": "s"}, "alpaca", [S("s"), U("q\ni"), A("a")], None, ()),
    (
        {"instruction": "q", "output": "a", "history": [["q0", "a0"]]},
        "alpaca", [U("q0"), A("a0"), U("q"), A("a")], None, (),
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", [U("q"), A("a")], "b", ()),
    ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, "preference", [U("q\ni"), A("a")], "b", ()),
    (
        {"prompt": "q", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]},
        "preference", [U("q"), A("a")], "b", (),
    ),
    (
        {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]},
        "preference", [U("q"), A("a")], "b", (),
    ),
    (
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "b"}]},
        "preference", [U("q"), A("a")], "b", (),
    ),
    (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "b"}},
        "preference", [U("q"), A("a")], "b", (),
    ),
    ({"question": "q", "options": ["a", "b"], "answer": "a"}, "choice", [U("q"), A("a")], None, ("a", "b")),
    ({"question": "q", "options": "A. a\nB. b", "answer": "A. a"}, "choice", [U("q"), A("a")], None, ("a", "b")),
    ({"question": "q", "options": "A. a\nB. b", "answer": "A"}, "choice", [U("q"), A("a")], None, ("a", "b")),
    ({"question": "q", "options": "A. a\nB. b", "answer": "a"}, "choice", [U("q"), A("a")], None, ("a", "b")),
    ({"question": "q", "options": {"A": "a", "B": "b"}, "answer": "B"}, "choice", [U("q"), A("b")], None, ("a", "b")),
    ({"question": "q", "choices": ["a", "b"], "answer": 1}, "choice", [U("q"), A("b")], None, ("a", "b")),
    (
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"},
        "choice", [U("q"), A("a")], None, ("a", "b"),
    ),
    # an option's text comes before an index: "2" is the option 2, not the third one
    ({"question": "q", "options": ["3", "2", "1"], "answer": "2"}, "choice", [U("q"), A("2")], None, ("3", "2", "1")),
    ({"question": "q", "options": ["B", "A"], "answer": "A"}, "choice", [U("q"), A("A")], None, ("B", "A")),
    ({"question": "q", "options": ["1. x", "plain"], "answer": "plain"}, "choice", [U("q"), A("plain")], None, ("1. x", "plain")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "messages", "rejected", "choices"), FORMATS)
def test_formats_are_detected_and_read(
    tmp_path: Path,
    row: dict[str, Any],
    name: str,
    messages: list[Message],
    rejected: str | None,
    choices: tuple[str, ...],
) -> None:
    loaded = load(tmp_path, [row, row], task="dpo" if rejected else "sft")
    assert loaded.format == name
    example = loaded.examples[1]
    assert (list(example.messages), example.rejected, example.choices) == (messages, rejected, choices)
    assert example.origin == "rows.jsonl:2"
    assert (loaded.rows, dict(loaded.dropped)) == (2, {})
    named = load(tmp_path, [row, row], task="dpo" if rejected else "sft", format=name)
    assert named.examples == loaded.examples
    assert named.digest == loaded.digest


def test_the_override_wins_over_detection(tmp_path: Path) -> None:
    row = {"instruction": "i", "output": "o", "prompt": "p", "completion": "c"}
    assert load(tmp_path, [row]).examples[0].gold == "o"
    assert load(tmp_path, [row], format="prompt_completion").examples[0].gold == "c"


def test_multi_turn_conversations_keep_every_turn(tmp_path: Path) -> None:
    turns = [*TURNS, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]
    example = load(tmp_path, [{"messages": turns}]).examples[0]
    assert [turn.content for turn in example.messages] == ["q", "a", "q2", "a2"]
    assert example.group == "q", "a longer conversation stays with the shorter one that it begins with"


def test_the_account_names_format_columns_and_what_was_not_read(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, [{"question": "q", "answer": "a", "passage": "p"}, {"question": "r", "answer": " ", "passage": ""}]
    )
    text = loaded.describe()
    assert "prompt_completion (detected; prompt ← question, completion ← answer)" in text
    assert "2 rows, 1 example; left out: 1 empty answer" in text
    assert "columns not read: passage" in text


MAPPINGS: list[tuple[dict[str, str], str, list[Message], str | None, tuple[str, ...]]] = [
    ({"prompt": "Ask: {{ text }}", "completion": "title"}, "prompt_completion", [U("Ask: t"), A("the title")], None, ()),
    (
        {"system": "Be brief.{# #}{{ '' }}", "prompt": "text", "completion": "title"},
        "prompt_completion", [S("Be brief."), U("t"), A("the title")], None, (),
    ),
    ({"prompt": "text", "chosen": "title", "rejected": "{{ text }}!"}, "preference", [U("t"), A("the title")], "t!", ()),
    (
        {"prompt": "text", "choices": "{{ [opa, opb] }}", "completion": "cop"},
        "choice", [U("t"), A("y\nz")], None, ("x", "y\nz"),
    ),
    (
        {"prompt": "text", "choices": "{{ opa }}\n{{ title }}", "completion": "opa"},
        "choice", [U("t"), A("x")], None, ("x", "the title"),
    ),
    (
        {"prompt": "{{ text }}\n{{ lettered }}", "choices": "lettered", "completion": "{{ 'B' }}"},
        "choice", [U("t\nA. x\nB. y"), A("B. y")], None, ("A. x", "B. y"),
    ),
    ({"messages": "chat"}, "messages", [U("q"), A("a")], None, ()),
]  # fmt: skip
MAPPED = {
    "text": "t",
    "title": "the title",
    "opa": "x",
    "opb": "y\nz",
    "cop": 1,
    "lettered": "A. x\nB. y",
    "chat": TURNS,
}


@pytest.mark.parametrize(("fields", "name", "messages", "rejected", "choices"), MAPPINGS)
def test_field_mappings(
    tmp_path: Path,
    fields: dict[str, str],
    name: str,
    messages: list[Message],
    rejected: str | None,
    choices: tuple[str, ...],
) -> None:
    loaded = load(tmp_path, [MAPPED], fields=fields)
    example = loaded.examples[0]
    assert loaded.format == name
    assert (list(example.messages), example.rejected, example.choices) == (messages, rejected, choices)
    if choices:
        assert choices[example.answer] == example.gold


def test_where_limit_group_and_system(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", "patient": f"  P{i // 2} "} for i in range(10)]
    loaded = load(tmp_path, rows, where="patient != '  P0 '", limit=3, group="patient", system="Be kind.")
    assert [example.prompt[-1].content for example in loaded.examples] == ["q2", "q3", "q4"]
    assert [example.group for example in loaded.examples] == ["p1", "p1", "p2"]
    assert all(example.messages[0] == S("Be kind.") for example in loaded.examples)
    assert dict(loaded.dropped) == {"by where": 2}
    by_template = load(tmp_path, rows, group="{{ patient | trim }}-x", limit=1)
    assert by_template.examples[0].group == "p0-x"
    own = load(tmp_path, [{"messages": TURNS, "system": "own"}], system="Be kind.")
    assert own.examples[0].messages[0] == S("own")


def test_rows_with_nothing_to_learn_from_are_counted(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": None},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
    ]
    assert dict(load(tmp_path, pairs, task="dpo").dropped) == {
        "chosen equals rejected": 1, "empty answer": 1, "empty rejected answer": 1, "empty prompt": 1,
    }  # fmt: skip
    chats = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": TURNS[1:]}]
    assert dict(load(tmp_path, chats).dropped) == {"does not end with an answer": 1, "no question before the answer": 1}
    items = [{"question": "q", "options": o, "answer": "x"} for o in (["x", "y"], ["x", "x"], ["x"])]
    assert dict(load(tmp_path, items).dropped) == {"options that are equal or empty": 1, "fewer than two options": 1}


BAD: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    ([{"promt": "q", "completion": "a"}], {}, r"cannot tell the format.*promt, completion.*'promt' is close to 'prompt'"),
    ([{"prompt": "q", "completion": "a"}, {"prompt": "q", "completoin": "a"}], {"format": "prompt_completion"},
     r"rows\.jsonl:2: no column 'completion'.*'completoin' is close to 'completion'"),
    ([{"prompt": "q", "completion": "a"}] * 3 + [{"prompt": "q", "answr": "a"}], {},
     r"rows\.jsonl:4: no column 'completion'.*prompt, answr.*'answr' is close to 'answer'"),
    ([{"conversations": SHAREGPT}] * 3 + [{"conversations": []}], {}, r"rows\.jsonl:4: column 'conversations': expected a list of turns"),
    ([{"prompt": "q", "completion": "a"}], {"format": "alpaca"}, r"not in the format alpaca.*instruction, input"),
    ([{"prompt": "q", "completion": "a"}], {"format": "alpacca"}, r"unknown data format 'alpacca'.*Did you mean 'alpaca'"),
    ([{"prompt": "q", "completion": True}], {}, r"rows\.jsonl:1: column 'completion': expected text, got bool True"),
    ([{"prompt": "q", "completion": {"a": 1}}], {}, r"expected text, got dict"),
    ([{"prompt": "q\ud800", "completion": "a"}], {}, r"broken character at position 2"),
    ([{"messages": [{"role": "usr", "content": "q"}, TURNS[1]]}], {}, r"turn 1: unknown role 'usr'.*did you mean 'user'"),
    ([{"messages": [TURNS[0], "a"]}], {}, r"turn 2: expected \{\"role\", \"content\"\}"),
    ([{"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [1]}]}], {}, r"tools are not supported"),
    ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}], {}, r"only text is supported"),
    ([{"messages": "[broken"}], {"format": "messages"}, r"expected a JSON list of turns"),
    ([{"chosen": "a", "rejected": "b"}], {}, r"needs a prompt column"),
    ([{"chosen": TURNS, "rejected": [{"role": "user", "content": "other"}, TURNS[1]]}], {}, r"differ before their last turn"),
    ([{"question": "q", "options": ["a", "b"], "answer": "c"}], {}, r"'c' is none of the options.*A, B"),
    ([{"question": "q", "options": ["a", "b"], "answer": 2}], {}, r"int 2 is none of the options"),
    ([{"question": "q", "options": 3, "answer": 2}], {}, r"expected a list of options"),
    ([{"prompt": "q", "completion": ""}], {}, r"1 row, and none gives an example \(1 empty answer\)"),
    ([{"prompt": "q", "completion": "a"}], {"where": "prompt == 'x'"}, r"1 row, and none gives.*1 by where"),
    ([{"prompt": "q", "completion": "a"}], {"where": "promt == 'x'"}, r"rows\.jsonl:1: where: 'promt' is undefined.*'prompt'"),
    ([{"prompt": "q", "completion": "a"}], {"where": "prompt =="}, r"where: 'prompt ==' is not valid Jinja2"),
    ([{"prompt": "q", "completion": "a"}], {"group": "patient"}, r"group: there is no column 'patient'"),
    ([{"prompt": "q", "completion": "a"}], {"limit": 0}, r"limit is 0"),
    ([{"prompt": "q"}], {"fields": {"promt": "x", "completion": "y"}}, r"unknown part 'promt'.*Did you mean 'prompt'"),
    ([{"prompt": "q"}], {"fields": {"prompt": "prompt"}}, r"got prompt; expected one of these sets"),
    ([{"qestion": "q", "a": "a"}], {"fields": {"prompt": "question", "completion": "a"}},
     r"fields\.prompt: there is no column 'question'. Did you mean 'qestion'"),
    ([{"prompt": "q"}], {"fields": {"prompt": "prompt", "completion": "prompt"}, "format": "alpaca"}, r"keep one of them"),
    ([], {}, r"has no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "spec", "message"), BAD)
def test_bad_input_says_what_where_and_what_to_do(
    tmp_path: Path, rows: list[dict[str, Any]], spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        load(tmp_path, rows, **spec)


def test_a_dpo_stage_needs_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a dpo stage needs pairs"):
        load(tmp_path, [{"prompt": "q", "completion": "a"}], task="dpo")


def test_the_digest_is_of_what_is_said_not_of_where(tmp_path: Path) -> None:
    one = load(tmp_path, [{"prompt": "q", "completion": "a"}])
    other = load(tmp_path, [{"messages": TURNS}])
    changed = load(tmp_path, [{"prompt": "q", "completion": "b"}])
    regrouped = load(tmp_path, [{"prompt": "q", "completion": "a"}], group="completion")
    assert one.digest == other.digest
    assert len({one.digest, changed.digest, regrouped.digest}) == 3
