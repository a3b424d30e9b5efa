"""Trimming, dropping and electing, entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fusion.methods import dense

from lorchestra.fusion.methods.thinning import dropped, elected, magnitude_at, trimmed

laws = settings(max_examples=80, deadline=None, derandomize=True)
numbers = st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1.5e-40, 1.0, -1.0])


@laws
@given(st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=4), st.floats(0.01, 1.0))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_magnitude_is_that_of_a_sorted_list(dtype, rows, density):
    """Ties, zeros, denormals and both signs included."""
    tiles = [torch.tensor(row, dtype=dtype) for row in rows]
    everything = sorted((abs(float(x)) for tile in tiles for x in tile), reverse=True)
    keep = max(int(density * len(everything) + 1e-9), 1)
    found = magnitude_at(tiles, density)
    assert found == (0.0 if density == 1.0 else everything[keep - 1])
    kept = sum(int((trimmed(tile, found) != 0).sum()) for tile in tiles)
    assert kept == sum(x >= found and x != 0 for x in everything)


def test_trimming_keeps_the_share_that_is_asked_for():
    tile = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    for density in (0.1, 0.2, 0.35, 0.999):
        kept = trimmed(tile, magnitude_at([tile], density))
        assert int((kept != 0).sum()) == int(density * 2000 + 1e-9)
        assert torch.equal(kept, dense.trim(tile, density))
    assert torch.equal(trimmed(tile, magnitude_at([tile], 1.0)), tile)


def test_dropping_is_a_matter_of_its_key_alone():
    tile = torch.ones(200, 100)
    one = dropped(tile, 0.3, 0, "a", "model.q", 0)
    torch.rand(5)
    assert torch.equal(one, dropped(tile, 0.3, 0, "a", "model.q", 0))
    for key in [(1, "a", "model.q", 0), (0, "b", "model.q", 0), (0, "a", "model.k", 0), (0, "a", "model.q", 1)]:
        agree = float(((one != 0) == (dropped(tile, 0.3, *key) != 0)).float().mean())
        assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.02), "independent masks"
    assert set(one.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    assert float((one != 0).float().mean()) == pytest.approx(0.3, abs=0.015)
    assert dropped(tile, 1.0, 0) is tile


@laws
@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6), min_size=1, max_size=5))
def test_election(rows):
    values = [torch.tensor(row, dtype=torch.float64).reshape(2, 3) for row in rows]
    torch.testing.assert_close(elected(values), dense.elect(values))


def test_where_the_sum_is_zero_nobody_wins():
    found = elected([torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[-1.0, -0.5, 0.0]])])
    assert found.tolist() == [[0.0, 2.0, 0.0]]
