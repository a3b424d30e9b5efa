"""Ratios of sums and their standard errors, against resampling and against the spread over random folds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorchestra.stats.folds import group_folds
from lorchestra.stats.ratios import RatioTable, standard_error


def made(groups=60, candidates=3, seed=0):
    """Candidates on the same items of two domains: item difficulty is common to all, and large."""
    rng = np.random.default_rng(seed)
    present = np.ones((2, groups), dtype=bool)
    present[1, ::2] = False
    bottoms = rng.uniform(2, 20, (2, groups)) * present
    tops = (0.9 + rng.normal(0, 0.05, (2, candidates, groups))) * bottoms[:, None]
    return RatioTable(tops, bottoms, present)


def test_ratios_by_hand():
    table = made()
    for d in range(2):
        for c in range(3):
            assert table.ratios()[d, c] == pytest.approx(table.tops[d, c].sum() / table.bottoms[d].sum())
    assert table.groups == 30
    kept = np.arange(60) < 20
    assert table.over(kept).ratios()[0, 1] == pytest.approx(table.tops[0, 1, :20].sum() / table.bottoms[0, :20].sum())


def test_influences_sum_to_zero_and_follow_a_group_that_weighs_more():
    """To first order: the derivative of the ratio by the weight of a group."""
    table, h = made(), 1e-6
    found = table.influence()
    assert np.abs(found.sum(axis=2)).max() < 1e-12
    weight = np.ones(60)
    weight[7] += h
    moved = RatioTable(table.tops * weight, table.bottoms * weight, table.present)
    np.testing.assert_allclose((moved.ratios() - table.ratios()) / h, found[:, :, 7], atol=1e-6)


def test_the_standard_error_is_the_bootstraps():
    table = made()
    error = standard_error(table.influence(), 60)[0, 0]
    drawn = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=4000)
    ratios = (drawn @ table.tops[0, 0]) / (drawn @ table.bottoms[0])
    assert error == pytest.approx(ratios.std(), rel=0.08)


def test_the_standard_error_is_what_random_folds_come_to():
    """sd over 5 folds / √5, root mean square over 400 dealings: the textbook's figure without its chance."""
    rng = np.random.default_rng(2)
    bottoms = np.full((1, 60), 10.0)  # folds of equal weight
    tops = rng.uniform(5, 15, (1, 2, 60))
    table = RatioTable(tops, bottoms, np.ones((1, 60), dtype=bool))
    difference = (table.influence()[0, 0] - table.influence()[0, 1])[None]
    squares = []
    for fold in group_folds(table.present, 5, repeats=400):
        scores = np.array([table.over(fold == k).ratios()[0] for k in range(5)])
        squares.append((scores[:, 0] - scores[:, 1]).var(ddof=1) / 5)
    assert standard_error(difference, 60)[0] == pytest.approx(math.sqrt(np.mean(squares)), rel=0.05)


def test_a_domain_without_items_prefers_nobody():
    table = made().over(np.arange(60) == 0)  # the second domain has no group here
    assert (table.ratios()[1] == 1).all()
    assert (table.influence()[1] == 0).all()


def test_one_group_has_no_standard_error():
    assert np.isinf(standard_error(made().influence(), 1)).all()
