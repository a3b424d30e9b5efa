"""Core space is the SVD of the dense sum, without the dense sum."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fusion.oracle import dense_sum, random_adapter

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, UserError
from lorchestra.fusion import core_space
from lorchestra.fusion.core_space import CoreSpace
from lorchestra.fusion.methods import compress, fuse

laws = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = {"model.a": (7, 5), "model.b": (4, 9), "model.c": (6, 6)}
ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 8), min_size=1)
seeds = st.integers(0, 2**31)
weight = st.just(0.0) | st.floats(0.01, 3) | st.floats(-3, -0.01)


def make(ranks, seed):
    return random_adapter(SHAPES, ranks, seed)


@st.composite
def sums(draw):
    members = draw(st.lists(st.builds(make, ranks, seeds), min_size=1, max_size=4))
    weights = draw(st.lists(weight, min_size=len(members), max_size=len(members)))
    return members, weights


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


def wide(members, rank, m, n, seed=0, spread=1.0):
    """Adapters of one large module; singular values of the factors fall by ``spread`` over the columns."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -spread, rank)
    return [
        Adapter(
            {"w": LowRank(torch.randn(m, rank, generator=generator) * fall, torch.randn(rank, n, generator=generator))}
        )
        for _ in range(members)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(300, 200), (40, 200), (300, 40), (30, 40)])
@pytest.mark.parametrize("block", [None, 5000])
def test_many_adapters_and_blocks_of_rows(m, n, dtype, block, monkeypatch):
    """Σr = 60 stands above, between and below m and n; a few rows at a time are as good as all."""
    if block:
        monkeypatch.setattr(core_space, "_BLOCK", block)
    members = wide(20, 3, m, n)
    weights = [(-1) ** i * (0.1 + i / 20) for i in range(20)]
    matrix = dense_sum(members, weights)["w"]
    S = torch.linalg.svdvals(matrix)
    found = CoreSpace(members, dtype).compress(weights, rank=8)
    error = float((found.modules["w"].dense(torch.float64) - matrix).norm())
    assert error == pytest.approx(float(S[8:].norm()), rel=1e-5)
    assert found.retained == pytest.approx(float(S[:8].square().sum() / S.square().sum()), rel=1e-6)
    torch.testing.assert_close(
        CoreSpace(members, dtype).spectra(weights)["w"][: len(S)], S[:60], rtol=1e-5, atol=1e-5 * float(S[0])
    )


def test_large_cores_are_not_kept(monkeypatch):
    members = wide(5, 4, 60, 50)
    kept = CoreSpace(members)
    expected = kept.compress([1.0] * 5, rank=3)
    monkeypatch.setattr(core_space, "_KEPT", 10)
    again = CoreSpace(members)
    found = again.compress([1.0] * 5, rank=3)
    assert (len(kept._triangles), len(again._triangles)) == (1, 0)
    assert torch.equal(found.modules["w"].B, expected.modules["w"].B)


@pytest.mark.parametrize("spread", [0.0, 4.0, 12.0])
def test_float32_arithmetic_is_as_good_as_float32_gets(spread):
    """Also with the same adapter twice, columns of very different length, and another gauge of very uneven rows."""
    a, b = wide(2, 8, 400, 300, spread=spread)
    stretch = torch.logspace(-6, 6, 8)
    skewed = Adapter({"w": LowRank(a.modules["w"].B * stretch, a.modules["w"].A / stretch[:, None])})
    members, weights = [a, b, skewed], [0.5, 0.3, 0.2]
    matrix = dense_sum(members, weights)["w"]
    U, S, Vh = torch.linalg.svd(matrix)
    for rank in (4, 16):
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        found = CoreSpace(members).compress(weights, rank).modules["w"]
        assert found.rank <= rank
        assert float((found.dense(torch.float64) - best).norm()) <= 2e-6 * float(S.norm())
        torch.testing.assert_close(found.B.norm(dim=0), found.A.norm(dim=1), rtol=1e-3, atol=1e-6 * float(S[0]) ** 0.5)


def test_what_cancels_leaves_nothing_but_rounding():
    a = wide(1, 6, 200, 100)[0]
    b = Adapter({"w": LowRank(a.modules["w"].B * 3, a.modules["w"].A / 3)})
    for dtype in (torch.float32, torch.float64):
        found = CoreSpace([a, b], dtype).compress([1.0, -1.0], rank=12)
        assert found.modules["w"].norm() <= 1e-6 * a.norm()
    near = Adapter({"w": LowRank(a.modules["w"].B, a.modules["w"].A * (1 - 2**-12))})
    kept = CoreSpace([a, near]).compress([1.0, -1.0], rank=12).modules["w"]
    assert kept.norm() == pytest.approx(2**-12 * a.norm(), rel=5e-3)


