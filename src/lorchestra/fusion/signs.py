"""Where two updates pull an entry of a weight in opposite directions, counted on ΔW itself, tile by tile."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.events import SILENT, Reporter

TILE = 256
# Entries of ΔW, all modules together, up to which none is left out.
ENTRIES = 1 << 27


@dataclass(frozen=True)
class Signs:
    """Counts over the entries of two updates ΔWₐ, ΔW_b, scaled up to whole modules where tiles were sampled.

    Args:
        entries: in all.
        opposed: entries whose signs differ, both being non-zero.
        product: Σ |ΔWₐ ∘ ΔW_b|.
        opposed_product: the part of ``product`` on opposed entries.
    """

    entries: float
    opposed: float
    product: float
    opposed_product: float

    def __add__(self, other: Signs) -> Signs:
        return Signs(
            self.entries + other.entries,
            self.opposed + other.opposed,
            self.product + other.product,
            self.opposed_product + other.opposed_product,
        )

    @property
    def conflict(self) -> float:
        """Share of entries where the signs differ; about ½ for unrelated updates."""
        return self.opposed / self.entries if self.entries else 0.0

    @property
    def weighted(self) -> float | None:
        """The same, each entry weighted by its absolute product; ``None`` if all products are 0."""
        return self.opposed_product / self.product if self.product > 0 else None


@dataclass(frozen=True)
class Tiles:
    """Which tiles of a module were looked at: row and column of their first entries; ``total`` there are."""

    seen: tuple[tuple[int, int], ...]
    total: int

    @property
    def complete(self) -> bool:
        """Every tile."""
        return len(self.seen) == self.total


def sign_conflict(
    adapters: Mapping[str, Adapter], entries: int | None = None, reporter: Reporter = SILENT
) -> tuple[dict[tuple[str, str], dict[str, Signs]], dict[str, Tiles]]:
    """Sign conflicts of every two adapters in every module that both change.

    ΔW is formed in tiles of 256 × 256, in float32, one tile of all members at a time. If the modules have more
    entries than ``entries`` (by default 2²⁷, 134 million), the same share of every module's tiles is drawn, at least
    one, seeded by the module's path: the same modules give the same tiles, whatever else is compared.

    Args:
        adapters: name → adapter, of equal shapes where they share a module.
        entries: at most about so many are looked at, per adapter.
        reporter: progress.

    Returns:
        (a, b) → module path → :class:`Signs`, and module path → :class:`Tiles`.
    """
    limit = ENTRIES if entries is None else entries
    names = list(adapters)
    members: dict[str, list[str]] = {}
    for path in sorted({path for adapter in adapters.values() for path in adapter.modules}):
        having = [name for name in names if path in adapters[name].modules]
        if len(having) > 1:
            members[path] = having
    sizes = {path: math.prod(adapters[having[0]].modules[path].shape) for path, having in members.items()}
    share = min(limit / sum(sizes.values()), 1.0) if sizes else 1.0
    found: dict[tuple[str, str], dict[str, Signs]] = {pair: {} for pair in combinations(names, 2)}
    tiles = {}
    with reporter.task("compare signs", len(members), "module") as task:
        for path, having in members.items():
            m, n = adapters[having[0]].modules[path].shape
            tiles[path] = _drawn(path, m, n, share)
            for pair, signs in _counted(path, {name: adapters[name] for name in having}, tiles[path], m * n).items():
                found[pair][path] = signs
            task.advance(1)
    return found, tiles


def _drawn(path: str, m: int, n: int, share: float) -> Tiles:
    corners = [(i, j) for i in range(0, m, TILE) for j in range(0, n, TILE)]
    count = min(max(round(share * len(corners)), 1), len(corners))
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    chosen = corners if count == len(corners) else sorted(random.Random(seed).sample(corners, count))
    return Tiles(tuple(chosen), len(corners))


def _counted(path: str, members: Mapping[str, Adapter], tiles: Tiles, size: int) -> dict[tuple[str, str], Signs]:
    """Sums over tiles as K×K Gram matrices: Σ sign·sign = agreeing − opposed, Σ |sign|·|sign| = their sum."""
    updates = [adapter.modules[path] for adapter in members.values()]
    K = len(updates)
    signed, both, inner, product = (torch.zeros(K, K, dtype=torch.float64) for _ in range(4))
    seen = 0
    for i, j in tiles.seen:
        tile = torch.stack([(u.B[i : i + TILE] @ u.A[:, j : j + TILE]).flatten() for u in updates])
        seen += tile.shape[1]
        size_of, sign = tile.abs(), tile.sign()
        signed += sign @ sign.T  # whole numbers up to 65,536: exact in float32
        both += sign.abs() @ sign.abs().T
        inner += (tile @ tile.T).double()
        product += (size_of @ size_of.T).double()
    scale = size / seen
    opposed, against = (both - signed) / 2 * scale, (product - inner).clamp(min=0) / 2 * scale
    return {
        (a, b): Signs(float(size), float(opposed[i, j]), float(product[i, j]) * scale, float(against[i, j]))
        for (i, a), (j, b) in combinations(enumerate(members), 2)
    }
