"""Core space is the SVD of the dense sum, without the dense sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, UserError
from lorchestra.fusion.core_space import CoreSpace
from lorchestra.fusion.methods import compress, fuse

laws = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = {"model.a": (7, 5), "model.b": (4, 9), "model.c": (6, 6)}
ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 8), min_size=1)
seeds = st.integers(0, 2**31)
weight = st.just(0.0) | st.floats(0.01, 3) | st.floats(-3, -0.01)


def make(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, rank in ranks.items():
        m, n = SHAPES[path]
        modules[path] = LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
    return Adapter(modules)


@st.composite
def sums(draw):
    members = draw(st.lists(st.builds(make, ranks, seeds), min_size=1, max_size=4))
    weights = draw(st.lists(weight, min_size=len(members), max_size=len(members)))
    return members, weights


def dense_sum(members, weights):
    total = {}
    for adapter, weight in zip(members, weights, strict=True):
        for path, update in adapter.modules.items():
            total[path] = total.get(path, 0) + weight * update.dense(torch.float64)
    return total


@laws
@given(sums(), st.integers(1, 9))
def test_as_good_as_an_svd_of_the_dense_sum(case, rank):
    """Eckart–Young: the error is that of the singular values left out, and what was kept is reported right."""
    members, weights = case
    found = CoreSpace(members, torch.float64).compress(weights, rank)
    kept = whole = 0.0
    for path, matrix in dense_sum(members, weights).items():
        update = found.modules[path]
        power = torch.linalg.svdvals(matrix).square()
        size = float(power.sum())
        assert update.rank <= rank
        assert update.B.dtype == torch.float32
        error = float((update.dense(torch.float64) - matrix).square().sum())
        assert error == pytest.approx(float(power[rank:].sum()), abs=1e-9 * size)
        kept, whole = kept + float(power[:rank].sum()), whole + size
        share = float(power[:rank].sum()) / size if size else 1.0
        assert found.per_module[path] == pytest.approx(share, abs=1e-9)
    assert found.retained == pytest.approx(kept / whole if whole else 1.0, abs=1e-9)


@laws
@given(sums(), st.floats(0.05, 1.0))
def test_the_lowest_rank_that_keeps_an_energy(case, energy):
    members, weights = case
    found = CoreSpace(members, torch.float64).compress(weights, energy=energy)
    for path, matrix in dense_sum(members, weights).items():
        power = torch.linalg.svdvals(matrix).square()
        if float(power.sum()) == 0:
            continue
        share = torch.cumsum(power, 0) / power.sum()
        r = found.modules[path].rank
        assert float(share[r - 1]) >= energy - 1e-9
        assert r == 1 or float(share[r - 2]) < energy + 1e-9


def test_both_bounds_at_once():
    adapter = make({"model.a": 5}, 0)
    assert compress(adapter, rank=1, energy=1.0)[0].modules["model.a"].rank == 1
    assert compress(adapter, rank=5, energy=1e-9)[0].modules["model.a"].rank == 1


@laws
@given(sums())
def test_a_high_enough_rank_changes_nothing(case):
    members, weights = case
    found = CoreSpace(members).compress(weights, rank=100)
    assert found.retained == pytest.approx(1.0, abs=1e-6)
    for path, matrix in dense_sum(members, weights).items():
        parts = [abs(w) * a.modules[path].norm() for a, w in zip(members, weights, strict=True) if path in a.modules]
        assert float((found.modules[path].dense(torch.float64) - matrix).norm()) <= 2e-6 * sum(parts)


@laws
@given(sums(), st.integers(1, 6))
def test_factored_once_for_every_weight(case, rank):
    """One core space for many λ gives what a fresh one gives for each."""
    members, weights = case
    space = CoreSpace(members)
    for scale in (1.0, -0.5, 2.0):
        scaled = [scale * weight for weight in weights]
        once, fresh = space.compress(scaled, rank), CoreSpace(members).compress(scaled, rank)
        assert once.retained == fresh.retained
        for path, update in once.modules.items():
            assert torch.equal(update.B, fresh.modules[path].B)
            assert torch.equal(update.A, fresh.modules[path].A)


@laws
@given(sums(), st.integers(1, 6), st.randoms(use_true_random=False))
def test_order_and_gauge_do_not_matter(case, rank, chance):
    members, weights = case
    expected = CoreSpace(members, torch.float64).compress(weights, rank)
    order = list(range(len(members)))
    chance.shuffle(order)
    changed = [Adapter({path: LowRank(u.B * 4, u.A / 4) for path, u in members[i].modules.items()}) for i in order]
    found = CoreSpace(changed, torch.float64).compress([weights[i] for i in order], rank)
    assert found.retained == pytest.approx(expected.retained, abs=1e-9)
    for path, update in found.modules.items():
        assert update.norm() == pytest.approx(expected.modules[path].norm(), rel=1e-5, abs=1e-9)


@laws
@given(sums(), st.integers(1, 6))
def test_compressing_the_exact_sum_is_the_same(case, rank):
    members, weights = case
    if not any(weights):
        weights[0] = 1.0
    fused = fuse(members, weights)
    small, kept = compress(fused, rank)
    found = CoreSpace(members).compress(weights, rank)
    assert kept == pytest.approx(found.retained, abs=1e-5)
    for path, update in small.modules.items():
        assert update.norm() == pytest.approx(found.modules[path].norm(), rel=1e-4, abs=1e-6)


def test_no_dense_matrix_is_made():
    """ΔW of these modules would take 3.6 TB."""
    m, n = 1_000_000, 900_000
    generator = torch.Generator().manual_seed(0)
    adapters = [
        Adapter({"wide": LowRank(torch.randn(m, 1, generator=generator), torch.randn(1, n, generator=generator))})
        for _ in range(2)
    ]
    found = CoreSpace(adapters).compress([0.5, -1.0], rank=1)
    a, b = (adapter.modules["wide"] for adapter in adapters)
    assert found.modules["wide"].norm() == pytest.approx(max(0.5 * a.norm(), b.norm()), rel=1e-2)
    assert found.modules["wide"].inner(b) == pytest.approx(-(b.norm() ** 2), rel=1e-2)
    assert found.retained == pytest.approx(0.8, abs=0.01)


def test_all_zero():
    found = CoreSpace([make({"model.a": 2}, 0)]).compress([0.0], rank=1)
    assert found.retained == found.per_module["model.a"] == 1.0
    assert not found.modules["model.a"].dense().any()


class TestBadInput:
    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({}, "needs a rank of at least 1 or an energy"),
            ({"rank": 0}, "rank of at least 1"),
            ({"rank": -3}, "got -3"),
            ({"energy": 0.0}, r"in \(0, 1\]; got 0\.0"),
            ({"energy": 1.5}, r"got 1\.5"),
            ({"energy": float("nan")}, "got nan"),
        ],
    )
    def test_bounds(self, bounds, message):
        with pytest.raises(UserError, match=message):
            compress(make({"model.a": 2}, 0), **bounds)

    def test_counts(self):
        with pytest.raises(UserError, match="1 members need as many weights; got 2"):
            CoreSpace([make({"model.a": 2}, 0)]).compress([1.0, 1.0], rank=1)
        with pytest.raises(UserError, match="at least one adapter"):
            CoreSpace([])

    def test_shapes(self):
        a = Adapter({"x": LowRank(torch.ones(2, 1), torch.ones(1, 3))})
        b = Adapter({"x": LowRank(torch.ones(3, 1), torch.ones(1, 2))})
        with pytest.raises(AdapterError, match="different shapes"):
            CoreSpace([a, b])
