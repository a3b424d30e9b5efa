"""Tiles against the whole matrix: the same bits, whatever the shape, the dtype and the number of threads."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.digest import tensor_bytes
from lorchestra.adapter.lowrank import LowRank
from lorchestra.base.safetensors_file import Entry
from lorchestra.errors import SourceError, UserError
from lorchestra.fusion import rounding
from lorchestra.fusion.assign import CODES, Output
from lorchestra.fusion.rounding import FEWEST, Addend, Sums, move_rows, pieces

KINDS = [torch.float32, torch.bfloat16, torch.float16]


def moved(tmp_path, weight, kind, update=None, transposed=False, offset=24):
    """``weight`` through :func:`move_rows`: what is written, and the sums."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(offset) + bytes(tensor_bytes(weight)))
    target.write_bytes(b"")
    size = weight.numel() * weight.element_size()
    output = Output("w", Entry("w", CODES[weight.dtype], tuple(weight.shape), offset, offset + size), kind, "w")
    files = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY)
    try:
        addend = None if update is None else Addend.of(update, transposed)
        parts = [move_rows(files, output, 8, rows, addend) for rows in pieces(range(weight.shape[0]), 900)]
    finally:
        for file in files:
            os.close(file)
    data = bytearray(target.read_bytes()[8:])
    return torch.frombuffer(data, dtype=kind).view(weight.shape), Sums.of(parts)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [
        (2048, 5632, 16),
        (5632, 2048, 16),
        (256, 2048, 64),
        (16, 100_000, 5),
        (2, 131_073, 3),
        (1, 50, 2),
        (1001, 77, 48),
    ],
)
def test_tiles_are_the_whole_product(tmp_path, m, n, rank, threads):
    noise = torch.Generator().manual_seed(m + n)
    update = LowRank(torch.randn(m, rank, generator=noise), torch.randn(rank, n, generator=noise))
    weight = torch.randn(m, n, generator=noise)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    dense = weight + update.B @ update.A
    torch.set_num_threads(1)
    found, _ = moved(tmp_path, weight, torch.float32, update)
    torch.set_num_threads(before)
    assert torch.equal(found, dense)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40), n=st.integers(1, 70), rank=st.integers(1, 9), tile=st.integers(1, 600),
    stored=st.sampled_from(KINDS), kind=st.sampled_from(KINDS), transposed=st.booleans(),
    scale=st.sampled_from([1e-5, 1e-2, 1.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_dtype_and_tile(tmp_path_factory, m, n, rank, tile, stored, kind, transposed, scale, seed):
    noise = torch.Generator().manual_seed(seed)
    update = LowRank(torch.randn(m, rank, generator=noise) * scale, torch.randn(rank, n, generator=noise))
    weight = torch.randn((n, m) if transposed else (m, n), generator=noise).to(stored)
    delta = update.A.T.contiguous() @ update.B.T.contiguous() if transposed else update.B @ update.A
    usual, rounding.TILE = rounding.TILE, tile
    try:
        found, sums = moved(tmp_path_factory.mktemp("w"), weight, kind, update, transposed)
    finally:
        rounding.TILE = usual
    # A product of few rows or columns has kernels of its own, which sum in another order: its last bits may differ.
    exact = weight.double() + delta.double()
    left, right = (update.A.T, update.B.T) if transposed else (update.B, update.A)
    slack = (rank + 2) * 2.0**-23 * (weight.double().abs() + left.double().abs() @ right.double().abs())
    assert ((found.double() - exact).abs() <= slack + torch.finfo(kind).eps / 2 * exact.abs() + 1e-7).all()
    W, M, R = (tensor.double() for tensor in (weight, found, weight.to(kind)))
    D = delta.double()
    lost = torch.minimum((M - R - D).abs(), D.abs()) if stored != kind and kind != torch.float32 else M - R - D
    assert sums.weight == pytest.approx(float(W.square().sum()), rel=1e-5)
    assert sums.base == pytest.approx(float((R - W).square().sum()), rel=1e-4, abs=1e-12)
    assert sums.changed == int((M != R).sum())
    rounded_away = float(lost.square().sum())
    # W + ΔW is formed in float32: of one entry's loss, up to 2⁻²⁴·|W| is that addition's.
    whole = float(W.square().sum())
    assert sums.lost == pytest.approx(
        rounded_away, rel=2e-3, abs=1e-12 * whole + 2.0**-22 * (rounded_away * whole) ** 0.5
    )


@pytest.mark.parametrize(("rows", "step"), [(1, 5), (2, 1), (15, 1), (16, 1), (17, 2), (100, 33), (101, 10), (10, 10)])
def test_pieces_cover_all_rows_once_and_are_never_of_a_few(rows, step):
    found = pieces(range(5, 5 + rows), step)
    assert [row for piece in found for row in piece] == list(range(5, 5 + rows))
    assert all(len(piece) >= FEWEST for piece in found) or len(found) == 1
    assert max(map(len, found)) < max(step, FEWEST) + FEWEST


@pytest.mark.parametrize("value", [65504.0, 65519.0])
def test_the_largest_float16_is_written(tmp_path, value):
    weight = torch.full((4, 6), 1.0)
    weight[2, 3] = value
    assert torch.equal(moved(tmp_path, weight, torch.float16)[0], weight.half())
    assert torch.isfinite(weight.half()).all()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_float16_cannot_hold_is_an_error(tmp_path, stored):
    weight = torch.ones(4, 6)
    weight[2, 3] = 7e4
    message = r"tensor 'w' would hold (70000|70144), beyond the largest number of F16 \(65504\); take --dtype"
    with pytest.raises(UserError, match=message):
        moved(tmp_path, weight.to(stored), torch.float16)
    one = LowRank(torch.ones(4, 1), torch.ones(1, 6))
    with pytest.raises(UserError, match="would hold 7"):
        moved(tmp_path, weight.to(stored), torch.float16, one)


def test_an_update_that_leads_beyond_float16_is_an_error(tmp_path):
    for stored in (torch.float16, torch.float32):
        weight = torch.full((4, 6), 6e4, dtype=stored)
        with pytest.raises(UserError, match="would hold 70000, beyond"):
            moved(tmp_path, weight, torch.float16, LowRank(torch.full((4, 1), 1e4), torch.ones(1, 6)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_that_is_not_finite_is_an_error_where_something_is_added(tmp_path, kind, value):
    weight = torch.ones(4, 6)
    weight[1, 1] = value
    with pytest.raises(SourceError, match="tensor 'w' of the base holds NaN or infinity"):
        moved(tmp_path, weight, kind, LowRank(torch.ones(4, 1), torch.ones(1, 6)))
    copied, _ = moved(tmp_path, weight, kind)
    assert torch.equal(copied.isnan(), weight.isnan()), "a mask, say: not ours to judge"


def test_a_file_that_shrinks_meanwhile(tmp_path):
    (tmp_path / "short").write_bytes(bytes(100))
    file = os.open(tmp_path / "short", os.O_RDONLY)
    output = Output("w", Entry("w", "F32", (10, 10), 0, 400), torch.float32)
    try:
        with pytest.raises(SourceError, match="ends inside tensor 'w'; it was changed"):
            move_rows((file, file), output, 0, range(10), None)
    finally:
        os.close(file)
