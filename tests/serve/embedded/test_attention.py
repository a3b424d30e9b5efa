"""The compiled attention of decoding, against float64 softmax attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.base.native import compiler
from lorchestra.serve.embedded.attention import WIDTHS, Attention


def compiled() -> Attention:
    if compiler() is None:
        pytest.skip("no C++ compiler is here")
    return Attention()


def written_out(q, slots, at, scale, window):
    """``[b, h, g, d]`` float64."""
    rows = []
    for one, slot, last in zip(q.double(), slots.double(), at.tolist(), strict=False):
        first = max(0, last + 1 - window) if window else 0
        keys, values = slot[first : last + 1].unbind(1)  # [t, h, d]
        scores = torch.einsum("hgd,thd->hgt", one, keys) * (scale or 1 / math.sqrt(q.shape[-1]))
        rows.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), values))
    return torch.stack(rows)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.sampled_from(WIDTHS), st.integers(1, 70))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@settings(deadline=None, max_examples=60)
@given(SHAPES, st.sampled_from([None, 0.3]), st.sampled_from([None, 1, 7]), st.integers(0, 2**31))
def test_every_row_attends_as_far_as_it_goes(dtype, tolerance, shape, scale, window, seed):
    rows, heads, group, width, length = shape
    random = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, 1, heads * group * width + 5, generator=random).to(dtype)
    q = spread[:, 0, 5:].view(rows, heads, group, width)  # rows lie apart
    slots = torch.randn(rows + 1, length, 2, heads, width, generator=random).mul_(2).to(dtype)
    at = torch.randint(length, (rows,), generator=random)
    for row, last in enumerate(at.tolist()):
        slots[row, last + 1 :] = torch.nan  # what lies beyond is not read
    kernel = compiled()
    assert kernel.takes(q, slots)
    found = kernel.attend(q, slots, at, scale, window)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), written_out(q, slots, at, scale, window), rtol=tolerance, atol=tolerance)


def test_large_scores_and_what_is_no_number():
    kernel = compiled()
    q, slots, at = torch.randn(3, 1, 2, 64) * 300, torch.randn(3, 40, 2, 1, 64), torch.tensor([39, 20, 39])
    found = kernel.attend(q, slots, at)
    torch.testing.assert_close(found.double(), written_out(q, slots, at, None, None), rtol=1e-4, atol=1e-4)
    slots[1, 5, 0, 0, 3] = torch.nan
    spoilt = kernel.attend(q, slots, at)
    assert spoilt[1].isnan().all()
    torch.testing.assert_close(spoilt[[0, 2]], found[[0, 2]], rtol=0, atol=0)


def test_what_it_does_not_know_is_left_to_torch():
    kernel = compiled()
    slots = torch.zeros(2, 8, 2, 3, 64)
    assert kernel.takes(torch.zeros(2, 3, 2, 64), slots)
    assert not kernel.takes(torch.zeros(2, 3, 2, 64, dtype=torch.float64), slots.double())
    assert not kernel.takes(torch.zeros(2, 3, 2, 64), slots.bfloat16())
    assert not kernel.takes(torch.zeros(2, 3, 2, 24), torch.zeros(2, 8, 2, 3, 24))
    assert not kernel.takes(torch.zeros(2, 3, 64, 2).transpose(2, 3), slots)
