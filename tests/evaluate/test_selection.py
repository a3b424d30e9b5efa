"""Choosing among candidates, by simulation: what the naive best promises, what the folds say, what the rule takes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.metrics import loss_ratios
from lorchestra.evaluate.score import Scores
from lorchestra.evaluate.selection import RULES, Selection, blind, select, simplicity
from lorchestra.fusion.search import Candidate

ORIGINS = ["base", "single", "single", "stack", "uniform", "drop", "heuristic later"]


def of(nll: Any, groups: Any = None) -> Scores:
    """Answers of ten tokens each."""
    n = len(nll)
    names = tuple(map(str, range(n) if groups is None else groups))
    return Scores("sft", tuple((-float(v),) for v in nll), ((10,),) * n, (0,) * n, names)


def chosen(
    levels: Any, origins: Any, *, n: int = 20, noise: float = 0.3, seed: int = 0, goal: Goal | None = None,
    difficulty: float = 0.5, copies: int = 1, **settings: Any,
) -> Selection:  # fmt: skip
    """Candidates with the true ``levels`` (of loss over the base's, in each domain) on n groups of noisy items."""
    rng = np.random.default_rng(seed)
    levels = np.atleast_2d(np.asarray(levels, dtype=float).T).T  # [C, D]
    C, D = levels.shape
    names = "abc"[:D]
    hard = {d: rng.uniform(1 - difficulty, 1 + difficulty, n) * 10 for d in names}
    groups = {d: [f"{d}{k}" for k in range(n) for _ in range(copies)] for d in names}
    reference = {d: of(hard[d].repeat(copies), groups[d]) for d in names}
    scores = [
        {
            d: of((hard[d] * (levels[c, k] + (rng.normal(0, noise, n) if levels[c, k] != 1 else 0))).repeat(copies),
                  groups[d])
            for k, d in enumerate(names)
        }
        for c in range(C)
    ]  # fmt: skip
    found = [Candidate({"x": float(c), "y": 1.0}, origins[c]) for c in range(C)]
    return select(found, scores, reference, goal or Goal(), {}, **{"repeats": 2, "seed": seed} | settings)


def test_the_best_of_forty_equals_on_twenty_items_is_optimistic_and_the_folds_are_not():
    """True value of every candidate, so of every choice: 0.9. 120 simulations."""
    found = [chosen([0.9] * 40, ["sobol"] * 40, seed=s) for s in range(120)]
    for k, rule in enumerate(RULES):
        worth = [selection.worth[k] for selection in found]
        assert worth[0].rule == rule
        naive = np.array([w.naive for w in worth])
        honest = np.array([w.honest.estimate for w in worth])
        assert naive.mean() < 0.9 - 0.1, "forty tries flatter the best by two standard errors of a candidate"
        assert honest.mean() == pytest.approx(0.9, abs=4 * honest.std(ddof=1) / math.sqrt(len(found)))
        assert np.mean([w.honest.excludes(0.9) for w in worth]) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / len(found))
        assert np.mean([w.honest.error for w in worth]) == pytest.approx(honest.std(ddof=1), rel=0.25)
        optimism = np.array([w.optimism.estimate for w in worth])
        assert optimism == pytest.approx(honest - naive)
        assert optimism.mean() > 0.1


def test_the_estimate_follows_a_choice_that_is_worth_something():
    """One candidate is truly better: the procedure finds it mostly, and its estimate lies at what that gives."""
    levels = [0.9] * 19 + [0.6]
    found = [chosen(levels, ["sobol"] * 20, n=40, seed=s) for s in range(60)]
    assert np.mean([selection.chosen == 19 for selection in found]) > 0.9
    honest = np.array([selection.worth[1].honest.estimate for selection in found])
    assert honest.mean() == pytest.approx(0.6, abs=0.03)
    assert np.mean([selection.standings[19].picked for selection in found]) > 0.9


@pytest.mark.parametrize("n", [20, 100])
def test_the_one_se_rule_takes_the_simple_answer_when_candidates_do_not_differ(n: int):
    """All are as good as the base but for noise; of 33 searched points one looks best of all by two standard errors."""
    levels, origins = [1.0, *[0.9999] * 39], [*ORIGINS, *["sobol"] * 33]
    found = [chosen(levels, origins, n=n, seed=s, noise=0.1) for s in range(60)]
    taken = [selection.standings[selection.chosen].candidate.origin for selection in found]
    lowest = [selection.standings[selection.minimum].candidate.origin for selection in found]
    assert np.mean([origin in ("base", "single") for origin in taken]) > 0.8
    assert np.mean([origin == "base" for origin in taken]) > 0.6
    assert np.mean([origin in ("base", "single") for origin in lowest]) < 0.2


