"""Leakage against its definition: a held-out example whose like, by prompt or by text, is in an earlier part."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.data.example import Example, Message
from lorchestra.data.leakage import PARTS, alike
from lorchestra.data.near import SIMILAR, near_pairs, shingles, similarity
from lorchestra.data.split import SplitSpec, content_key, normalise, split

Item = tuple[str, str, Example]


def example(prompt: str, gold: str, rejected: str | None = None, group: str = "", system: str = "") -> Example:
    turns = (*([Message("system", system)] if system else []), Message("user", prompt), Message("assistant", gold))
    return Example(turns, rejected, (), group, f"{prompt[:6]}:{gold[:6]}")


def words(seed: int, n: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(f"v{rng.randrange(10_000)}" for _ in range(n))


def text(item: Example) -> str:
    return normalise("\n".join([*(t.content for t in item.messages if t.role != "system"), item.rejected or ""]))


def by_definition(items: list[Item]) -> dict[str, tuple[int, int, int]]:
    """Stage → (near repetitions within a part, leaks, leaks of the very same prompt), over all pairs of examples."""
    out = {}
    for stage in {stage for stage, _, _ in items}:
        near = leaks = exact = 0
        for j, (of, part, item) in enumerate(items):
            if of != stage:
                continue
            near += any(
                (s, p) == (of, part) and similarity(shingles(text(e)), shingles(text(item))) >= SIMILAR
                for s, p, e in items[:j]
            )
            earlier = [e for _, p, e in items if PARTS.index(p) < PARTS.index(part)]
            same = any(content_key(e)[0] == content_key(item)[0] for e in earlier)
            exact += same
            leaks += same or any(similarity(shingles(text(e)), shingles(text(item))) >= SIMILAR for e in earlier)
        out[stage] = (near, leaks, exact)
    return out


def found(items: list[Item]) -> dict[str, tuple[int, int, int]]:
    return {stage: (a.near, len(a.leaks), a.exact) for stage, a in alike(items).items()}


PROMPTS = [words(i) for i in range(3)]
ITEM = st.tuples(
    st.sampled_from(["general", "clinic"]),
    st.sampled_from(PARTS),
    st.builds(
        # Long prompts and short answers are near-duplicates of one another, long answers are not.
        example,
        st.sampled_from([*PROMPTS, f"{PROMPTS[0]} today"]),
        st.sampled_from(["yes", "no", *map(words, (7, 8))]),
    ),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ITEM, min_size=1, max_size=9))
def test_leaks_are_those_of_the_definition_in_whatever_order_the_stages_come(items: list[Item]) -> None:
    # Sources of fewer than ten texts have no boilerplate, and pairs this alike are never missed.
    assert found(items) == by_definition(items)


def test_every_held_out_example_of_a_prompt_that_a_later_stage_trains_on_leaks() -> None:
    """The first stage holds out two answers to one question; a later stage, of other groups, trains on the question."""
    asked = "What lowers a fever?"
    held = [("general", "test", example(asked, words(i), group=f"p{i}")) for i in (1, 2)]
    trained = ("clinic", "train", example(asked, words(3), group="p3"))
    assert alike([*held, trained])["general"].exact == 2
    assert alike([trained, *held])["general"].exact == 2
    assert alike([*held, trained])["clinic"] == alike([trained, *held])["clinic"]


def test_a_leak_names_both_ends_the_earlier_part_last() -> None:
    items: list[Item] = [
        ("general", "test", example("aaaaaa", "held")),
        ("clinic", "validation", example("aaaaaa", "valid")),
        ("clinic", "train", example("aaaaaa", "train")),
    ]
    told = alike(items)
    assert told["general"].leaks == ("general/test aaaaaa:held ~ clinic/train aaaaaa:train",)
    assert told["clinic"].leaks == ("clinic/validation aaaaaa:valid ~ clinic/train aaaaaa:train",)


def split_items(stages: dict[str, list[Example]], spec: SplitSpec) -> list[Item]:
    return [(s, part, e) for s, found in stages.items() for part, es in split(found, spec).parts() for e in es]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=9), st.lists(st.integers(0, 9), max_size=9), st.integers(0, 5))
def test_the_split_cannot_part_a_prompt_that_is_its_group(one: list[int], other: list[int], seed: int) -> None:
    """Two stages, each with its own answers to the same questions: hashing the question keeps it on one side."""
    stages = {
        "general": [example(words(i), words(100 + i), group=words(i)) for i in one],
        "clinic": [example(words(i), words(200 + i), group=f" {words(i).upper()}") for i in other],
    }
    items = split_items(stages, SplitSpec(0.5, 0.25, 0.25, seed))
    assert all(a.exact == 0 for a in alike(items).values())


def test_nearly_the_same_question_can_be_parted_by_the_split_and_is_found() -> None:
    general = [example(words(i), "yes", group=words(i)) for i in range(60)]
    clinic = [example(f"{words(i)} today", "yes", group=f"{words(i)} today") for i in range(60)]
    items = split_items({"general": general, "clinic": clinic}, SplitSpec(0.5, 0.25, 0.25))
    told = alike(items)
    parts = {(stage, e.prompt[-1].content.removesuffix(" today")): part for stage, part, e in items}
    parted = sum(parts["general", words(i)] != parts["clinic", words(i)] for i in range(60))
    assert parted > 20, "two hashes, so most pairs are parted"
    assert sum(len(a.leaks) for a in told.values()) == parted
    assert all(a.exact == 0 for a in told.values())


def test_other_groups_part_one_prompt_and_that_is_found() -> None:
    """Grouped by patient, the same question of two patients may fall on two sides."""
    asked = [example("What lowers a fever?", words(i), group=f"patient {i}") for i in range(40)]
    items = split_items({"general": asked}, SplitSpec(0.5, 0.25, 0.25))
    held_out = sum(part != "train" for _, part, _ in items)
    assert held_out > 0
    assert alike(items)["general"].exact == held_out


def test_a_system_turn_makes_another_prompt_but_no_other_text() -> None:
    items: list[Item] = [
        ("general", "train", example(words(1), "yes", system="Be brief.")),
        ("general", "test", example(words(1), "yes", system="Answer as a nurse.")),
    ]
    assert found(items) == {"general": (0, 1, 0)}


def test_the_rejected_answer_counts_as_text() -> None:
    long = words(5, 80)
    items: list[Item] = [
        ("dpo", "train", example("short question", "good", rejected=long)),
        ("sft", "test", example("another one", long)),
        ("sft", "validation", example("a third", "good")),
    ]
    assert near_pairs([shingles(text(e)) for _, _, e in items]) == [(0, 1)]
    assert found(items) == {"dpo": (0, 0, 0), "sft": (0, 1, 0)}


def test_nothing_in_nothing_out() -> None:
    assert alike([]) == {}
