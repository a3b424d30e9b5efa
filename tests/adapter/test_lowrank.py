"""The algebra of ΔW = B·A against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.lowrank import LowRank, concat
from lorchestra.errors import AdapterError

laws = settings(max_examples=60, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
ranks = st.integers(1, 12)  # also above min(m, n)
seeds = st.integers(0, 2**31)
weights = st.floats(-4, 4)


def low_rank(shape, rank, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return LowRank(B.to(dtype), torch.randn(rank, n, generator=generator, dtype=torch.float64).to(dtype))


def size(update):
    """‖B‖·‖A‖: what rounding errors are relative to when ΔW itself cancels."""
    return float(update.B.norm() * update.A.norm())


def other_gauge(update, seed):
    """The same ΔW by other factors: (B M, M⁻¹ A) with a well-conditioned M."""
    generator = torch.Generator().manual_seed(seed)
    r = update.rank
    Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
    stretch = torch.linspace(0.5, 3.0, r, dtype=torch.float64)
    return LowRank(update.B @ (Q * stretch), (Q / stretch).T @ update.A)


@laws
@given(shapes, ranks, seeds)
def test_shape_rank_and_parameters(shape, rank, seed):
    update = low_rank(shape, rank, seed)
    assert update.shape == tuple(update.dense().shape) == shape
    assert update.rank == rank
    assert update.parameters == rank * sum(shape)


@laws
@given(shapes, ranks, ranks, seeds, seeds)
def test_sum_is_the_dense_sum(shape, r1, r2, s1, s2):
    a, b = low_rank(shape, r1, s1), low_rank(shape, r2, s2)
    total = a + b
    assert total.rank == r1 + r2
    torch.testing.assert_close(total.dense(), a.dense() + b.dense())


@laws
@given(shapes, ranks, seeds, weights)
def test_scalars(shape, rank, seed, weight):
    update = low_rank(shape, rank, seed)
    torch.testing.assert_close((update * weight).dense(), weight * update.dense())
    assert torch.equal((weight * update).dense(), (update * weight).dense())
    assert torch.equal((-update).dense(), -update.dense())


@laws
@given(shapes, st.lists(st.tuples(ranks, seeds, weights), min_size=1, max_size=4))
def test_concat_is_the_weighted_dense_sum(shape, terms):
    parts = [low_rank(shape, rank, seed) for rank, seed, _ in terms]
    found = concat(parts, [weight for *_, weight in terms])
    expected = sum(weight * part.dense() for part, (*_, weight) in zip(parts, terms, strict=True))
    torch.testing.assert_close(found.dense(), expected)
    assert found.rank == sum(rank for rank, *_ in terms)


@laws
@given(shapes, ranks, seeds)
def test_concat_of_one_at_weight_one_keeps_every_bit(shape, rank, seed):
    update = low_rank(shape, rank, seed, torch.float32)
    found = concat([update], [1.0])
    assert torch.equal(found.B, update.B)
    assert torch.equal(found.A, update.A)


@laws
@given(shapes, ranks, ranks, seeds, seeds)
def test_inner_product_and_norm(shape, r1, r2, s1, s2):
    a, b = low_rank(shape, r1, s1), low_rank(shape, r2, s2)
    scale = float(a.dense().norm() * b.dense().norm())
    assert a.inner(b) == pytest.approx(float((a.dense() * b.dense()).sum()), abs=1e-10 * (1 + scale))
    assert a.inner(b) == pytest.approx(b.inner(a), abs=1e-10 * (1 + scale))
    assert a.norm() == pytest.approx(float(a.dense().norm()), rel=1e-7, abs=1e-7 * size(a))


def test_norm_of_float32_factors_does_not_suffer_from_cancellation():
    """The rounding error of a trace in float32 would be larger than this ΔW."""
    B = torch.tensor([[1.0, -1.0]])
    A = torch.tensor([[1.0], [1.0 + 2**-20]])
    assert LowRank(B, A).norm() == pytest.approx(2**-20, rel=1e-6)


@laws
@given(shapes, ranks, seeds)
def test_singular_values(shape, rank, seed):
    update = low_rank(shape, rank, seed)
    found = update.singular_values()
    expected = torch.linalg.svdvals(update.dense())
    k = min(rank, *shape)
    assert found.shape == (k,)
    torch.testing.assert_close(found, expected[:k], rtol=1e-9, atol=1e-12 * size(update))
    assert float(expected[k:].abs().sum()) <= 1e-12 * size(update)


@laws
@given(shapes, ranks, seeds, seeds, seeds)
def test_gauge_invariance(shape, rank, seed, gauge, other):
    """Whatever is a property of the adapter is the same for (B M, M⁻¹ A)."""
    update, b = low_rank(shape, rank, seed), low_rank(shape, rank, other)
    changed = other_gauge(update, gauge)
    torch.testing.assert_close(changed.dense(), update.dense(), rtol=1e-9, atol=1e-9)
    assert changed.norm() == pytest.approx(update.norm(), rel=1e-7, abs=1e-7 * size(update))
    assert changed.inner(b) == pytest.approx(update.inner(b), abs=1e-9 * (1 + update.norm() * b.norm()))
    torch.testing.assert_close(changed.singular_values(), update.singular_values(), rtol=1e-7, atol=1e-8)


def test_values_are_frozen_and_algebra_returns_new_ones():
    update = low_rank((3, 4), 2, 0)
    B = update.B.clone()
    _ = (update * 3.0, update + update, -update)
    assert torch.equal(update.B, B)
    with pytest.raises(AttributeError):
        update.B = B


def test_cast_and_dense_dtype():
    update = low_rank((3, 4), 2, 0, torch.float32)
    assert update.dense().dtype == torch.float32
    assert update.dense(torch.float64).dtype == torch.float64
    half = update.to(torch.bfloat16)
    assert half.B.dtype == half.A.dtype == torch.bfloat16


class TestBadInput:
    @pytest.mark.parametrize(
        ("B", "A"), [((3, 2), (3, 4)), ((3,), (3, 4)), ((3, 2), (2,)), ((3, 2, 1), (2, 4)), ((), (1, 1))]
    )
    def test_factors_that_do_not_fit(self, B, A):
        with pytest.raises(AdapterError, match=r"B \[m, r\] and A \[r, n\]; got B"):
            LowRank(torch.ones(B), torch.ones(A))

    def test_shapes_that_differ(self):
        a, b = low_rank((3, 4), 2, 0), low_rank((4, 3), 2, 0)
        with pytest.raises(AdapterError, match=r"\(3, 4\).*\(4, 3\)"):
            a + b
        with pytest.raises(AdapterError, match="different shapes"):
            a.inner(b)

    def test_nothing_to_sum(self):
        with pytest.raises(AdapterError, match="at least one member"):
            concat([], [])
        with pytest.raises(AdapterError, match="got 1 and 2"):
            concat([low_rank((3, 4), 2, 0)], [1.0, 2.0])


def test_printed_it_is_one_line_without_numbers():
    assert repr(low_rank((5, 7), 2, 0, torch.bfloat16)) == "<LowRank 5×7, rank 2, bfloat16 on cpu>"
