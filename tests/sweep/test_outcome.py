"""What one training came to, and its way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lorchestra.sweep.outcome import HeldOut, Outcome, finite_history


def test_through_json_and_back(outcome):
    for found in (outcome(), outcome(None, state="diverged", test=None, history=())):
        assert Outcome.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    test = outcome().test
    assert HeldOut.from_dict(json.loads(json.dumps(outcome().as_dict()))["test"]) == test
    assert test.score == pytest.approx(2 / 3)


def test_losses(outcome):
    rising = outcome(validation=((0, 3.0), (4, 1.5), (8, 1.0), (12, 1.4)))
    assert rising.validation_loss == 1.0, "of the factors that were kept"
    assert rising.final_validation_loss == 1.4
    assert rising.final_training_loss == pytest.approx((1.2 + 1.1 + 1.0 + 0.9) / 4), "of the last epoch"
    assert rising.gap == pytest.approx(1.4 - 1.05)
    assert rising.onset == 2.0, "epochs"
    assert outcome(1.0).onset is None
    assert rising.gradient_norm == pytest.approx(1.55)


def test_a_stopped_training_is_known_by_its_last_loss(outcome):
    stopped = outcome(state="stopped", step=8, validation=((4, 1.0), (8, 1.2)))
    assert stopped.validation_loss == 1.2


def test_worse_than_untrained(outcome):
    assert outcome(state="diverged").worse_than_untrained
    assert replace(outcome(), validation=((0, 3.0), (12, 3.1))).worse_than_untrained
    assert not outcome(1.0).worse_than_untrained
    assert not outcome(None).worse_than_untrained


def test_nothing_known_is_none(outcome):
    bare = outcome(None, history=(), test=None)
    assert (bare.validation_loss, bare.gap, bare.onset, bare.gradient_norm) == (None, None, None, None)


def test_history_leaves_out_what_was_not_measured():
    rows = [{"loss": 1.0, "gradient_norm": 2.0}, {"loss": 1.0}, {"loss": 1.0, "gradient_norm": None}]
    assert finite_history(rows) == ((1.0, 2.0),)
