"""A dense matrix back to factors: randomised SVD."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lorchestra.adapter.lowrank import LowRank

# Directions drawn beyond the rank, and passes that sharpen them.
OVERSAMPLING, POWER = 10, 2


def randomised_svd(matrix: Tensor, rank: int, key: str) -> tuple[LowRank, float, float]:
    """The range of ``matrix`` by a Gaussian sketch with two power iterations, then an exact SVD within that range.

    Halko, Martinsson and Tropp 2011, Finding Structure with Randomness, algorithms 4.4 and 5.1,
    https://arxiv.org/abs/0909.4061. Where the sketch would be as wide as the matrix, the SVD is exact.

    Args:
        matrix: ``[m, n]`` float32 or float64.
        rank: of the result, at most min(m, n).
        key: what the sketch is drawn from.

    Returns:
        Balanced factors in float32; ‖kept‖² and ‖matrix‖². The residual is exactly their difference, because the
        result is an orthogonal projection.
    """
    m, n = matrix.shape
    rank = min(rank, m, n)
    step = max((1 << 20) // n, 1)
    whole = sum(float(matrix[i : i + step].double().square().sum()) for i in range(0, m, step))
    if rank + OVERSAMPLING >= min(m, n):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little"))
        sketch = torch.randn(n, rank + OVERSAMPLING, generator=generator, dtype=matrix.dtype)
        Q = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(POWER):
            Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
        inner, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
        U = Q @ inner
    root = S[:rank].sqrt()
    kept = min(float(S[:rank].double().square().sum()), whole)
    return LowRank((U[:, :rank] * root).float(), (root[:, None] * Vh[:rank]).float()), kept, whole
