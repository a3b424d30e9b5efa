"""Adapters and features made up."""

from __future__ import annotations

import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank


def adapter(n=24, rank=3, seed=0, layer=2, names=("q_proj", "k_proj", "v_proj"), dtype=torch.float32) -> Adapter:
    """Changes the attention of one layer."""
    noise = torch.Generator().manual_seed(seed)
    return Adapter({
        f"model.layers.{layer}.self_attn.{name}": LowRank(
            torch.randn(m, rank, generator=noise, dtype=dtype), torch.randn(rank, n, generator=noise, dtype=dtype)
        )
        for m, name in zip((n, n // 2, n // 2), names, strict=True)
    })  # fmt: skip


def plain(count, n, noise):
    """Features whose scatter has a few long axes, as that of prompts has."""
    long = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(99)))[0][:4]
    return torch.randn(count, n, generator=noise) * 0.5 + torch.randn(count, 4, generator=noise) @ long * 2
