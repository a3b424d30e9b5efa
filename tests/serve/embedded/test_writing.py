"""Text while tokens come, against the tokenizer's own decoding of them all."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.serve.embedded.generation import Produced, Token
from lorchestra.serve.embedded.vocabulary import Vocabulary
from lorchestra.serve.embedded.writing import Writer, placed_prompt


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer):
    return Vocabulary(tiny_tokenizer)


def write(vocabulary, ids, stops=(), finish="length", **options):
    writer = Writer(vocabulary, stops, **options)
    pieces = []
    for i, token in enumerate(ids):
        pieces.append(writer.add(Produced((Token(token),), finish=finish if i == len(ids) - 1 else None)))
        if pieces[-1].finish:
            break
    return pieces


def joined(pieces):
    return "".join(piece.text for piece in pieces)


@given(st.lists(st.integers(0, 259), min_size=1, max_size=60))
def test_pieces_together_are_the_whole_decoded_at_once(vocabulary, tiny_tokenizer, ids):
    whole = tiny_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = joined(write(vocabulary, ids))
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}  # a last character that was cut off


@given(st.text(min_size=1, max_size=40))
def test_any_text_comes_in_whole_characters(vocabulary, tiny_tokenizer, text):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = write(vocabulary, ids)
    assert joined(pieces) == tiny_tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in joined(pieces) or "\ufffd" in text


def test_chinese_comes_a_character_at_a_time_and_a_cut_one_is_left_out(vocabulary, tiny_tokenizer):
    ids = tiny_tokenizer("发烧了", add_special_tokens=False)["input_ids"]
    assert [piece.text for piece in write(vocabulary, ids)] == ["", "", "发", "", "", "烧", "", "", "了"]
    cut = write(vocabulary, ids[:-1])
    assert joined(cut) == "发烧"
    assert sum(len(piece.tokens) for piece in cut) == 8  # the bytes are in the log-probabilities


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(vocabulary, tiny_tokenizer, text, stops):
    ids = [*tiny_tokenizer(text, add_special_tokens=False)["input_ids"], *tiny_tokenizer("c")["input_ids"]]
    pieces = write(vocabulary, ids, stops)
    # What a reader of single characters sees: the first moment that the text ends with a stop string.
    whole = text + "c"
    moments = ((end, whole[:end]) for end in range(1, len(whole) + 1))
    ended = next(((t, min(len(t) - len(s) for s in stops if t.endswith(s))) for _, t in moments
                  if any(t.endswith(s) for s in stops)), None)  # fmt: skip
    assert joined(pieces) == (whole if ended is None else ended[0][: ended[1]])
    assert pieces[-1].finish == ("length" if ended is None else "stop")


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=5))
def test_what_was_shown_is_never_taken_back_and_never_held_without_need(vocabulary, tiny_tokenizer, text, stop):
    ids = tiny_tokenizer(text + "c", add_special_tokens=False)["input_ids"]
    shown, seen = "", ""
    for piece, character in zip(write(vocabulary, ids, [stop]), text + "c", strict=False):
        shown, seen = shown + piece.text, seen + character
        assert seen.startswith(shown)
        if piece.finish is None:
            held = seen[len(shown) :]
            assert stop.startswith(held)
            assert len(held) < len(stop)


def test_a_stop_string_over_characters_of_several_tokens(vocabulary, tiny_tokenizer):
    ids = tiny_tokenizer("体温高。结束。以后", add_special_tokens=False)["input_ids"]
    pieces = write(vocabulary, ids, ["。结束"])
    assert joined(pieces) == "体温高"
    assert pieces[-1].finish == "stop"
    assert sum(len(piece.tokens) for piece in pieces) == 9


def test_stop_strings_wait_for_min_tokens(vocabulary, tiny_tokenizer):
    ids = tiny_tokenizer("axbxc", add_special_tokens=False)["input_ids"]
    assert joined(write(vocabulary, ids, ["x"])) == "a"
    assert joined(write(vocabulary, ids, ["x"], min_tokens=3)) == "axb"


def test_special_tokens_write_nothing_and_have_their_place(vocabulary, tiny_tokenizer):
    a, b = tiny_tokenizer("ab", add_special_tokens=False)["input_ids"]
    pieces = write(vocabulary, [a, 1, b])
    assert joined(pieces) == "ab"
    assert [(p.token.id, p.start, p.end) for piece in pieces for p in piece.tokens] == [(a, 0, 1), (1, 1, 1), (b, 1, 2)]


@given(st.lists(st.integers(0, 259), min_size=1, max_size=30), st.integers(0, 2))
def test_a_prompts_tokens_tile_its_text(vocabulary, ids, hidden):
    placed = placed_prompt(vocabulary, [Token(i) for i in ids], hidden)
    assert placed[0].start == 0
    assert all(a.end == b.start for a, b in pairwise(placed))
    assert all(p.start == p.end == 0 for p in placed[:hidden])