class TestBudget:
    """The largest σ² per parameter first, over all modules."""

    @laws
    @given(sums(), st.integers(1, 400))
    def test_is_what_its_definition_says(self, case, budget):
        members, weights = case
        spectra = {path: torch.linalg.svdvals(m).square() for path, m in dense_sum(members, weights).items()}
        cost = {path: sum(SHAPES[path]) for path in spectra}
        queue = sorted(
            ((float(s), path) for path, power in spectra.items() for s in power if s > 1e-9 * power[0]),
            key=lambda item: -item[0] / cost[item[1]],
        )
        left, ranks, full = budget, dict.fromkeys(spectra, 0), set()
        for _, path in queue:
            if cost[path] > left:
                full.add(path)
            elif path not in full:
                left -= cost[path]
                ranks[path] += 1
        space = CoreSpace(members, torch.float64)
        if not any(ranks.values()):
            with pytest.raises(UserError, match="budget"):
                space.compress(weights, budget=budget)
            return
        found = space.compress(weights, budget=budget)
        assert {path: update.rank for path, update in found.modules.items()} == {p: r for p, r in ranks.items() if r}
        assert sum(update.parameters for update in found.modules.values()) <= budget
        kept = sum(float(power[: ranks[path]].sum()) for path, power in spectra.items())
        whole = sum(float(power.sum()) for power in spectra.values())
        assert found.retained == pytest.approx(kept / whole, abs=1e-9)
        for path, power in spectra.items():
            if float(power.sum()) > 0:
                share = float(power[: ranks[path]].sum() / power.sum())
                assert found.per_module[path] == pytest.approx(share, abs=1e-9)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(0, 2**31), st.integers(1, 12))
    def test_with_modules_of_one_size_no_choice_is_better(self, seed, components):
        generator = torch.Generator().manual_seed(seed)
        modules = {
            name: LowRank(torch.randn(6, 4, generator=generator) * size, torch.randn(4, 5, generator=generator))
            for name, size in (("a", 1.0), ("b", 0.3), ("c", 2.0))
        }
        adapter = Adapter(modules)
        found = CoreSpace([adapter]).compress([1.0], budget=11 * components)
        power = {name: torch.linalg.svdvals(update.dense(torch.float64)).square() for name, update in modules.items()}
        choices = [r for r in itertools.product(range(5), repeat=3) if sum(r) <= components]
        best = max(sum(float(power[name][:r].sum()) for name, r in zip("abc", ranks, strict=True)) for ranks in choices)
        kept = sum(update.norm() ** 2 for update in found.modules.values())
        assert kept == pytest.approx(best, rel=1e-5)

    def test_beside_other_bounds(self):
        adapter = Adapter({**make({"model.a": 5}, 0).modules, **make({"model.c": 6}, 1).modules})
        found = CoreSpace([adapter]).compress([1.0], rank=2, budget=1000)
        assert {update.rank for update in found.modules.values()} == {2}

    def test_too_small(self):
        with pytest.raises(UserError, match=r"budget of 11 parameters is too small: one rank .* takes 12"):
            CoreSpace([make({"model.a": 2}, 0)]).compress([1.0], budget=11)
        with pytest.raises(UserError, match="zero everywhere"):
            CoreSpace([make({"model.a": 2}, 0)]).compress([0.0], budget=100)


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
            ({"budget": 0}, "number of parameters, at least 1; got 0"),
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

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weights(self, bad):
        with pytest.raises(UserError, match=r"finite numbers; got (nan|inf)"):
            CoreSpace([make({"model.a": 2}, 0)]).compress([bad], rank=1)

    def test_dtype(self):
        with pytest.raises(UserError, match=r"float32 or float64; got torch\.bfloat16"):
            CoreSpace([make({"model.a": 2}, 0)], torch.bfloat16)

    def test_shapes(self):
        a = Adapter({"x": LowRank(torch.ones(2, 1), torch.ones(1, 3))})
        b = Adapter({"x": LowRank(torch.ones(3, 1), torch.ones(1, 2))})
        with pytest.raises(AdapterError, match=r"module 'x': .*different shapes .*\(2, 3\), \(3, 2\).*different bases"):
            CoreSpace([a, b])
