"""Guards: what breaks them and what does not, and how the chance of a false alarm is shared out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorchestra.errors import UserError
from lorchestra.registry.canary.guards import GUARDS, Counts, Guards
from lorchestra.stats.sequential import Sample, rate_interval

ONE = Guards(max_latency_increase=None, max_score_drop=None, max_error_rate=None)


def states(guards, candidate, stable, steps=1):
    return {reading.guard: reading.state for reading in guards.readings(candidate, stable, steps)}


def latencies(seconds):
    logs = np.log(seconds)
    return {"latency_n": len(logs), "latency_sum": float(logs.sum()), "latency_sq": float((logs**2).sum())}


def test_each_guard_sees_what_it_is_for_and_nothing_else():
    chance = np.random.default_rng(0)
    good = Counts(1000, 10, **latencies(chance.lognormal(0, 0.5, 990)), score_n=300, score_sum=240.0)
    assert set(states(Guards(), good, good).values()) <= {"holds", "unsure"}
    failing = replace(good, errors=100)
    assert states(Guards(), failing, good)["errors"] == "broken"
    slow = replace(good, **latencies(2 * chance.lognormal(0, 0.5, 990)))
    disliked = replace(good, score_sum=150.0)
    for worse, name in ((failing, "errors"), (slow, "latency"), (disliked, "score")):
        found = states(Guards(), worse, good)
        assert [guard for guard, state in found.items() if state == "broken"] == [name]
        assert "broken" not in states(Guards(), good, worse).values(), "better is not worse"


def test_twenty_failures_of_the_first_twenty_are_an_alarm_at_once():
    found = states(Guards(), Counts(20, 20), Counts(1980, 20), steps=5)
    assert found["errors"] == found["limit"] == "broken"
    assert states(Guards(), Counts(20, 20), Counts())["limit"] == "broken", "without a stable arm too"
    assert "broken" not in states(Guards(), Counts(2, 2), Counts(198, 2), steps=5).values()


def test_what_is_allowed_is_allowed():
    """The same figures break a strict guard and not a lenient one."""
    candidate, stable = Counts(4000, 160), Counts(4000, 40)
    assert states(replace(ONE, max_error_increase=0.0), candidate, stable) == {"errors": "broken"}
    assert states(replace(ONE, max_error_increase=0.2), candidate, stable) == {"errors": "holds"}


def test_a_latency_is_judged_as_a_ratio():
    """A quarter longer is a quarter longer of milliseconds and of minutes."""
    chance = np.random.default_rng(1)
    base = chance.lognormal(0, 0.4, 2000)
    guards = Guards(max_error_increase=None, max_score_drop=None, max_error_rate=None, max_latency_increase=0.1)
    found = [
        guards.readings(Counts(2000, 0, **latencies(1.25 * unit * base)), Counts(2000, 0, **latencies(unit * base)), 1)
        for unit in (0.001, 1.0, 60.0)
    ]
    for (reading,) in found:
        assert reading.worse == pytest.approx(0.25)
        assert (reading.low, reading.high) == pytest.approx((found[1][0].low, found[1][0].high), rel=1e-3)
        assert reading.state == "broken"


def test_alpha_is_shared_by_guards_and_steps():
    """Four guards and five steps: each interval has the level 1 − α/20."""
    readings = Guards(alpha=0.1).readings(Counts(50, 5), Counts(50, 5), 5)
    assert {reading.guard for reading in readings} == set(GUARDS)
    assert {reading.level for reading in readings} == {1 - 0.1 / 20}
    limit = next(reading for reading in readings if reading.guard == "limit")
    expected = rate_interval(Sample(50, 5), 0.1 / 20)
    assert (limit.low, limit.high) == (expected.low, expected.high)
    assert [reading.level for reading in ONE.readings(Counts(), Counts(), 2)] == [1 - 0.05 / 2]


def test_a_candidate_no_worse_than_allowed_is_rolled_back_no_more_often_than_alpha():
    """Errors, latency and scores all at the margin, looked at again and again."""
    chance, alpha, runs = np.random.default_rng(2), 0.5, 25
    guards = Guards(alpha=alpha, max_error_increase=0.0, max_latency_increase=0.0, max_score_drop=0.0)
    alarms = 0
    for _ in range(runs):
        failed = chance.random((2, 200)) < 0.2
        seconds, liked = chance.lognormal(0, 0.5, (2, 200)), chance.random((2, 200)) < 0.7
        for n in (30, 80, 200):
            arms = [
                Counts(
                    n,
                    int(failed[k, :n].sum()),
                    **latencies(seconds[k, :n]),
                    score_n=n,
                    score_sum=float(liked[k, :n].sum()),
                )
                for k in range(2)
            ]
            if "broken" in states(guards, *arms).values():
                alarms += 1
                break
    assert alarms <= stats.binom.ppf(1 - 1e-4, runs, alpha)


def test_nothing_seen_breaks_nothing_and_is_shown():
    readings = Guards().readings(Counts(), Counts(), 3)
    assert {reading.state for reading in readings} == {"unsure"}
    assert all(reading.worse is None for reading in readings)
    assert "latency longer by ? [-100.0 %, ∞], allowed 25.0 %" in [str(reading) for reading in readings]


def test_a_reading_says_what_was_measured_and_what_was_allowed():
    (reading,) = replace(ONE, max_error_increase=0.02).readings(Counts(500, 60), Counts(5000, 50), 1)
    said = str(reading)
    assert said.startswith("error rate higher by 11.00 points [")
    assert said.endswith("allowed 2.00 points")
    assert reading.low is not None
    assert f"{100 * reading.low:.2f} points" in said


counts = st.integers(0, 1000).flatmap(
    lambda n: st.builds(
        lambda errors, logs: Counts(n, errors, len(logs), sum(logs), sum(x * x for x in logs)),
        st.integers(0, n),
        st.lists(st.floats(-10, 10), max_size=5),
    )
)


@given(counts, counts)
def test_what_came_after_is_the_rest(one, more):
    after = (one + more).since(one)
    assert (after.requests, after.errors, after.latency_n) == (more.requests, more.errors, more.latency_n)
    assert after.latency_sum == pytest.approx(more.latency_sum, abs=1e-9)
    assert after.latency_sq == pytest.approx(more.latency_sq, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(counts, counts)
def test_no_history_of_counts_makes_counts_that_cannot_be(one, other):
    """A gateway whose counter fell (it should not) must not stop the guards."""
    Guards().readings(one.since(other), other.since(one), 3)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alpha", 0),
        ("alpha", 1),
        ("alpha", math.nan),
        ("max_error_increase", -0.1),
        ("max_error_increase", 1.0),
        ("max_error_increase", math.nan),
        ("max_latency_increase", -1),
        ("max_latency_increase", math.inf),
        ("max_score_drop", 2),
        ("max_error_rate", 0.0),
        ("max_error_rate", 1.0),
        ("min_requests", -1),
    ],
)
def test_settings_that_make_no_sense(setting, value):
    with pytest.raises(UserError, match=setting):
        Guards(**{setting: value})
