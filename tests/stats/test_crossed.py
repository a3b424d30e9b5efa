"""Means over crossed runs and items: against brute force, and against a truth that is known."""

from __future__ import annotations

import numpy as np
import pytest

from lorchestra.stats.crossed import ITEMS, RUNS, crossed_ratio
from lorchestra.stats.intervals import interval_of, ratio_interval, resample


def drawn(numerators, denominators, groups):
    """The resampled ratios, by loops: item by item, run by run."""
    names = list(dict.fromkeys(groups))
    items, runs = resample(len(names), seed=ITEMS), resample(len(numerators), seed=RUNS)
    out = []
    for b in range(60):
        top = bottom = 0.0
        for s in range(len(numerators)):
            for i, group in enumerate(groups):
                times = runs[b, s] * items[b, names.index(group)]
                top += times * numerators[s][i]
                bottom += times * denominators[s][i]
        out.append(top / bottom)
    return out


def test_every_resample_is_what_loops_give(monkeypatch):
    chance = np.random.default_rng(0)
    top, bottom = chance.normal(size=(3, 14)), chance.uniform(1, 9, size=(3, 14))
    groups = [f"patient {k // 2}" for k in range(14)]
    seen = []
    monkeypatch.setattr(
        "lorchestra.stats.crossed.interval_of", lambda draws, n: seen.append(draws) or interval_of(draws, n)
    )
    found = crossed_ratio(top, bottom, groups)
    assert seen[0][:60] == pytest.approx(drawn(top, bottom, groups), rel=1e-12)
    assert found.estimate == pytest.approx(top.sum() / bottom.sum())
    assert found.n == 7


def test_one_run_is_the_interval_of_its_items():
    chance = np.random.default_rng(1)
    top, bottom = chance.normal(size=40), chance.uniform(1, 9, size=40)
    groups = [k // 2 for k in range(40)]
    alone, crossed = ratio_interval(top, bottom, groups, seed=ITEMS), crossed_ratio(top[None], bottom[None], groups)
    assert (crossed.low, crossed.high) == pytest.approx((alone.low, alone.high))


def test_runs_that_are_equal_add_nothing_but_certainty_about_themselves():
    items = np.random.default_rng(2).normal(size=60)
    one, three = crossed_ratio(items[None]), crossed_ratio(np.stack([items] * 3))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_differences_are_paired_by_run_and_item():
    """Two settings that differ by 0.1 everywhere: what seeds and items have in common falls out."""
    chance = np.random.default_rng(3)
    ours = chance.normal(size=(3, 1)) + chance.normal(size=(1, 50))
    paired = crossed_ratio((ours + 0.1) - ours)
    assert (paired.low, paired.estimate, paired.high) == pytest.approx((0.1, 0.1, 0.1))
    apart = crossed_ratio(ours)
    assert apart.high - apart.low > 0.5


@pytest.mark.parametrize(
    ("runs", "items", "of_run", "of_item", "of_both", "least"),
    [
        pytest.param(3, 200, 0.02, 0.3, 0.4, 0.94, id="accuracies with three seeds"),
        pytest.param(3, 200, 0.05, 0.3, 0.4, 0.93, id="restless seeds"),
        pytest.param(5, 100, 0.0, 0.0, 0.5, 0.94, id="seeds do not matter"),
        pytest.param(3, 200, 0.2, 0.3, 0.4, 0.88, id="seeds decide"),
        pytest.param(2, 100, 0.2, 0.3, 0.4, 0.88, id="two seeds decide"),
        pytest.param(1, 100, 0.0, 0.4, 0.3, 0.91, id="one seed, which does not matter"),
    ],
)
def test_the_interval_covers_the_truth(runs, items, of_run, of_item, of_both, least):
    """A share of ``least`` of 300 experiments, whose mean is 0 over seeds and items that were not drawn."""
    chance = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        found = crossed_ratio(
            chance.normal(0, of_run, (runs, 1))
            + chance.normal(0, of_item, (1, items))
            + chance.normal(0, of_both, (runs, items))
        )
        hits += found.low <= 0 <= found.high
    assert hits / 300 >= least


def test_a_wide_spread_between_few_seeds_is_a_wide_interval():
    """Resamples of three seeds stay between the three; the interval does not."""
    table = np.array([[-1.0], [0.0], [1.0]]) + np.zeros((3, 100))
    found = crossed_ratio(table)
    # Student's with two degrees of freedom: 4.3 · 1/√3 = 2.5
    assert found.low < -2
    assert found.high > 2
    assert found.n == 100


@pytest.mark.parametrize(
    ("top", "bottom"),
    [
        (np.zeros((0, 3)), None),
        (np.zeros((2, 0)), None),
        (np.zeros(3), None),
        (np.zeros((2, 3)), np.ones((3, 2))),
        (np.array([[1.0, np.nan]]), None),
        (np.array([[1.0, 2.0]]), np.array([[1.0, np.inf]])),
    ],
)
def test_tables_that_are_none_are_refused(top, bottom):
    with pytest.raises(ValueError, match=r"table|finite"):
        crossed_ratio(top, bottom)
