"""Preference and supervised losses against their formulas written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.objective.logprobs import BranchScores
from lorchestra.objective.losses import preference_at_zero, preference_terms, sft_loss

NATS = st.floats(-20, 0)


def scores(sums, tokens):
    items = torch.arange(len(sums)) // 2
    return BranchScores(torch.tensor(sums), torch.tensor(tokens), items)


@given(
    st.lists(NATS, min_size=4, max_size=4),
    st.lists(NATS, min_size=4, max_size=4),
    st.floats(0.01, 1),
    st.floats(0, 0.4),
)
def test_sigmoid(policy, reference, beta, smoothing):
    terms = preference_terms(
        scores(policy, [1, 1, 1, 1]), torch.tensor(reference), loss="sigmoid", beta=beta, label_smoothing=smoothing
    )
    for p in range(2):
        h = beta * ((policy[2 * p] - reference[2 * p]) - (policy[2 * p + 1] - reference[2 * p + 1]))
        expected = (1 - smoothing) * math.log1p(math.exp(-h)) + smoothing * math.log1p(math.exp(h))
        assert float(terms.loss[p]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert float(terms.margin[p]) == pytest.approx(h, rel=1e-4, abs=1e-4)
        assert bool(terms.preferred[p]) == (torch.tensor(policy[2 * p]) > torch.tensor(policy[2 * p + 1]))


@given(st.lists(NATS, min_size=2, max_size=2), st.lists(NATS, min_size=2, max_size=2), st.floats(0.05, 1))
def test_ipo_averages_over_tokens(policy, reference, beta):
    terms = preference_terms(scores(policy, [2, 5]), torch.tensor(reference), loss="ipo", beta=beta)
    h = (policy[0] - reference[0]) / 2 - (policy[1] - reference[1]) / 5
    assert float(terms.loss[0]) == pytest.approx((h - 1 / (2 * beta)) ** 2, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", math.log(2)), ("ipo", 1 / (4 * 0.3**2))])
def test_policy_equal_to_reference(loss, expected):
    sums = [-3.0, -7.0]
    terms = preference_terms(scores(sums, [3, 2]), torch.tensor(sums), loss=loss, beta=0.3, label_smoothing=0.1)
    assert float(terms.loss[0]) == pytest.approx(expected, rel=1e-6)
    assert preference_at_zero(loss, 0.3) == pytest.approx(expected)


def test_sft_is_a_mean_over_the_tokens_of_the_step():
    first, second = scores([-4.0], [2]), scores([-9.0], [1])
    assert float(sft_loss(first, 3) + sft_loss(second, 3)) == pytest.approx(13 / 3)
