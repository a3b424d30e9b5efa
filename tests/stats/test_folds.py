"""Folds: no group parted, every domain in every fold, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.stats.folds import group_folds


def memberships(draw) -> np.ndarray:
    """[domains, groups], every group in some domain, every domain with two groups at least."""
    domains, groups = draw(st.integers(1, 4)), draw(st.integers(4, 40))
    present = np.array(draw(st.lists(st.lists(st.booleans(), min_size=groups, max_size=groups),
                                     min_size=domains, max_size=domains)))  # fmt: skip
    present[:, :2] = True
    present[0] |= ~present.any(axis=0)
    return present


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_group_is_parted_and_no_domain_lies_in_one_fold(data):
    present = memberships(data.draw)
    folds = data.draw(st.integers(2, min(6, present.sum(axis=1).min())))
    dealt = group_folds(present, folds, repeats=3, seed=data.draw(st.integers(0, 99)))
    assert dealt.shape == (3, present.shape[1])
    assert set(np.unique(dealt)) == set(range(folds))
    for row in dealt:
        held = np.array([(present & (row == k)).sum(axis=1) for k in range(folds)])  # [folds, domains]
        assert (held.sum(axis=0) == present.sum(axis=1)).all()
        assert (held < present.sum(axis=1)).all(), "a domain that lies in one fold whole leaves nothing to choose on"


@given(st.integers(2, 10), st.integers(10, 50))
def test_folds_of_one_domain_are_even(folds, groups):
    (row,) = group_folds(np.ones((1, groups), dtype=bool), folds)
    sizes = np.bincount(row, minlength=folds)
    assert sizes.max() - sizes.min() <= 1


def test_repeats_differ_and_seeds_repeat():
    present = np.ones((1, 30), dtype=bool)
    first, second = group_folds(present, 5, repeats=2, seed=1)
    assert (first != second).any()
    assert (group_folds(present, 5, repeats=2, seed=1) == [first, second]).all()
    assert (group_folds(present, 5, repeats=2, seed=2) != [first, second]).any()


def test_chance_deals_any_two_groups_together_equally_often():
    """Of 12 groups in 3 folds, two are together with probability 3/11."""
    dealt = group_folds(np.ones((1, 12), dtype=bool), 3, repeats=600)
    together = (dealt[:, :, None] == dealt[:, None, :]).mean(axis=0)[~np.eye(12, dtype=bool)]
    assert together.mean() == pytest.approx(3 / 11)
    assert abs(together - 3 / 11).max() < 0.08


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_folds_that_cannot_be(folds):
    present = np.array([[True] * 3 + [False] * 5, [False] * 3 + [True] * 5])
    with pytest.raises(ValueError, match="smallest domain has 3 groups"):
        group_folds(present, folds)


def test_a_group_of_no_domain():
    with pytest.raises(ValueError, match="must be in a domain"):
        group_folds(np.array([[True, True, False]]), 2)
