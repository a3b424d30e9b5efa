"""Outcomes → rows."""

from __future__ import annotations

import json
from statistics import stdev

import numpy as np
import pytest
from tests.sweep.conftest import make_test

from lorchestra.stats.crossed import crossed_ratio
from lorchestra.sweep.table import rows, scores

KEYS = ["lora.rank"]


def test_a_row_over_seeds(outcome):
    found = [
        outcome(loss, seed=seed, test=make_test((1.0, 0.0, seed % 2))) for seed, loss in enumerate((1.0, 1.2, 1.1))
    ]
    (row,) = rows(found, KEYS)
    assert (row.runs, row.done, row.diverged, row.stopped, row.worse) == (3, 3, 0, 0, 0)
    assert row.validation == pytest.approx(1.1)
    assert row.validation_spread == pytest.approx(stdev([1.0, 1.2, 1.1]))
    assert row.gradient_spread == 0
    assert row.losses == {0: 1.0, 1: 1.2, 2: 1.1}
    assert row.test == crossed_ratio([[1, 0, 0], [1, 0, 1], [1, 0, 0]], groups=["g0", "g1", "g2"])
    assert row.gap == pytest.approx(sum(one.gap for one in found) / 3)


def test_rows_are_by_the_keys_and_in_order(outcome):
    found = [outcome(settings={"lora.rank": rank, "train.learning_rate": 1 / rank}) for rank in (8, 2, 8)]
    assert [(row.settings, row.runs) for row in rows(found, KEYS)] == [({"lora.rank": 8}, 2), ({"lora.rank": 2}, 1)]


def test_what_ended_early_is_counted_and_left_out_of_means(outcome):
    diverged = outcome(None, seed=1, state="diverged", history=(), test=None)
    stopped = outcome(seed=2, state="stopped", test=None, validation=((8, 9.0),))
    (row,) = rows([outcome(1.0), diverged, stopped], KEYS)
    assert (row.runs, row.done, row.diverged, row.stopped, row.worse) == (3, 1, 1, 1, 1)
    assert (row.validation, row.validation_spread) == (1.0, None)
    (none,) = rows([diverged, stopped], KEYS)
    assert (none.validation, none.gradient, none.test, none.metric, none.seconds) == (None, None, None, "", 0.0)
    assert none.trainable == 800


def test_folds_of_a_seed_are_one_test(outcome):
    found = [
        outcome(1.0 + fold, seed=seed, fold=fold, test=make_test((float(fold), float(seed))))
        for seed in (0, 1)
        for fold in (0, 1)
    ]
    (row,) = rows(found, KEYS, 2)
    assert row.losses == {0: 1.5, 1: 1.5}
    table = scores(found, 2)
    assert table.values.tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert len(table.groups) == 4
    assert scores(found[:3], 2).seeds == (0,), "a seed that lacks a fold is left out"
    assert scores(found[:1], 2) is None


def test_settings_are_compared_in_pairs(outcome):
    one = scores([outcome(seed=0, test=make_test((1.0, 1.0))), outcome(seed=1, test=make_test((1.0, 0.0)))])
    other = scores([outcome(seed=1, test=make_test((0.0, 0.0))), outcome(seed=2, test=make_test((1.0, 1.0)))])
    assert one.minus(other).estimate == pytest.approx(0.5), "seed 1, which both have"
    assert other.minus(one).estimate == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="same test items"):
        one.minus(scores([outcome(seed=1, test=make_test((0.0,)))]))


def test_a_row_as_json(outcome):
    (row,) = rows([outcome(test=make_test((1.0,)))], KEYS)
    told = json.loads(json.dumps(row.as_dict(), allow_nan=False))
    assert told["test"] == {"estimate": 1.0, "low": None, "high": None, "n": 1}
    assert told["losses"] == {"0": 1.0}
    assert np.isfinite(told["gap"])
