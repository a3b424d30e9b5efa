"""Elementwise methods: tiles, names and ranks. Their mathematics is in ``test_laws.py``; here PEFT is beside it."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils import merge_utils

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.fusion.methods import dare, dare_ties, elementwise, magnitude, ties

METHODS = (ties, magnitude, dare, dare_ties)
PATHS = ("model.layers.0.q", "model.layers.1.q", "lm_head")


def make(seed, paths=PATHS, m=60, n=50, rank=3):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            p: LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
            for p in paths
        }
    )


MEMBERS, ONES = {"a": make(0), "b": make(1)}, {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(("ours", "theirs"), [(ties, merge_utils.ties), (magnitude, merge_utils.magnitude_prune)])
def test_what_peft_computes_densely(ours, theirs):
    """With equal weights PEFT's definition is the same (it elects signs before weighting)."""
    found = ours(MEMBERS, {"a": 0.7, "b": 0.7}, density=0.3, rank=50).adapter
    for path in PATHS:
        deltas = [member.modules[path].dense() for member in MEMBERS.values()]
        expected = theirs(deltas, torch.tensor([0.7, 0.7]), density=0.3)
        torch.testing.assert_close(found.modules[path].dense(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [ties, magnitude])
def test_tiles_do_not_show(method, monkeypatch):
    whole = method(MEMBERS, ONES, density=0.3, rank=50).adapter
    monkeypatch.setattr(elementwise, "TILE", 7 * 50)
    tiled = method(MEMBERS, ONES, density=0.3, rank=50).adapter
    for path in PATHS:
        torch.testing.assert_close(tiled.modules[path].dense(), whole.modules[path].dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_module_does_not_depend_on_the_others(method):
    """Seeded by names: the same module comes out bit for bit, whatever else is fused and in whatever order."""
    expected = method(MEMBERS, ONES, density=0.5).adapter.modules[PATHS[1]]
    alone = {name: Adapter({PATHS[1]: member.modules[PATHS[1]]}) for name, member in MEMBERS.items()}
    found = method(alone, ONES, density=0.5).adapter.modules[PATHS[1]]
    assert torch.equal(found.B, expected.B)
    assert torch.equal(found.A, expected.A)


@pytest.mark.parametrize("method", [dare, dare_ties])
def test_another_seed_is_another_draw(method):
    one, same, other = (method(MEMBERS, ONES, seed=seed).adapter.digest for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 2, 20])
def test_what_is_retained_is_what_the_rank_keeps(method, rank):
    full = method(MEMBERS, ONES, density=0.4, rank=50)
    made = method(MEMBERS, ONES, density=0.4, rank=rank)
    assert full.retained == pytest.approx(1.0, abs=1e-6)
    assert {update.rank for update in made.adapter.modules.values()} == {rank or 6}, "by default Σrᵢ"
    error = whole = 0.0
    for path in PATHS:
        dense = full.adapter.modules[path].dense(torch.float64)
        lost = float((made.adapter.modules[path].dense(torch.float64) - dense).square().sum())
        size = float(dense.square().sum())
        assert made.per_module[path] == pytest.approx(1 - lost / size, abs=1e-5)
        error, whole = error + lost, whole + size
    assert made.retained == pytest.approx(1 - error / whole, abs=1e-5)
    assert made.adapter.lineage.settings["retained"] == made.retained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_float64_where_asked(method, dtype):
    found = method(MEMBERS, ONES, density=1.0, rank=50, dtype=dtype).adapter
    assert found.modules[PATHS[0]].B.dtype == torch.float32
    assert math.isfinite(found.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"in \(0, 1\]; got 0"),
        ({"density": math.nan}, "got nan"),
        ({"rank": 0}, "at least 1 is needed"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(UserError, match=message):
        method(MEMBERS, ONES, **options)