@pytest.mark.parametrize("better", range(len(ORIGINS) + 1))
def test_the_one_se_rule_takes_the_better_one_when_it_is_better(better: int):
    levels = [1.0, *[0.95] * (len(ORIGINS))]
    levels[better] = 0.8 if better else 1.0
    if better == 0:
        levels[1:] = [1.3] * len(ORIGINS)
    found = [chosen(levels, [*ORIGINS, "sobol"], n=60, noise=0.1, seed=s) for s in range(10)]
    assert [selection.chosen for selection in found] == [better] * 10


def test_simple_means_the_order_of_the_issue():
    order = ["base", "single", "stack", "uniform", "drop", "heuristic equal", "gradient", "layer groups"]
    assert sorted(order, key=simplicity) == order
    assert simplicity("sobol") == simplicity("grid") == simplicity("cma-es") == simplicity("bayes")
    for c in range(1, len(order)):  # no noise at all: everything is within zero of everything
        levels = [0.9] * (len(order) - c)
        found = chosen(levels, order[c:][::-1], noise=0.0)
        assert found.standings[found.chosen].candidate.origin == order[c]


def test_among_equally_simple_ones_the_lowest():
    found = chosen([0.9, 0.7, 0.8], ["single"] * 3, noise=0.01)
    assert (found.chosen, found.minimum) == (1, 1)


def test_the_error_is_that_of_the_paired_difference_not_of_the_level():
    """Items differ much in difficulty, candidates little on each: by the level's error all would be equal."""
    found = chosen([0.80, 0.90], ["sobol", "single"], n=100, noise=0.05, difficulty=0.9)
    assert found.chosen == 0
    rng = np.random.default_rng(1)
    hard = rng.uniform(1, 19, 50)
    loss = hard * rng.uniform(0.2, 1.8, 50)  # the level is unsure …
    other = loss + hard * (0.02 + rng.normal(0, 0.01, 50))  # … the difference is not
    pair = [{"d": of(loss)}, {"d": of(other)}]
    sure = select([Candidate({"x": 1.0}, "sobol"), Candidate({"y": 1.0}, "single")], pair, {"d": of(hard)}, Goal(), {})
    level, behind = sure.standings[1].value, sure.standings[1].behind
    assert level.error is not None
    assert behind.error is not None
    assert level.error > behind.estimate > behind.error
    assert sure.chosen == 0


def test_values_errors_and_differences_against_the_bootstrap():
    found = chosen([0.9, 0.8, 1.1], ["single", "sobol", "uniform"], n=50, seed=3)
    rng = np.random.default_rng(3)
    hard = rng.uniform(0.5, 1.5, 50) * 10
    losses = [hard * (level + rng.normal(0, 0.3, 50)) for level in (0.9, 0.8, 1.1)]
    drawn = rng.multinomial(50, np.full(50, 1 / 50), size=4000)
    ratios = [(drawn @ loss) / (drawn @ hard) for loss in losses]
    for c, standing in enumerate(found.standings):
        assert standing.value.estimate == pytest.approx(losses[c].sum() / hard.sum())
        assert standing.value.error == pytest.approx(ratios[c].std(), rel=0.1)
        assert standing.behind.error == pytest.approx((ratios[c] - ratios[found.minimum]).std(), rel=0.1, abs=1e-12)
    assert found.standings[found.minimum].behind.estimate == found.standings[found.minimum].behind.error == 0


def test_repeating_the_items_of_a_group_changes_nothing():
    once, often = (chosen([0.9, 0.8, 0.85], ["single", "sobol", "stack"], copies=c) for c in (1, 5))
    assert often.groups == once.groups == {"a": 20}
    assert (often.items, once.items) == (100, 20)
    assert often.chosen == once.chosen
    for ours, theirs in zip(often.standings, once.standings, strict=True):
        assert ours.value.error == pytest.approx(theirs.value.error)
        assert ours.picked == theirs.picked
    assert [w.honest.estimate for w in often.worth] == pytest.approx([w.honest.estimate for w in once.worth])


