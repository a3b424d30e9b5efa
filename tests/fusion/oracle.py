"""What the laws of fusion are held against: random adapters, and their sums as dense float64 matrices."""

from __future__ import annotations

import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank


def random_adapter(shapes, ranks, seed):
    """``shapes`` path → (m, n), ``ranks`` path → rank of the modules that it has."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, rank in ranks.items():
        m, n = shapes[path]
        modules[path] = LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
    return Adapter(modules)


def dense_sum(members, weights):
    """Path → Σ λᵢ·ΔWᵢ."""
    total = {}
    for adapter, weight in zip(members, weights, strict=True):
        for path, update in adapter.modules.items():
            total[path] = total.get(path, 0) + weight * update.dense(torch.float64)
    return total
