"""What elementwise methods do to the entries of ΔW, a tile of rows at a time: trim, drop, elect."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def magnitude_at(tiles: Iterable[Tensor], density: float) -> float:
    """The magnitude of the ⌊density·N⌋-th largest of the N entries of all tiles (at least of the first).

    Exact, by radix selection: magnitudes of IEEE numbers are ordered as their bits are, so that counting 16 bits at a
    time finds the entry in two passes (four in float64) without sorting or holding them.

    Args:
        tiles: float32 or float64 tensors, equal each time they are gone through (three times, five in float64).
        density: in (0, 1].
    """
    if density == 1.0:
        return 0.0
    count = sum(tile.numel() for tile in tiles)
    wanted = max(int(density * count + 1e-9), 1)
    first = next(iter(tiles))
    bits = torch.int32 if first.dtype == torch.float32 else torch.int64
    prefix = 0
    for shift in range(8 * first.element_size() - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for tile in tiles:
            head = tile.abs().view(bits).flatten() >> shift
            here = head if prefix == 0 and shift + 16 >= 8 * first.element_size() else head[head >> 16 == prefix]
            counts += torch.bincount(here & 0xFFFF, minlength=1 << 16)
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < wanted).sum())
        wanted -= int(from_top[place - 1]) if place else 0
        prefix = prefix << 16 | (0xFFFF - place)
    return float(torch.tensor([prefix], dtype=bits).view(first.dtype))


def trimmed(tile: Tensor, least: float) -> Tensor:
    """Entries of magnitude ``least`` or more; the others are 0."""
    return torch.where(tile.abs() >= least, tile, 0.0)


def dropped(tile: Tensor, density: float, *key: object) -> Tensor:
    """Each entry is kept with probability ``density`` and divided by it, else 0 (Yu et al. 2023).

    Chance comes from ``key`` alone (seed, member, module, tile), not from what was computed before.
    """
    if density == 1.0:
        return tile
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    kept = torch.rand(tile.shape, generator=generator) < density
    return torch.where(kept, tile / density, 0.0)


def elected(values: Sequence[Tensor]) -> Tensor:
    """Sign election and disjoint mean of TIES (Yadav et al. 2023, section 3.2): the sign of the sum wins, and the
    values of that sign are averaged. Where the sum is exactly 0 nobody wins and the result is 0.

    Args:
        values: each member's λᵢ-weighted entries, of one shape.
    """
    sign = torch.zeros_like(values[0])
    for value in values:
        sign += value
    sign.sign_()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for value in values:
        agrees = (value.sign() == sign) & (sign != 0)
        total += torch.where(agrees, value, 0.0)
        count += agrees
    return total / count.clamp(min=1)
