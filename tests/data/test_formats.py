# ruff: noqa: E501 (tables)
"""The table of formats itself: which one a row is, what binds to what, what is ambiguous."""

from __future__ import annotations

from typing import Any

import pytest

from lorchestra.data.example import Message
from lorchestra.data.formats import FORMATS, Draft, detect, expected, known_format, named
from lorchestra.data.turns import Unusable
from lorchestra.errors import DataError

TURN = {"role": "user", "content": "q"}
TURNS = [TURN, {"role": "assistant", "content": "a"}]
SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def read(row: dict[str, Any]) -> Draft:
    found, columns = detect([row], "f")
    return found.convert(row, columns)


# Rows that more than one format could take, and the one that does: the format that uses the most of the row.
AMBIGUOUS: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    ({"messages": TURNS, "prompt": "p", "completion": "c"}, "messages", {"messages": "messages"}),
    ({"conversations": SAID, "messages": SAID}, "sharegpt", {"messages": "conversations"}),
    ({"conversations": TURNS, "messages": TURNS}, "messages", {"messages": "messages"}),
    (
        {"prompt": "p", "messages": TURNS, "chosen": "c", "rejected": "r"},
        "preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
    (
        {"question": "q", "choices": ["a", "b"], "answer": "a", "output": "o", "instruction": "i"},
        "choice", {"options": "choices", "answer": "answer", "question": "question"},
    ),
    ({"question": "q", "options": ["a"], "completion": "c"}, "prompt_completion", {"prompt": "question", "completion": "completion"}),
    ({"instruction": "i", "output": "o", "prompt": "p", "completion": "c"}, "alpaca", {"instruction": "instruction", "output": "output"}),
    ({"instruction": "i", "response": "o", "context": "c"}, "alpaca", {"instruction": "instruction", "output": "response", "input": "context"}),
    ({"instruction": "i", "input": "x", "answer": "a"}, "prompt_completion", {"prompt": "instruction", "completion": "answer", "input": "input"}),
    ({"input": "x", "output": "o"}, "prompt_completion", {"prompt": "input", "completion": "output"}),
    ({"question": "q", "prompt": "p", "answer": "a"}, "prompt_completion", {"prompt": "prompt", "completion": "answer"}),
    ({" Prompt ": "p", "COMPLETION": "c"}, "prompt_completion", {"prompt": " Prompt ", "completion": "COMPLETION"}),
    ({"messages": "a text that is no conversation", "prompt": "p", "response": "r"}, "prompt_completion", {"prompt": "prompt", "completion": "response"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "columns"), AMBIGUOUS)
def test_an_ambiguous_row_is_what_the_table_says_first(row: dict[str, Any], name: str, columns: dict[str, str]) -> None:
    found, bound = detect([row], "f")
    assert (found.name, bound) == (name, columns)
    assert len(set(bound.values())) == len(bound), "no column serves twice"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_every_format_is_detected_by_its_own_first_names_and_bound_by_its_own_name(form: Any) -> None:
    samples = {
        "preference": {"chosen": "a", "rejected": "b", "prompt": "q"},
        "messages": {"messages": TURNS},
        "sharegpt": {"conversations": SAID},
        "choice": {"options": ["a", "b"], "answer": "a", "question": "q"},
        "alpaca": {"instruction": "q", "output": "a"},
        "prompt_completion": {"prompt": "q", "completion": "a"},
    }
    row = samples[form.name]
    assert set(row) >= {aliases[0] for aliases in form.required.values()}
    assert detect([row], "f")[0] is form
    assert named(form.name, [row], "f")[0] is known_format(form.name) is form
    assert (form.convert(row, form.bind(list(row)))).gold == "a"


def test_instruction_and_input_are_both_read_whatever_the_answer_is_called() -> None:
    for answer in ("output", "response", "answer", "completion"):
        draft = read({"instruction": "Translate.", "input": "fever", answer: "Fieber"})
        assert draft == Draft((Message("user", "Translate.\nfever"),), "Fieber")
        assert read({"instruction": "Translate.", "input": " ", answer: "x"}).prompt == (Message("user", "Translate."),)
    pair = read({"instruction": "Translate.", "input": "fever", "chosen": "Fieber", "rejected": "Husten"})
    assert pair.prompt == (Message("user", "Translate.\nfever"),)


def test_the_columns_of_most_rows_decide() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p", "completion": "c"}] * 3
    odd = {"prompt": "p", "completion": "c", "chosen": "x", "rejected": "y"}
    assert detect([odd, *rows], "f")[0].name == "prompt_completion"
    assert detect([odd] * 4 + rows, "f")[0].name == "preference"
    assert detect([*rows, {"prompt": "p"}], "f")[0].name == "prompt_completion", "one damaged row is told by its line"


def test_an_optional_part_may_be_in_a_few_rows_only() -> None:
    plain = {"instruction": "i", "output": "o"}
    rows = [plain, plain, plain, plain | {"system": "s", "input": "x"}]
    form, columns = detect(rows, "f")
    assert form.convert(rows[0], columns).prompt == (Message("user", "i"),)
    assert form.convert(rows[3], columns).prompt == (Message("system", "s"), Message("user", "i\nx"))


def test_empty_or_missing_conversations_in_the_first_rows_do_not_hide_the_format() -> None:
    rows: list[dict[str, Any]] = [{"messages": []}, {"messages": None}, {"messages": TURNS}]
    assert detect(rows, "f")[0].name == "messages"


def test_a_system_turn_of_the_conversation_wins_over_the_system_column() -> None:
    own = [{"role": "system", "content": "own"}, *TURNS]
    assert read({"messages": own, "system": "column"}).prompt[0] == Message("system", "own")
    pair = {"chosen": own, "rejected": [*own[:2], {"role": "assistant", "content": "b"}], "system": "column"}
    assert read(pair).prompt == (Message("system", "own"), Message("user", "q"))


def test_pairs_with_more_than_one_turn_share_all_before_the_last() -> None:
    before = [*TURNS, {"role": "user", "content": "q2"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    expected_prompt = tuple(Message(t["role"], t["content"]) for t in before)
    for row in (
        {"chosen": [*before, good], "rejected": [*before, bad]},
        {"prompt": before, "chosen": [good], "rejected": bad},
        {"prompt": before, "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [*before, good], "rejected": [*before, bad]},
        {"prompt": "q", "chosen": [*before[1:], good], "rejected": [*before[1:], bad]},
    ):
        assert read(row) == Draft(expected_prompt, "good", "bad")


def test_a_pair_with_a_turn_after_the_answer_is_left_out() -> None:
    with pytest.raises(Unusable, match="does not end with an answer"):
        read({"prompt": "q", "chosen": TURNS, "rejected": [TURN]})


@pytest.mark.parametrize("history", [[["q", "a", "more"]], ["q"], [3]])
def test_a_broken_history_is_refused(history: Any) -> None:
    with pytest.raises(DataError, match=r"column 'history': expected \[question, answer\] pairs"):
        read({"instruction": "i", "output": "o", "history": history})


def test_no_format_names_columns_formats_and_what_to_do() -> None:
    with pytest.raises(DataError) as error:
        detect([{"qestion": 1, "anwser": 2, "zzz": 3}], "file.csv")
    told = str(error.value)
    assert told.startswith("file.csv: cannot tell the format. Got the columns qestion, anwser, zzz.")
    assert all(f"{name} has {form.looks}" in told for name, form in FORMATS.items())
    assert "'qestion' is close to 'question'; 'anwser' is close to 'answer'." in told
    assert "fields: {prompt:" in told


def test_a_named_format_that_does_not_fit_names_its_own_columns_alone() -> None:
    with pytest.raises(DataError, match="f is not in the format choice") as error:
        named("choice", [{"question": "q"}], "f")
    assert FORMATS["choice"].looks in str(error.value)
    assert FORMATS["alpaca"].looks not in str(error.value)
    with pytest.raises(DataError, match=r"unknown data format 'sharegtp'; expected auto, .*Did you mean 'sharegpt'\?"):
        named("sharegtp", [{}], "f")


def test_a_row_without_columns_says_so() -> None:
    assert "Got the columns (none)." in expected({}, [FORMATS["alpaca"]])
