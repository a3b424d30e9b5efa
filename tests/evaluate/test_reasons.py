"""The sentences about a choice: what was taken, what the minimum would have been, what that is worth."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.reasons import called, mixture, reasons
from lorchestra.evaluate.score import Scores
from lorchestra.evaluate.selection import Selection, select
from lorchestra.fusion.search import Candidate


def of(nll) -> Scores:
    n = len(nll)
    return Scores("sft", tuple((-float(v),) for v in nll), ((10,),) * n, (0,) * n, tuple(map(str, range(n))))


def choice(levels, origins, *, n=40, noise=0.3, seed=0, **settings) -> Selection:
    rng = np.random.default_rng(seed)
    hard = rng.uniform(5, 15, n)
    scores = [{"d": of(hard * (level + (level != 1) * rng.normal(0, noise, n)))} for level in levels]
    candidates = [Candidate({"x": 0.5 * c, "y": 1.0} if o != "base" else {}, o) for c, o in enumerate(origins)]
    return select(candidates, scores, {"d": of(hard)}, **{"goal": Goal(), "betas": {}, "repeats": 3} | settings)


EQUAL = ([1.0, *[0.999] * 20], ["base", "single", *["sobol"] * 19])


def test_the_rule_and_the_plain_minimum_are_both_named():
    found = choice(*EQUAL)
    assert found.chosen != found.minimum
    first = reasons(found)[0]
    lowest = found.standings[found.minimum]
    assert first.startswith("Chosen by the one-standard-error rule: ")
    assert f"The plain minimum would have been {called(lowest.candidate)}, {lowest.value.estimate:.4f} [" in first
    behind = found.standings[found.chosen].behind
    assert f"lower by {behind.estimate:.4f} (on the same items: 95 % interval" in first
    plain = choice(*EQUAL, rule="minimum")
    assert plain.chosen == plain.minimum == found.minimum
    assert reasons(plain)[0].startswith(f"Chosen is the plain minimum: {called(lowest.candidate)}")
    assert (
        f"The one-standard-error rule would have taken {called(found.standings[found.chosen].candidate)}"
        in (reasons(plain)[0])
    )


def test_the_optimism_is_printed_with_its_interval_the_folds_and_the_groups():
    found = choice(*EQUAL)
    said = reasons(found)[1]
    naive, worth = found.standings[found.minimum].value.estimate, found.worth[1]
    assert said.startswith(f"The best of 21 candidates scores {naive:.4f} on the items it was chosen on; ")
    assert f"flattered by {worth.optimism.estimate:.4f} [{worth.optimism.low:.4f}, {worth.optimism.high:.4f}]" in said
    assert "5 group-wise folds, dealt 3 times; 40 groups in the smallest domain" in said


def test_where_every_fold_agrees_there_is_no_optimism_to_tell():
    found = choice([1.0, 0.9, 0.5], ["base", "single", "sobol"], noise=0.01)
    first, second = reasons(found)
    assert first.endswith("it is the plain minimum too.")
    assert "it is chosen without any of the folds too, so nothing flatters it: " in second
    assert second.endswith("By the one-standard-error rule: the same.")
    assert "flattered by" not in second


def test_candidates_that_followed_the_items_are_told_apart():
    found = choice([1.0, 0.9, 0.5, 0.6], ["base", "single", "gradient", "tpe"], noise=0.01)
    (said,) = [line for line in reasons(found) if line.startswith("Found by following λ-validation itself")]
    assert "2 (gradient, tpe)" in said
    assert not any("following" in line for line in reasons(choice([1.0, 0.9, 0.5], ["base", "single", "sobol"])))


def test_the_limit_is_told():
    goal = Goal(tolerance=0.05)
    kept = choice([1.0, 0.5, 0.52, 0.9], ["base", "single", "uniform", "sobol"], noise=0.001, goal=goal)
    assert reasons(kept)[-1] == "2 of 4 candidates crossed the limit and were not considered."
    none = choice([1.0, 0.9], ["base", "sobol"], noise=0.001, goal=Goal(tolerance=0.0))
    assert none.kept, "without a single adapter there is nothing to measure against"


def test_one_group_is_told():
    assert "one group" in reasons(choice([1.0, 0.9], ["base", "single"], n=1))[1]


@pytest.mark.parametrize("settings", [{}, {"rule": "minimum"}, {"goal": Goal("worst", tolerance=0.1)}])
def test_no_claim_without_an_interval(settings):
    """Every score that is not a count stands beside its interval, or is what the interval is about."""
    for line in reasons(choice(*EQUAL, **settings)):
        assert not re.search(r"nan|inf|None", line)


def test_names():
    assert mixture({"a": 0.3, "b": 0.0, "c": -0.2}) == "0.3·a + -0.2·c"
    assert mixture({}) == "the base alone"
    assert called(Candidate({"a": 1.0}, "single")) == "1·a (single)"
    assert called(Candidate({"a": 0.0}, "base")) == "the base alone"
