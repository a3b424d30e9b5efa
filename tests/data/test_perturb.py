"""The laws of perturbed training data: exact counts, nested amounts, nothing else touched, the same in any process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorchestra.data.example import Example, Message
from lorchestra.data.perturb import imbalanced, subset, with_label_noise
from lorchestra.data.split import normalise
from lorchestra.errors import DataError

LABELS = ("heart", "skin", "nerves", "Bones")


def example(
    number: int, gold: str, *, group: str = "", rejected: str | None = None, choices: tuple[str, ...] = ()
) -> Example:
    turns = (Message("system", "Be brief."), Message("user", f"question {number}"), Message("assistant", gold))
    return Example(turns, rejected, choices, group, f"file.jsonl:{number}")


def choice(number: int) -> Example:
    return example(number, LABELS[number % 4], choices=LABELS)


def label(number: int) -> Example:
    return example(number, LABELS[number % 4])


def text(number: int) -> Example:
    return example(number, f"answer {number // 2}")  # every answer twice


def pair(number: int) -> Example:
    return example(number, f"chosen {number}", rejected=f"rejected {number}")


KINDS = {"choice": choice, "label": label, "text": text, "pair": pair}
kinds = st.sampled_from(list(KINDS))
# 16 and more, so that the four labels stand for four examples each
sizes, seeds = st.integers(16, 60), st.integers(0, 5)
laws = settings(deadline=None, max_examples=40)  # the machine may be busy


def made(kind: str, n: int) -> tuple[Example, ...]:
    return tuple(KINDS[kind](i) for i in range(n))


def skewed(counts: list[int]) -> tuple[Example, ...]:
    labels = [f"label {k}" for k, count in enumerate(counts) for _ in range(count)]
    return tuple(example(i, label) for i, label in enumerate(labels))


def ids(examples: tuple[Example, ...]) -> set[str]:
    return {e.origin for e in examples}


# Size


@laws
@given(sizes, st.data(), seeds)
def test_a_subset_has_n_examples_in_their_order_and_contains_the_smaller_ones(
    n: int, data: st.DataObject, seed: int
) -> None:
    examples = made("text", n)
    small, large = sorted(data.draw(st.tuples(st.integers(1, n), st.integers(1, n))))
    few, many = subset(examples, small, seed), subset(examples, large, seed)
    assert (len(few), len(many)) == (small, large)
    assert ids(few) <= ids(many)
    assert many == tuple(e for e in examples if e in many)
    assert subset(examples, n, seed) == examples


@laws
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.data(), seeds)
def test_a_subset_takes_at_most_one_group_in_part(groups: list[int], data: st.DataObject, seed: int) -> None:
    examples = tuple(example(i, "a", group=f"patient {g}") for i, g in enumerate(groups))
    kept = subset(examples, data.draw(st.integers(1, len(examples))), seed)
    whole, some = Counter(e.group for e in examples), Counter(e.group for e in kept)
    assert sum(some[group] < whole[group] for group in some) <= 1


@laws
@given(sizes, st.randoms(use_true_random=False), seeds)
def test_who_is_kept_or_wrong_does_not_depend_on_the_order_of_the_files(n: int, random: object, seed: int) -> None:
    examples = made("choice", n)
    shuffled = list(examples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(subset(examples, n // 2, seed)) == set(subset(shuffled, n // 2, seed))
    assert set(imbalanced(examples, 2, seed)) == set(imbalanced(shuffled, 2, seed))
    for kind in KINDS:
        examples = made(kind, n)
        shuffled = [examples[int(e.origin.split(":")[1])] for e in shuffled]
        assert set(with_label_noise(examples, 0.3, seed)) == set(with_label_noise(shuffled, 0.3, seed))


@pytest.mark.parametrize(
    ("n", "message"), [(0, "expected at least 1"), (-3, "expected at least 1"), (21, "there are 20")]
)
def test_a_subset_that_cannot_be_had_is_refused(n: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        subset(made("text", 20), n, 0)


# Label noise


@laws
@given(kinds, sizes, st.floats(0, 1), seeds)
def test_exactly_so_many_labels_are_wrong_and_nothing_else_changed(kind: str, n: int, share: float, seed: int) -> None:
    examples = made(kind, n)
    noisy = with_label_noise(examples, share, seed)
    assert sum(normalise(a.gold) != normalise(b.gold) for a, b in zip(examples, noisy, strict=True)) == round(share * n)
    for before, after in zip(examples, noisy, strict=True):
        if after == before:
            continue
        assert (after.prompt, after.choices, after.group, after.origin) == (
            before.prompt,
            before.choices,
            before.group,
            before.origin,
        )
        assert after.messages[-1].role == "assistant"
        if kind == "pair":
            assert (after.gold, after.rejected) == (before.rejected, before.gold)
        else:
            assert after.rejected is None
            assert after.gold in {e.gold for e in examples}
        if kind == "choice":
            assert after.answer != before.answer


@laws
@given(kinds, sizes, st.tuples(st.floats(0, 1), st.floats(0, 1)), seeds)
def test_what_is_wrong_at_a_smaller_share_is_wrong_in_the_same_way_at_a_larger(
    kind: str, n: int, shares: tuple[float, float], seed: int
) -> None:
    examples = made(kind, n)
    less, more = (with_label_noise(examples, share, seed) for share in sorted(shares))
    assert all(b == c for a, b, c in zip(examples, less, more, strict=True) if a != b)


@laws
@given(st.lists(st.integers(0, 30), min_size=4, max_size=60), seeds)
def test_free_text_is_deranged(answers: list[int], seed: int) -> None:
    answers = [*range(100, 100 + max(Counter(answers).values())), *answers]  # no answer is that of more than a half
    assume(4 * len(set(answers)) > len(answers))  # free text, not labels
    examples = tuple(example(i, f"answer {answer}") for i, answer in enumerate(answers))
    noisy = with_label_noise(examples, 1, seed)
    assert Counter(e.gold for e in noisy) == Counter(e.gold for e in examples)
    assert all(a.gold != b.gold for a, b in zip(examples, noisy, strict=True))


def test_an_answer_that_most_examples_share_is_wrong_for_none_of_them() -> None:
    examples = tuple(example(i, "none" if i < 12 else f"answer {i}") for i in range(18))
    noisy = with_label_noise(examples, 1, 0)
    assert all(a.gold != b.gold for a, b in zip(examples, noisy, strict=True))


@pytest.mark.parametrize("kind", ["choice", "label"])
def test_every_wrong_label_is_as_likely(kind: str) -> None:
    examples = made(kind, 4_000)
    noisy = with_label_noise(examples, 1, 3)
    moves = Counter((a.gold, b.gold) for a, b in zip(examples, noisy, strict=True))
    assert len(moves) == 12
    # 4,000 / 12 expected; five standard deviations of a binomial count of 1,000 trials at a third
    assert all(abs(count - 1_000 / 3) < 5 * (1_000 * 2 / 9) ** 0.5 for count in moves.values())


def test_a_label_that_differs_in_letter_case_only_is_not_a_wrong_one() -> None:
    golds = ["Yes", "yes", " YES", "No"]
    examples = tuple(example(i, golds[i % 4]) for i in range(40))
    noisy = with_label_noise(examples, 1, 0)
    assert {(normalise(a.gold), normalise(b.gold)) for a, b in zip(examples, noisy, strict=True)} == {
        ("yes", "no"),
        ("no", "yes"),
    }


def test_each_example_of_a_mixture_is_wrong_in_its_own_way() -> None:
    examples = tuple(KINDS[kind](100 * k + i) for k, kind in enumerate(("choice", "text", "pair")) for i in range(8))
    noisy = with_label_noise(examples, 1, 0)
    assert all(e.gold in LABELS for e in noisy[:8])
    assert {e.gold for e in noisy[8:16]} == {e.gold for e in examples[8:16]}
    assert all(e.gold.startswith("rejected") for e in noisy[16:])


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(DataError, match="expected 0 to 1"):
        with_label_noise(made("text", 20), share, 0)


def test_where_all_answers_are_one_there_is_no_wrong_one() -> None:
    examples = tuple(example(i, "Yes." if i % 2 else "yes.") for i in range(20))
    assert with_label_noise(examples, 0, 0) == examples
    with pytest.raises(DataError, match="no wrong answer"):
        with_label_noise(examples, 0.5, 0)


# Imbalance


@laws
@given(st.lists(st.integers(8, 40), min_size=2, max_size=5), st.floats(1, 8), seeds)
def test_classes_follow_the_profile_and_none_is_lost(counts: list[int], ratio: float, seed: int) -> None:
    examples = skewed(counts)
    kept = imbalanced(examples, ratio, seed)
    assert kept == tuple(e for e in examples if e in kept)
    left = Counter(e.gold for e in kept)
    profile = sorted(left.values(), reverse=True)
    assert len(profile) == len(counts)
    assert profile[-1] >= 1
    for k, size in enumerate(profile):
        assert abs(size - profile[0] * ratio ** (-k / (len(counts) - 1))) <= 0.5 + 1e-9
    # as large as the classes allow: with one more in the largest, some class would not have enough
    more = [(profile[0] + 1) * ratio ** (-k / (len(counts) - 1)) for k in range(len(counts))]
    assert any(need > have - 1e-6 for need, have in zip(more, sorted(counts, reverse=True), strict=True))
    # a class that was larger is not the rarer one
    assert all(
        left[f"label {a}"] >= left[f"label {b}"]
        for a in range(len(counts))
        for b in range(len(counts))
        if counts[a] > counts[b]
    )


@laws
@given(st.lists(st.integers(4, 30), min_size=2, max_size=5), seeds)
def test_ratio_1_thins_every_class_to_the_smallest(counts: list[int], seed: int) -> None:
    left = Counter(e.gold for e in imbalanced(skewed(counts), 1, seed))
    assert left == {f"label {k}": min(counts) for k in range(len(counts))}


@laws
@given(st.lists(st.integers(8, 40), min_size=2, max_size=4), seeds)
def test_what_is_kept_of_a_class_is_nested_over_ratios(counts: list[int], seed: int) -> None:
    examples = skewed(counts)
    for k in range(len(counts)):
        kept = [ids(tuple(e for e in imbalanced(examples, r, seed) if e.gold == f"label {k}")) for r in (1, 2, 4, 8)]
        assert all(a <= b for a, b in pairwise(sorted(kept, key=len)))


def test_of_classes_alike_the_seed_decides_which_is_rare() -> None:
    examples = skewed([40, 40])
    rare = {min((c := Counter(e.gold for e in imbalanced(examples, 10, seed))), key=c.__getitem__) for seed in range(9)}
    assert rare == {"label 0", "label 1"}


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(DataError, match="at least 1"):
        imbalanced(skewed([20, 20]), ratio, 0)


@pytest.mark.parametrize("examples", [made("text", 40), skewed([40])], ids=["free text", "one answer"])
def test_without_classes_there_is_no_imbalance(examples: tuple[Example, ...]) -> None:
    with pytest.raises(DataError, match="needs classes"):
        imbalanced(examples, 2, 0)


def test_a_ratio_that_the_classes_are_too_small_for_is_refused() -> None:
    with pytest.raises(DataError, match="ask for at most 20"):
        imbalanced(skewed([20, 20]), 21, 0)
    assert len(imbalanced(skewed([20, 20]), 20, 0)) == 21


# All of them


def test_another_seed_is_another_choice() -> None:
    examples = made("choice", 200)
    assert subset(examples, 50, 0) != subset(examples, 50, 1)
    assert with_label_noise(examples, 0.2, 0) != with_label_noise(examples, 0.2, 1)
    assert imbalanced(examples, 4, 0) != imbalanced(examples, 4, 1)


def test_the_choices_of_one_seed_are_independent_of_each_other() -> None:
    """Were the wrong labels those of the first subset, a small training set would be noisier than a large one."""
    examples = made("choice", 2_000)
    noisy = with_label_noise(examples, 0.5, 0)
    wrong = {a.origin for a, b in zip(examples, noisy, strict=True) if a != b}
    # 250 of 500 expected; five standard deviations
    assert abs(len(ids(subset(examples, 500, 0)) & wrong) - 250) < 5 * 125**0.5


def test_another_process_makes_the_same_choice() -> None:
    code = (
        "from lorchestra.data.example import Example, Message as M\n"
        "from lorchestra.data.perturb import imbalanced, subset, with_label_noise\n"
        "texts, labels = (\n"
        "    [Example((M('user', f'q{i}'), M('assistant', f'{i % k}'))) for i in range(40)] for k in (30, 4)\n"
        ")\n"
        "print(subset(texts, 9, 4), with_label_noise(texts, 0.4, 4), with_label_noise(labels, 0.4, 4), "
        "imbalanced(labels, 3, 4))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] != b""
