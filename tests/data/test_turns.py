"""Cells → texts, turns, options: what every format reads the same way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.data.example import Message
from lorchestra.data.turns import ROLES, Unusable, answer_of, conversation, options_of, prompt_turns, shown, text_of
from lorchestra.errors import DataError

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@given(TEXT)
def test_text_is_kept_as_it_is(text: str) -> None:
    assert text_of(text, "c") == text


@pytest.mark.parametrize(("value", "text"), [(None, ""), (0, "0"), (-3, "-3"), (2.5, "2.5")])
def test_numbers_and_nothing_become_text(value: Any, text: str) -> None:
    assert text_of(value, "c") == text


@pytest.mark.parametrize("value", [True, [], {}, b"bytes", ["a"]])
def test_other_types_are_named(value: Any) -> None:
    with pytest.raises(DataError, match=f"column 'c': expected text, got {type(value).__name__}"):
        text_of(value, "c")


@given(st.lists(st.tuples(st.sampled_from(sorted(ROLES)), TEXT), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_both_spellings_of_a_turn_and_their_json_text_read_the_same(
    turns: list[tuple[str, str]], sharegpt: bool, upper: bool
) -> None:
    role, content = ("from", "value") if sharegpt else ("role", "content")
    value = [{role: who.upper() if upper else who, content: what} for who, what in turns]
    expected = tuple(Message(ROLES[who], what) for who, what in turns)
    assert conversation(value, "c") == expected
    assert conversation(tuple(value), "c") == expected
    assert conversation(" " + json.dumps(value), "c") == expected
    assert prompt_turns(value, "c") == expected


def test_one_turn_may_stand_without_its_list_and_parts_are_joined() -> None:
    assert conversation({"role": "user", "content": "q"}, "c") == (Message("user", "q"),)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert conversation([{"role": "user", "content": parts}], "c") == (Message("user", "ab"),)
    assert conversation([{"role": "user", "content": None}], "c") == (Message("user", ""),)


def test_a_prompt_that_looks_like_a_list_but_is_text_stays_text() -> None:
    assert prompt_turns("[1] What does reference 1 say?", "c") == (Message("user", "[1] What does reference 1 say?"),)


@pytest.mark.parametrize("value", ["", "hello", "[", "[]", [], None, 3, [3], [{"role": "user"}], [{"content": "x"}]])
def test_what_is_no_conversation_is_refused_with_the_column(value: Any) -> None:
    with pytest.raises(DataError, match="column 'c'"):
        conversation(value, "c")


def test_the_turn_with_the_mistake_is_counted_from_one() -> None:
    with pytest.raises(DataError, match=r"column 'c', turn 2: unknown role 'asistant'.*did you mean 'assistant'"):
        conversation([{"role": "user", "content": "q"}, {"role": "asistant", "content": "a"}], "c")
    with pytest.raises(DataError, match=r"unknown role None"):
        conversation([{"role": None, "content": "q"}], "c")
    with pytest.raises(DataError, match=r"column 'c\[1\]\.content': expected text, got dict"):
        conversation([{"role": "user", "content": "q"}, {"role": "user", "content": {"a": 1}}], "c")


LETTERS = ("A", "B", "C", "D", "E")
FORMS = {
    "list": list,
    "tuple": tuple,
    "json": json.dumps,
    "letters": lambda texts: dict(zip(LETTERS, texts, strict=False)),
    "text and label": lambda texts: {"text": list(texts), "label": list(LETTERS[: len(texts)])},
    "text alone": lambda texts: {"text": list(texts)},
}
OPTION = st.text("xyz ", max_size=4)


@given(st.lists(st.none() | OPTION, min_size=1, max_size=5), st.sampled_from(sorted(FORMS)))
def test_text_letter_and_index_name_the_same_option_whatever_is_empty_before_it(
    texts: list[str | None], form: str
) -> None:
    """The oracle is the row itself: place i has letter i and text i; an empty place is no option."""
    filled = {i: text.strip() for i, text in enumerate(texts) if text is not None and text.strip()}
    value = FORMS[form](texts)
    if len(filled) < 2 or len(set(filled.values())) < len(filled):
        with pytest.raises(Unusable, match=r"fewer than two options|options that are equal or empty"):
            options_of(value, "c")
        return
    options = options_of(value, "c")
    assert options.bare == options.written == tuple(filled.values())
    for place, text in filled.items():
        for name in (text, LETTERS[place], place, str(place), f"{LETTERS[place]}.", f"({LETTERS[place]}) {text}"):
            assert options.bare[answer_of(name, options, "a")] == text
    for place in set(range(len(texts) + 1)) - set(filled):
        for name in (place, "ABCDEF"[place]):
            with pytest.raises(DataError, match="none of the options"):
                answer_of(name, options, "a")


@pytest.mark.parametrize("style", ["{}. {}", "{}) {}", "({}) {}", "{}: {}", "  {}.  {}"])
def test_labels_written_into_the_options_are_taken_off(style: str) -> None:
    options = options_of(
        "\n\n".join(style.format(label, text) for label, text in zip("PQ", ("x", "y"), strict=True)), "c"
    )
    assert (options.labels, options.bare) == (("P", "Q"), ("x", "y"))
    assert options.written == tuple(style.format(label, text).strip() for label, text in (("P", "x"), ("Q", "y")))
    for answer in ("Q", "y", options.written[1], "Q.", "Q: y", 1):
        assert answer_of(answer, options, "a") == 1
    with pytest.raises(DataError, match=r"'Q\. x' is none of the options"):
        answer_of("Q. x", options, "a")  # the label of one with the text of another


def test_words_that_only_look_like_labels_stay() -> None:
    assert options_of(["A. x", "B y"], "c").bare == ("A. x", "B y"), "not every option has one"
    assert options_of(["A. x", "A. y"], "c").bare == ("A. x", "A. y"), "the same one twice"
    assert options_of({"1": "A. x", "2": "B. y"}, "c").bare == ("A. x", "B. y"), "they have labels already"


def test_a_text_comes_before_a_label_and_a_label_before_an_index() -> None:
    numbers = options_of(["2", "0", "1"], "c")
    assert [answer_of(value, numbers, "a") for value in (0, 1, 2)] == [1, 2, 0]
    from_one = options_of({"text": ["x", "y"], "label": ["1", "2"]}, "c")
    assert [answer_of(value, from_one, "a") for value in ("1", "2")] == [0, 1]
    assert answer_of(0, from_one, "a") == 0, "no label 0: an index"


@pytest.mark.parametrize("value", [None, 3, True])
def test_what_are_no_options(value: Any) -> None:
    with pytest.raises(DataError, match="column 'c': expected a list of options"):
        options_of(value, "c")


def test_long_values_are_shown_by_their_beginning() -> None:
    assert shown("ab") == "str 'ab'"
    assert len(shown("x" * 1000)) < 80
