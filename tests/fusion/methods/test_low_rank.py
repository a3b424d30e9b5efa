"""Recompression and alignment from factors alone."""

from __future__ import annotations

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.fusion.methods import compress, knots, linear, svd
from lorchestra.fusion.methods.low_rank import compressed


def make(seed, m=30, n=20, rank=3, paths=("x", "y")):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            p: LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
            for p in paths
        }
    )


MEMBERS, WEIGHTS = {"a": make(0), "b": make(1), "c": make(2)}, {"a": 0.5, "b": -0.3, "c": 0.0}


def test_svd_is_the_compressed_sum():
    found = svd(MEMBERS, WEIGHTS, rank=2)
    expected = compressed(linear(MEMBERS, WEIGHTS), rank=2)
    assert found.retained == pytest.approx(expected.retained, rel=1e-5)
    assert found.per_module == pytest.approx(expected.per_module, rel=1e-5)
    for path, update in found.adapter.modules.items():
        torch.testing.assert_close(update.dense(), expected.adapter.modules[path].dense(), rtol=1e-4, atol=1e-5)
    assert [parent.name for parent in found.adapter.lineage.parents] == ["a", "b"]
    assert found.adapter.lineage.settings == {"rank": 2, "energy": None, "retained": found.retained}


def test_a_budget_counts_the_parameters_of_all_modules():
    small, kept = compress(linear(MEMBERS, WEIGHTS), budget=160)
    assert small.parameters == 150
    assert 0 < kept < 1
    assert small.lineage.settings["budget"] == 160


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_in_float64_where_asked(dtype):
    a = make(0)
    near = Adapter({path: LowRank(u.B, u.A * (1 - 2**-20)) for path, u in a.modules.items()})
    found = svd({"a": a, "near": near}, {"a": 1.0, "near": -1.0}, rank=3, dtype=dtype).adapter
    exact = {path: u.dense(torch.float64) - near.modules[path].dense(torch.float64) for path, u in a.modules.items()}
    error = sum(float((u.dense(torch.float64) - exact[p]).square().sum()) for p, u in found.modules.items()) ** 0.5
    relative = error / sum(float(m.square().sum()) for m in exact.values()) ** 0.5
    assert (relative < 1e-6) == (dtype == torch.float64), "what nearly cancels needs it"


def test_knots_has_the_rank_of_the_members_together_and_no_other_error():
    found = knots(MEMBERS, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert {update.rank for update in found.adapter.modules.values()} == {9}
    assert (found.retained, found.per_module) == (1.0, {})
    twice = knots({"a": MEMBERS["a"], "again": MEMBERS["a"]}, {"a": 1.0, "again": 1.0})
    for path, update in twice.adapter.modules.items():
        assert update.rank == 3, "directions that are there once count once"
        torch.testing.assert_close(update.dense(), MEMBERS["a"].modules[path].dense(), rtol=1e-4, atol=1e-4)


def test_knots_of_zeros_is_zero():
    zero = Adapter({"x": LowRank(torch.zeros(4, 2), torch.zeros(2, 3))})
    assert knots({"a": zero}, {"a": 1.0}).adapter.norm() == 0.0


def test_knots_forms_no_dense_matrix():
    """ΔW of this module would take 240 GB."""
    wide = make(0, m=300_000, n=200_000, rank=2, paths=("x",))
    other = make(1, m=300_000, n=200_000, rank=1, paths=("x",))
    found = knots({"a": wide, "b": other}, {"a": 1.0, "b": 1.0}, density=0.5)
    assert found.adapter.modules["x"].rank == 3


@pytest.mark.parametrize("density", [0.0, 1.1])
def test_bad_density(density):
    with pytest.raises(UserError, match="density is the share"):
        knots(MEMBERS, WEIGHTS, density=density)
