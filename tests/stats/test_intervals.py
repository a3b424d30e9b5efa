"""Intervals: coverage by simulation, agreement with closed forms, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorchestra.stats.intervals import (
    mean_interval,
    paired_difference,
    proportion_interval,
    ratio_interval,
    student,
    wilson,
)


@pytest.mark.parametrize("n", [2, 3, 6, 12, 60])
def test_coverage_of_the_mean(n):
    """Nominal 95 %; 300 simulations have a standard error of 1.3 points."""
    rng = np.random.default_rng(0)
    hits = sum(not mean_interval(rng.normal(3.0, 2.0, n), seed=i).excludes(3.0) for i in range(300))
    assert 0.90 <= hits / 300 <= 0.99


@pytest.mark.slow
def test_coverage_with_groups():
    """Ten correlated items a group: ignoring the groups would cover far less than 95 %."""
    rng = np.random.default_rng(1)
    grouped = plain = 0
    for i in range(200):
        effects = np.repeat(rng.normal(0, 1, 25), 10)
        values = effects + rng.normal(0, 0.3, 250)
        grouped += not mean_interval(values, np.repeat(np.arange(25), 10).tolist(), seed=i).excludes(0.0)
        plain += not mean_interval(values, seed=i).excludes(0.0)
    assert grouped / 200 >= 0.90
    assert plain / 200 < 0.70


def test_close_to_students_interval():
    values = np.random.default_rng(2).normal(5, 1, 40)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.08)
    assert found.high == pytest.approx(high, abs=0.08)


def test_ratio_is_a_mean_over_tokens():
    assert ratio_interval([2.0, 9.0], [1.0, 3.0]).estimate == pytest.approx(11 / 4)


@given(st.integers(1, 200), st.data())
def test_wilson_equals_scipy(n, data):
    k = data.draw(st.integers(0, n))
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    found = wilson(k, n)
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.floats(-5, 5))
def test_pairing_removes_what_is_common(values, shift):
    found = paired_difference(np.array(values) + shift, values)
    assert found.estimate == pytest.approx(shift, abs=1e-9)
    assert found.high - found.low < 1e-9
    assert found.low <= found.estimate <= found.high


def test_order_and_naming_of_groups_do_not_matter():
    values, groups = [1.0, 2.0, 3.0, 10.0], ["a", "a", "b", "c"]
    assert mean_interval(values, groups) == mean_interval(values, [7, 7, 8, 9])


def test_one_group_tells_nothing():
    found = mean_interval([1.0, 2.0], ["same", "same"])
    assert (found.low, found.high, found.n) == (-math.inf, math.inf, 1)


def test_a_perfect_proportion_has_a_width():
    found = proportion_interval([1.0] * 10)
    assert found.estimate == 1.0
    assert found.low < 0.75


@pytest.mark.parametrize("n", [12, 60])
def test_the_detectable_difference_is_found_four_times_in_five(n):
    """A true difference of (t + t₀.₈)·SE: 400 tests of it have a standard error of two points."""
    rng = np.random.default_rng(3)
    error = 1 / math.sqrt(n)
    true = float(stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * error
    found = [mean_interval(rng.normal(true, 1, n), seed=i) for i in range(400)]
    assert sum(interval.excludes(0.0) for interval in found) / 400 == pytest.approx(0.8, abs=0.08)
    assert np.median([interval.detectable for interval in found]) == pytest.approx(true, rel=0.1)


def test_nothing_is_detectable_with_one_group_and_a_proportion_does_not_say():
    assert mean_interval([1.0, 2.0], ["g", "g"]).detectable == math.inf
    assert wilson(3, 5).detectable is None


@given(st.lists(st.floats(-50, 50), min_size=10, max_size=40))
def test_the_standard_error_is_that_of_a_mean(values):
    assert mean_interval(values).error == pytest.approx(stats.sem(values), rel=0.15, abs=1e-9)


def test_students_interval_is_scipys():
    found = student(2.0, 0.5, 8)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 7, 2.0, 0.5))
    assert student(2.0, 0.5, 1).excludes(1e9) is False


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bad_values(values):
    with pytest.raises(ValueError, match="interval needs"):
        mean_interval(values)


def test_bad_lengths_and_counts():
    with pytest.raises(ValueError, match="differ in length"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="proportion needs"):
        wilson(3, 2)
