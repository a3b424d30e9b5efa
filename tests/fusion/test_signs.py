"""Sign conflicts are those of the dense updates; what is sampled is drawn by name and says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.fusion.signs import TILE, sign_conflict

laws = settings(max_examples=25, deadline=None, derandomize=True)


def make(shapes, seed, rank=3):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            path: LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
            for path, (m, n) in shapes.items()
        }
    )


def counted(a, b, path, where=slice(None)):
    """Dense, in float64: share of opposed signs, and weighted by |product|."""
    product = (a.modules[path].dense(torch.float64) * b.modules[path].dense(torch.float64)).numpy()[where]
    return float((product < 0).mean()), float(-product[product < 0].sum() / np.abs(product).sum())


@laws
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**31))
def test_against_the_dense_count(m, n, seed):
    """Over the border of a tile too; entries within float32's rounding of zero may fall to either side."""
    shapes = {"x": (m, n), "y": (5, 4)}
    members = {"a": make(shapes, seed), "b": make(shapes, seed + 1), "c": make({"y": (5, 4)}, seed + 2)}
    found, tiles = sign_conflict(members)
    assert {path: seen.complete for path, seen in tiles.items()} == {"x": True, "y": True}
    for (one, two), of_module in found.items():
        assert set(of_module) == set(members[one].modules) & set(members[two].modules)
        for path, signs in of_module.items():
            share, weighted = counted(members[one], members[two], path)
            size = float(np.prod(shapes[path]))
            assert signs.entries == size
            assert signs.opposed == pytest.approx(share * size, abs=max(2.0, 1e-4 * size))
            assert signs.weighted == pytest.approx(weighted, abs=1e-5)


def test_entries_that_are_zero_are_no_conflict():
    one = Adapter({"x": LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, -1.0]]))})
    two = Adapter({"x": LowRank(torch.tensor([[-1.0], [-1.0]]), torch.tensor([[1.0, 1.0]]))})
    signs = sign_conflict({"a": one, "b": two})[0]["a", "b"]["x"]
    assert (signs.entries, signs.opposed, signs.product, signs.opposed_product) == (4.0, 1.0, 2.0, 1.0)


def test_a_large_module_is_sampled_by_its_name_and_says_where():
    shapes = {"x": (1500, 1100), "y": (300, 300)}
    members = {"a": make(shapes, 0), "b": make(shapes, 1)}
    found, tiles = sign_conflict(members, entries=6 * TILE * TILE)
    assert (len(tiles["x"].seen), tiles["x"].total) == (7, 30)
    assert (len(tiles["y"].seen), tiles["y"].total) == (1, 4)
    again = sign_conflict({"b": members["b"], "a": members["a"], "c": make({"y": (300, 300)}, 2)}, 6 * TILE * TILE)
    assert again[1]["x"] == tiles["x"]
    product = (members["a"].modules["x"].dense() * members["b"].modules["x"].dense()).double()
    parts = torch.cat([product[i : i + TILE, j : j + TILE].flatten() for i, j in tiles["x"].seen])
    signs = found["a", "b"]["x"]
    assert signs.entries == 1500 * 1100
    assert signs.conflict == pytest.approx(float((parts < 0).double().mean()), abs=1e-4)
    assert signs.weighted == pytest.approx(float(-parts[parts < 0].sum() / parts.abs().sum()), abs=1e-5)
    assert signs.conflict == pytest.approx(counted(members["a"], members["b"], "x")[0], abs=0.05)


def test_counts_add_up():
    shapes = {"x": (20, 30), "y": (40, 10)}
    a, b = make(shapes, 0), make(shapes, 1)
    found = sign_conflict({"a": a, "b": b})[0]["a", "b"]
    both = found["x"] + found["y"]
    opposed = sum(counted(a, b, path)[0] * np.prod(shape) for path, shape in shapes.items())
    assert both.conflict == pytest.approx(opposed / 1000, abs=1e-3)
