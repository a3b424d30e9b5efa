"""Penalty and projection against float64 numpy, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.bank import TrainableMember
from lorchestra.errors import UserError
from lorchestra.train.orthogonality import leave_context, penalty, project_gradients, row_bases

sizes = st.tuples(st.integers(1, 5), st.integers(5, 12), st.integers(5, 12), st.integers(0, 2**31))


def factors(r, m, n, seed, scale=1.0):
    """B ``[m, r]``, A ``[r, n]``, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator) * scale, torch.randn(r, n, generator=generator) * scale


def member(*pairs):
    return TrainableMember({f"module{i}": pair for i, pair in enumerate(pairs)}, 1.0, 0.0)


def value(scalar):
    return float(scalar.detach())


def unit(rows):
    rows = rows.double().numpy()
    return rows / np.sqrt((rows**2).sum(1, keepdims=True) + 1e-6)


def mean_squared_cosine(rows):
    """Over all ordered pairs of different rows."""
    a = unit(rows)
    pairs = [(a[i] @ a[j]) ** 2 for i in range(len(a)) for j in range(len(a)) if i != j]
    return np.mean(pairs) if pairs else 0.0


@given(sizes)
@settings(max_examples=40, deadline=None)
def test_the_penalty_is_the_mean_squared_cosine(size):
    first, second = factors(*size), factors(*size[:3], size[3] + 1)
    expected = np.mean([(mean_squared_cosine(A) + mean_squared_cosine(B.T)) / 2 for B, A in (first, second)])
    assert value(penalty(member(first, second), {})) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(sizes, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_against_a_context(size, q):
    r, m, n, seed = size
    B, A = factors(r, m, n, seed)
    _, other = factors(q, m, n, seed + 1)
    Q = row_bases({"module0": [other]})["module0"]
    own = value(penalty(member((B, A)), {}))
    both = value(penalty(member((B, A)), {"module0": Q, "elsewhere": Q}))
    inside = unit(A) @ np.linalg.pinv(other.double().numpy()) @ other.double().numpy()
    assert both - own == pytest.approx((inside**2).sum() / r, rel=1e-3, abs=1e-5)


def test_its_bounds():
    eye, row = torch.eye(4, 8), torch.ones(4, 8)
    assert value(penalty(member((eye.T, eye)), {})) == pytest.approx(0.0, abs=1e-6)
    assert value(penalty(member((row.T, row)), {})) == pytest.approx(1.0, abs=1e-5)
    assert value(penalty(member((row.T, row)), row_bases({"module0": [row]}))) == pytest.approx(2.0, abs=1e-5)
    assert value(penalty(member((torch.ones(5, 1), torch.ones(1, 5))), {})) == 0.0, "one row has no other"


def test_size_and_scale_do_not_matter():
    B, A = factors(4, 9, 11, 0)
    for scale in (0.1, 10.0):
        assert value(penalty(member((B * scale, A * scale)), {})) == pytest.approx(
            value(penalty(member((B, A)), {})), rel=1e-3
        )


def test_b_at_zero_is_absent_and_has_a_finite_gradient():
    _, A = factors(4, 9, 11, 0)
    fresh = member((torch.zeros(9, 4), A))
    found = penalty(fresh, {})
    assert value(found) == pytest.approx(mean_squared_cosine(A) / 2, rel=1e-4)
    found.backward()
    assert all(torch.isfinite(p.grad).all() for p in fresh.parameters())


def test_descending_the_penalty_makes_rows_orthogonal():
    B, A = factors(4, 9, 11, 0)
    given = member((B, A))
    optimizer = torch.optim.SGD(given.parameters(), lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        penalty(given, {}).backward()
        optimizer.step()
    assert mean_squared_cosine(given.A[0].detach()) < 1e-4
    assert mean_squared_cosine(given.B[0].detach().T) < 1e-4


def with_gradients(given, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in given.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return given


def tangent(G, rows):
    """G − S·Â with S = ½(GÂᵀ + ÂGᵀ), its diagonal left out."""
    a, g = unit(rows), G.double().numpy()
    S = (g @ a.T + a @ g.T) / 2
    np.fill_diagonal(S, 0)
    return g - S @ a


@given(sizes)
@settings(max_examples=40, deadline=None)
def test_projection_by_its_formula(size):
    given = with_gradients(member(factors(*size)), size[3])
    A, B, GA, GB = given.A[0].detach(), given.B[0].detach(), given.A[0].grad.clone(), given.B[0].grad.clone()
    project_gradients(given, {})
    np.testing.assert_allclose(given.A[0].grad.numpy(), tangent(GA, A), atol=1e-4)
    np.testing.assert_allclose(given.B[0].grad.numpy().T, tangent(GB.T, B.T), atol=1e-4)


def test_a_projected_step_keeps_an_orthonormal_frame_to_first_order():
    Q = torch.linalg.qr(factors(4, 4, 11, 0)[1].T)[0].T
    given = with_gradients(member((torch.eye(9, 4), Q.clone())), 1)
    unprojected = given.A[0].grad.clone()
    project_gradients(given, {})
    step = 1e-3

    def coherence(G):
        return np.sqrt(mean_squared_cosine(Q - step * G))

    assert coherence(unprojected) > 1e-4
    assert coherence(given.A[0].grad) < 20 * step**2
    lengths = (given.A[0].grad * Q).sum(1)
    torch.testing.assert_close(lengths, (unprojected * Q).sum(1), msg="lengths are left free")


def test_a_projected_step_stays_out_of_the_context():
    B, A = factors(3, 9, 11, 0)
    bases = row_bases({"module0": [factors(2, 9, 11, 1)[1], factors(2, 9, 11, 2)[1]]})
    given = with_gradients(member((B, A)), 3)
    GB = given.B[0].grad.clone()
    assert (given.A[0].grad @ bases["module0"].T).abs().max() > 0.1
    project_gradients(given, bases)
    torch.testing.assert_close(given.A[0].grad @ bases["module0"].T, torch.zeros(3, 4), atol=1e-5, rtol=0)
    assert not torch.equal(given.B[0].grad, GB), "B is projected against itself alone"


def test_no_gradient_no_projection():
    given = member(factors(3, 9, 11, 0))
    project_gradients(given, {})
    assert all(p.grad is None for p in given.parameters())


class TestRowBases:
    def test_they_span_the_rows_and_are_orthonormal(self):
        first, second = factors(2, 4, 11, 0)[1], factors(3, 4, 11, 1)[1]
        Q = row_bases({"x": [first, second]})["x"]
        torch.testing.assert_close(Q @ Q.T, torch.eye(5), atol=1e-6, rtol=0)
        for rows in (first, second):
            torch.testing.assert_close(rows @ Q.T @ Q, rows, atol=1e-5, rtol=1e-5)

    def test_what_is_said_twice_counts_once(self):
        rows = factors(2, 4, 11, 0)[1]
        assert row_bases({"x": [rows, rows * 3, rows.flip(0)]})["x"].shape == (2, 11)

    def test_a_zero_context_spans_nothing(self):
        assert row_bases({"x": [torch.zeros(2, 11)]})["x"].shape == (0, 11)
        B, A = factors(3, 9, 11, 0)
        bases = row_bases({"module0": [torch.zeros(2, 11)]})
        assert value(penalty(member((B, A)), bases)) == value(penalty(member((B, A)), {}))


@given(sizes)
def test_what_is_left_of_a_stands_apart_from_the_context(size):
    r, m, n, seed = size
    context = row_bases({"module0": [factors(2, m, n, seed + 1)[1], factors(1, m, n, seed + 2)[1]]})
    B, A = factors(r, m, n, seed)
    new = member((B, A))
    leave_context(new, context)
    Q = context["module0"].double().numpy()
    expected = A.double().numpy() @ (np.eye(n) - Q.T @ Q)
    np.testing.assert_allclose(new.A[0].detach().double().numpy(), expected, atol=1e-5)


def test_a_context_that_spans_everything_leaves_nothing_to_learn():
    """A would be zero, and with B zero too both gradients are: the stage would train nothing without a word."""
    new = member(factors(2, 6, 8, 0))
    with pytest.raises(UserError, match=r"at module0 the context's adapters span all 8 inputs.*lower rank"):
        leave_context(new, row_bases({"module0": [factors(5, 6, 8, 1)[1], factors(3, 6, 8, 2)[1]]}))
