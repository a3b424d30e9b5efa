"""What a layer does between its products, by torch and compiled, against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.base.native import compiler
from lorchestra.serve.embedded.pieces import Compiled, Heads, Pieces, Stock
from lorchestra.serve.embedded.slots import Reading, Room

EPSILON = 1e-5
POSITIONS = 50
KINDS = pytest.mark.parametrize("kind", [Stock, Compiled])
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])


def pieces(kind: type, heads: int = 1, group: int = 1, width: int = 16, dtype: torch.dtype = torch.float32) -> Pieces:
    if kind is Compiled and compiler() is None:
        pytest.skip("no C++ compiler is here")
    angles = torch.arange(POSITIONS)[:, None] * torch.linspace(0.1, 1, width // 2)[None]
    sine = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return kind(Heads(heads, group, width, EPSILON, angles.cos().repeat(1, 2).to(dtype), sine.to(dtype)))


def normalised(x, weight):
    x = x.double()
    return weight.double() * x / (x.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()


def near(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@KINDS
@DTYPES
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 7, 16, 40, 97]), st.integers(0, 2**31))
def test_norms_with_and_without_a_sum(kind, dtype, tolerance, b, L, n, seed):
    noise = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(b, L, n, generator=noise).to(dtype) for _ in range(2))
    weight = torch.randn(n, generator=noise).to(dtype)
    does = pieces(kind, dtype=dtype)
    near(does.norm(x, weight), normalised(x, weight), tolerance)
    added = (x.double() + y.double()).to(dtype)
    total, found = does.add_norm(x, y, weight)
    assert total.dtype == found.dtype == dtype
    torch.testing.assert_close(total, added, rtol=0, atol=0)  # rounded once, as torch does
    near(found, normalised(added, weight), tolerance)


@KINDS
@DTYPES
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 16, 40]), st.integers(0, 2**31))
def test_the_gated_half(kind, dtype, tolerance, b, L, inside, seed):
    both = (torch.randn(b, L, 2 * inside, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype)
    gate, up = both.double().chunk(2, dim=-1)
    near(pieces(kind, dtype=dtype).gated(both), gate / (1 + (-gate).exp()) * up, tolerance)


@KINDS
@DTYPES
def test_gates_at_the_ends_of_what_there_is(kind, dtype, tolerance):
    values = [-1e38, -1e4, -89.0, -0.0, 0.0, 89.0, 1e4, 1e38, torch.inf, torch.nan]
    gate = torch.tensor(values * 2)[None, None]  # in whole lanes and beside them
    found = pieces(kind, dtype=dtype).gated(torch.cat((gate, torch.ones_like(gate)), dim=-1).to(dtype))[0, 0]
    for i, value in enumerate(values * 2):
        expected = gate[0, 0, i].to(dtype).float()
        if value != value:
            assert found[i].isnan()
        elif value > 0:
            assert found[i].float() == expected
        else:
            assert found[i].abs() < 1e-30


@KINDS
@DTYPES
@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([2, 16, 20, 64, 80]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_queries_and_keys_are_turned_and_kept(kind, dtype, tolerance, shape, width, normed, seed):
    b, L, heads, group = shape
    noise = torch.Generator().manual_seed(seed)
    does = pieces(kind, heads, group, width, dtype)
    qkv = torch.randn(b, L, heads * (group + 2) * width, generator=noise).to(dtype)
    starts = torch.randint(POSITIONS - L, (b,), generator=noise).tolist()
    weights = tuple(torch.randn(width, generator=noise).to(dtype) for _ in range(2)) if normed else None
    step = Reading([torch.zeros(2, POSITIONS, 2, heads, width, dtype=dtype) for _ in range(b)], starts, [L] * b)
    split = qkv.double().view(b, L, -1, width)
    q, k, v = split.split([heads * group, heads, heads], dim=2)
    if weights is not None:
        q, k = normalised(q, weights[0]), normalised(k, weights[1])
    expected = [rotated(x, step.positions, width) for x in (q, k)]
    found = does.turn(qkv, does.rotations(step.positions), weights, step, 1)
    assert found.shape == (b, L, heads, group, width)
    near(found.reshape(b, L, -1, width), expected[0], tolerance)
    (room,) = step.rooms(1)
    held = room.held.view(b, L, 2, heads, width)
    near(held[:, :, 0], expected[1], tolerance)
    torch.testing.assert_close(held[:, :, 1].double(), v, rtol=0, atol=0)


def rotated(x, positions, width):
    angles = positions[..., None].double() * torch.linspace(0.1, 1, width // 2).double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None]
    halves = torch.complex(x[..., : width // 2].contiguous(), x[..., width // 2 :].contiguous()) * turn
    return torch.cat((halves.real, halves.imag), dim=-1)


class _TwoStores:
    """Rows of a batch that lie in two stores, as sequences of two lengths do."""

    def __init__(self, held):
        self.held = held

    def rooms(self, layer):
        first, second = self.held[layer]
        return [Room(0, 2, first, torch.tensor([3, 9])), Room(2, 1, second, torch.tensor([1]))]


def test_each_row_goes_to_its_own_store():
    does = pieces(Compiled, 2, 2, 16)
    qkv = torch.randn(3, 1, 8 * 16)
    held = [[torch.zeros(12, 2, 2, 16), torch.zeros(4, 2, 2, 16)]]
    values = qkv.view(3, 8, 16)[:, 6:].clone()
    positions = torch.tensor([[3], [1], [0]])
    does.turn(qkv, does.rotations(positions), None, _TwoStores(held), 0)
    for store, place, row in ((0, 3, 0), (0, 9, 1), (1, 1, 2)):
        torch.testing.assert_close(held[0][store][place, 1], values[row], rtol=0, atol=0)
    assert int((held[0][0] != 0).any(dim=-1).sum() + (held[0][1] != 0).any(dim=-1).sum()) == 3 * 4
