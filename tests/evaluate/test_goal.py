"""The goal: one number from several domains, and what it must obey."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.evaluate.goal import Goal, undominated

RATIOS = st.fixed_dictionaries(dict.fromkeys("abc", st.floats(0.01, 10)))
GOALS = [Goal(), Goal("worst"), Goal("weighted", {"a": 2, "c": 1})]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.kind)
@given(ratios=RATIOS)
def test_the_base_is_one_and_shares_times_ratios_is_the_value(goal, ratios):
    assert goal.value(dict.fromkeys("abc", 1.0)) == pytest.approx(1.0)
    shares = goal.shares(ratios)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert sum(shares[name] * ratios[name] for name in ratios) == pytest.approx(goal.value(ratios))
    assert min(ratios.values()) - 1e-9 <= goal.value(ratios) <= max(ratios.values()) + 1e-9


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.kind)
@given(ratios=RATIOS, name=st.sampled_from("abc"))
def test_shares_are_the_gradient(goal, ratios, name):
    """Where the worst domain is not tied; against a central difference."""
    first, second = sorted(ratios.values())[-2:][::-1]
    if goal.kind == "worst" and first - second < 1e-3:
        return
    h = 1e-5
    up, down = ({**ratios, name: ratios[name] + d} for d in (h, -h))
    assert (goal.value(up) - goal.value(down)) / (2 * h) == pytest.approx(goal.shares(ratios)[name], abs=1e-6)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.kind)
def test_arrays_give_the_values_one_by_one(goal):
    rows = np.random.default_rng(0).uniform(0.5, 1.5, (7, 3))
    found = goal.combined({name: rows[:, k] for k, name in enumerate("abc")})
    assert found == pytest.approx([goal.value(dict(zip("abc", row, strict=True))) for row in rows])
    slopes = goal.slopes({name: rows[:, k] for k, name in enumerate("abc")})
    for k, row in enumerate(rows):
        assert {name: slopes[name][k] for name in "abc"} == goal.shares(dict(zip("abc", row, strict=True)))


def test_kinds_by_hand():
    ratios = {"a": 0.5, "b": 0.9, "c": 0.8}
    assert Goal().value(ratios) == pytest.approx(2.2 / 3)
    assert Goal("worst").value(ratios) == 0.9
    assert Goal("weighted", {"a": 2, "c": 1}).value(ratios) == pytest.approx(1.8 / 3)


def test_the_limit_is_measured_against_the_best_single_adapter_of_each_domain():
    goal = Goal(tolerance=0.02)
    singles = [{"a": 0.5, "b": 1.0}, {"a": 0.9, "b": 0.7}]
    assert goal.excess({"a": 0.52, "b": 0.72}, singles) == pytest.approx(0.0)
    assert goal.excess({"a": 0.53, "b": 0.80}, singles) == pytest.approx(0.08)
    assert goal.excess(singles[0], singles) == pytest.approx(0.28)  # a single adapter may cross it in another's domain
    assert Goal().excess({"a": 9.0, "b": 9.0}, singles) == 0.0


def test_undominated_candidates():
    rows = [{"a": 1, "b": 4}, {"a": 2, "b": 2}, {"a": 3, "b": 3}, {"a": 2, "b": 2}, {"a": 4, "b": 1}, {"a": 1, "b": 5}]
    assert undominated(rows) == [True, True, False, True, True, False]  # equals do not beat each other
    assert undominated([]) == []


@given(st.lists(RATIOS, min_size=1, max_size=12))
def test_undominated_against_the_definition(rows):
    def beats(x, y):
        return all(x[n] <= y[n] for n in x) and any(x[n] < y[n] for n in x)

    assert undominated(rows) == [not any(beats(other, row) for other in rows) for row in rows]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Goal("weighted"), "needs them"),
        (lambda: Goal("mean", {"a": 1}), "belong to a weighted goal"),
        (lambda: Goal("weighted", {"a": -1}), "0 or more"),
        (lambda: Goal("weighted", {"a": 0}), "at least must count"),
        (lambda: Goal(tolerance=-0.1), "tolerance"),
        (lambda: Goal().value({}), "at least one domain"),
        (lambda: Goal("weighted", {"a": 1}).value({"b": 1.0}), "none of the domains b"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_it_says_what_it_is():
    assert str(Goal()) == "the mean over domains of loss / base loss"
    assert "worst domain" in str(Goal("worst", tolerance=0.02))
    assert "0.02 above the best single adapter" in str(Goal("worst", tolerance=0.02))
    assert "clinic 2" in str(Goal("weighted", {"clinic": 2}))
