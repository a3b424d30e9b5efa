"""The law of the split: the part is a function of seed and normalised group, and of nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.data.example import Example, Message
from lorchestra.data.split import SplitSpec, content_key, normalise, part_of, split
from lorchestra.errors import DataError

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


def example(prompt: str, gold: str, group: str = "", rejected: str | None = None, origin: str = "") -> Example:
    return Example((Message("user", prompt), Message("assistant", gold)), rejected, (), group, origin)


examples = st.lists(
    st.builds(example, words, words, st.sampled_from(["p1", "p2", "p3", "p4", "p5"]), st.none() | words, words),
    max_size=30,
)


@given(st.text(st.characters(codec="utf-8")))
def test_normalise_is_idempotent(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f" \t{text}\n") == once


def test_normalise_removes_what_makes_no_other_text() -> None:
    assert normalise("  Ｓepsis\u00a0 IS\n bad ") == "sepsis is bad"
    assert normalise("Straße") == normalise("STRASSE")
    assert normalise("败血症") != normalise("败血病")


@given(examples, examples, st.randoms(use_true_random=False), st.integers(0, 3))
def test_a_group_falls_into_one_part_whatever_the_source_order_or_duplicates(
    one: list[Example], other: list[Example], random: object, seed: int
) -> None:
    spec = SplitSpec(0.5, 0.25, 0.25, seed)
    shuffled = [*one, *one, *other]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    part: dict[str, str] = {}
    for source in (one, other, shuffled):
        for name, members in split(source, spec).parts():
            for member in members:
                assert part.setdefault(normalise(member.group), name) == name
                assert part_of(f" {member.group.upper()} ", spec) == name


@given(examples)
def test_nothing_is_lost_and_nothing_is_twice(items: list[Example]) -> None:
    parts = split(items, SplitSpec(0.5, 0.25, 0.25))
    kept = [content_key(e) for _, members in parts.parts() for e in members]
    assert len(kept) == len(set(kept))
    assert set(kept) == {content_key(e) for e in items}
    assert len(kept) + parts.duplicates == len(items)
    order = {id(e): i for i, e in enumerate(items)}
    places = [order[id(e)] for e in parts.train]
    assert places == sorted(places), "training keeps the order of the input"


def test_the_first_held_out_examples_are_a_fair_sample_of_all_sources() -> None:
    """A limit takes the first n: they must not all come from the source that was read first."""
    sources = [[example(f"{name} {i}", "a", f"{name} {i}") for i in range(400)] for name in ("first", "second")]
    parts = split([e for source in sources for e in source], SplitSpec(0.6, 0.2, 0.2))
    for members in (parts.validation, parts.test):
        first = sum(e.group.startswith("first") for e in members[:40])
        # four standard deviations of a draw of 40 from two sources alike
        assert 8 <= first <= 32


def test_equal_but_for_case_and_space_is_repeated_and_a_new_rejected_answer_is_not() -> None:
    items = [example("Q", "a"), example(" q", "A "), example("q", "a", rejected="b"), example("q", "a", rejected="c")]
    parts = split(items, SplitSpec(1.0, 0.0, 0.0))
    assert parts.train == (items[0], items[2], items[3])
    assert parts.duplicates == 1


@pytest.mark.parametrize(
    "shares", [(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.2, 0.0, 0.8), (1.0, 0.0, 0.0), (0.9, 0.1, 0.0)]
)
def test_shares_are_met(shares: tuple[float, float, float]) -> None:
    n = 4_000
    parts = split([example(f"question {i}", "a", f"g{i}") for i in range(n)], SplitSpec(*shares, seed=7))
    for share, (_, members) in zip(shares, parts.parts(), strict=True):
        # five standard deviations of a binomial share; a share of 0 or 1 is exact
        assert abs(len(members) / n - share) <= 5 * (share * (1 - share) / n) ** 0.5


def test_another_seed_is_another_split() -> None:
    items = [example(f"question {i}", "a", f"g{i}") for i in range(200)]
    assert split(items, SplitSpec(seed=0)).test != split(items, SplitSpec(seed=1)).test


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.0, 0.0, 0.0), (float("nan"), 0.5, 0.5)])
def test_shares_that_do_not_add_up_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="three shares that are not negative and add up to 1"):
        SplitSpec(*shares)
