"""Comparing two adapters on one sealed test."""

from __future__ import annotations

import numpy as np
import pytest

from lorchestra.evaluate.metrics import differences
from lorchestra.evaluate.score import Scores
from lorchestra.pipeline.comparing import paired, unpaired
from lorchestra.registry.manifest import Metric
from lorchestra.stats.intervals import student


def scores(losses, tokens, groups=None) -> Scores:
    count = len(losses)
    return Scores(
        "sft",
        tuple((-float(loss),) for loss in losses),
        tuple((int(n),) for n in tokens),
        (0,) * count,
        tuple(groups or map(str, range(count))),
    )


def test_with_one_tokenizer_it_is_the_verdicts_own_difference():
    chance = np.random.default_rng(0)
    tokens, groups = chance.integers(3, 9, 30), [str(k // 2) for k in range(30)]
    old, new = (scores(chance.gamma(4, size=30), tokens, groups) for _ in range(2))
    (expected,) = differences("new", "old", "ward", new, old)
    found = paired({"ward": old}, {"ward": new})
    assert found.difference == expected.interval
    assert found.after - found.before == pytest.approx(found.difference.estimate)
    assert found.before == pytest.approx(-sum(s[0] for s in old.sums) / tokens.sum())
    assert found.paired


def test_how_the_new_tokenizer_cuts_an_answer_does_not_matter():
    chance = np.random.default_rng(1)
    losses, tokens = chance.gamma(4, size=20), chance.integers(3, 9, 20)
    old = {"ward": scores(chance.gamma(4, size=20), tokens)}
    fine, coarse = scores(losses, tokens * 3), scores(losses, tokens)
    assert paired(old, {"ward": fine}) == paired(old, {"ward": coarse})


def test_domains_are_taken_together_item_by_item():
    chance = np.random.default_rng(2)
    tokens = chance.integers(3, 9, 40)
    a, b = chance.gamma(4, size=40), chance.gamma(3, size=40)
    groups = [str(k) for k in range(40)]
    whole = paired({"x": scores(a, tokens, groups)}, {"x": scores(b, tokens, groups)})
    parts = {"p": slice(25), "q": slice(25, 40)}
    halves = [
        {name: scores(values[part], tokens[part], groups[part]) for name, part in parts.items()} for values in (a, b)
    ]
    assert paired(*halves) == whole
    assert paired(halves[0], dict(reversed(halves[1].items()))) == whole, "by name, not by place"


@pytest.mark.parametrize(("shift", "said"), [(-2.0, "better"), (2.0, "worse"), (0.0, "not told apart")])
def test_what_is_said_of_the_second(shift, said):
    chance = np.random.default_rng(3)
    losses, tokens = chance.gamma(9, size=30), np.full(30, 4)
    assert paired({"x": scores(losses, tokens)}, {"x": scores(losses + shift, tokens)}).said == said


def test_from_two_intervals_the_truth_is_covered_as_often_as_is_claimed():
    """Two independent means of 30 with different spreads; and where both are of the same items, more often still."""
    chance = np.random.default_rng(4)
    covered = {0.0: 0, 0.8: 0}
    rounds = 1500
    for shared in covered:
        for _ in range(rounds):
            common = chance.normal(size=30)
            samples = [
                spread * (np.sqrt(shared) * common + np.sqrt(1 - shared) * chance.normal(size=30)) + mean
                for mean, spread in ((1.0, 1.0), (1.5, 2.0))
            ]
            told = [student(float(x.mean()), float(x.std(ddof=1) / np.sqrt(30)), 30) for x in samples]
            before, after = (Metric(value=t.estimate, low=t.low, high=t.high, n=30) for t in told)
            covered[shared] += not unpaired(before, after).difference.excludes(0.5)
    assert 0.935 < covered[0.0] / rounds < 0.975
    assert covered[0.8] / rounds > 0.98


def test_an_interval_that_is_not_there_leaves_nothing_to_say():
    whole, half = Metric(value=2.0, low=1.9, high=2.1, n=9), Metric(value=1.0, low=0.9, n=7)
    found = unpaired(whole, half)
    assert (found.difference.estimate, found.difference.high, found.difference.n) == (-1.0, np.inf, 7)
    assert found.said == "not told apart"
    assert found.as_dict()["high"] is None
    assert not found.paired