LEVELS = [(1.0, 1.0), (0.5, 0.95), (0.95, 0.5), (0.6, 0.6), (0.45, 0.8)]
NAMES = ["base", "single", "single", "uniform", "sobol"]


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (Goal("worst"), 3),
        (Goal("weighted", {"a": 3, "b": 1}), 4),
        (Goal(tolerance=0.12), 3),
        (Goal("weighted", {"a": 3, "b": 1}, tolerance=0.12), 3),
        (Goal("weighted", {"b": 1}), 2),
    ],
)
def test_the_goal_decides(goal: Goal, expected: int):
    found = chosen(LEVELS, NAMES, goal=goal, noise=0.02, n=80)
    assert found.chosen == found.minimum == expected


def test_the_limit_is_kept_inside_the_folds_too_and_if_none_keeps_it_the_least_transgressor_is_taken():
    found = chosen(LEVELS, NAMES, goal=Goal("weighted", {"a": 1}, tolerance=0.01), noise=0.02, n=80)
    assert not found.kept
    assert found.chosen == 3
    assert found.standings[3].picked == 1.0
    assert found.standings[4].excess == pytest.approx(0.29, abs=0.03)


def test_the_pareto_front():
    found = chosen(LEVELS, NAMES, noise=0.001)
    assert [standing.undominated for standing in found.standings] == [False, False, True, True, True]


def test_the_base_may_be_chosen_and_what_is_delivered_is_the_simplest_other():
    found = chosen([1.0, 1.3, 1.2, 1.25], ["base", "single", "single", "sobol"], n=60, noise=0.05)
    assert found.standings[found.chosen].candidate.origin == "base"
    assert found.adapters == 2
    assert found.minimum == 0


def test_one_group_chooses_the_simplest_and_claims_nothing():
    found = chosen([1.0, 0.9, 0.1], ["base", "single", "sobol"], n=1, copies=9)
    assert (found.chosen, found.minimum, found.adapters) == (0, 2, 1)
    assert found.worth == ()
    assert (found.folds, found.repeats) == (0, 0)
    told = json.loads(json.dumps([found.as_dict(), *(s.as_dict() for s in found.standings)], allow_nan=False))
    assert told[1]["low"] is None


def test_fewer_groups_than_folds():
    assert chosen([0.9, 0.8], ["single", "sobol"], n=3).folds == 3


def test_candidates_that_are_not_finite_are_left_out():
    reference = {"d": of([5.0, 6.0, 7.0])}
    candidates = [Candidate({"x": float(c)}, "sobol") for c in range(3)]
    scores = [{"d": of([math.inf, 1.0, 1.0])}, {"d": of([4.0, 5.0, 6.0])}, {"d": of([4.0, math.nan, 6.0])}]
    found = select(candidates, scores, reference, Goal(), {})
    assert [s.candidate for s in found.standings] == [candidates[1]]
    with pytest.raises(ValueError, match="no candidate has finite scores"):
        select(candidates[:1], scores[:1], reference, Goal(), {})
    with pytest.raises(ValueError, match="got 0 and 0"):
        select([], [], reference, Goal(), {})


def test_everything_is_the_same_for_the_same_seed_and_is_plain_json():
    first, second = (chosen(LEVELS, NAMES, goal=Goal("worst", tolerance=0.3)) for _ in range(2))
    assert first == second
    told = [first.as_dict(), *(standing.as_dict() for standing in first.standings)]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told[1]["score"] == told[1]["estimate"] == 1.0
    assert sum(standing.picked for standing in first.standings) == pytest.approx(1.0)
    assert set(told[1]["ratios"]) == {"a", "b"}


def test_preference_domains_count_by_their_own_loss():
    def pairs(margins: Any) -> Scores:
        n = len(margins)
        sums = tuple((float(m) - 9, -9.0) for m in margins)
        return Scores("dpo", sums, ((3, 3),) * n, (0,) * n, tuple(map(str, range(n))))

    base, ours = {"p": pairs([0.0, 1.0, 2.0])}, {"p": pairs([1.0, 3.0, 2.0])}
    found = select([Candidate({}, "base"), Candidate({"x": 1.0}, "single")], [base, ours], base, Goal(), {"p": 0.4})
    assert found.standings[0].value.estimate == 1.0
    assert found.standings[1].value.estimate == pytest.approx(loss_ratios(ours, base, {"p": 0.4})["p"])


def test_which_origins_have_seen_the_scores():
    assert all(blind(origin) for origin in ("base", "single", "heuristic last", "grid", "sobol"))
    assert not any(blind(origin) for origin in ("gradient", "cma-es", "surrogate", "bayes", "layer groups"))
