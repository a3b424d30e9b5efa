"""An independent plain implementation of every method on dense float64 matrices: the oracle."""

from __future__ import annotations

import torch


def trim(matrix, density):
    """The ⌊density·N⌋ entries of largest magnitude, at least one."""
    keep = max(int(density * matrix.numel() + 1e-9), 1)
    order = matrix.abs().flatten().argsort(descending=True)
    mask = torch.zeros(matrix.numel())
    mask[order[:keep]] = 1
    return matrix * mask.reshape(matrix.shape)


def elect(values):
    """Entry by entry, in plain Python: the sign of the sum, then the mean of the values that have it."""
    out = torch.zeros_like(values[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            entries = [float(value[i, j]) for value in values]
            total = sum(entries)
            agreeing = [e for e in entries if e * total > 0]
            out[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def linear(deltas, weights, density):
    return sum(w * d for d, w in zip(deltas, weights, strict=True))


def average(deltas, weights, density):
    return linear(deltas, weights, density) / sum(weights)


def subtract(deltas, weights, density):
    return linear(deltas, [weights[0], *(-w for w in weights[1:])], density)


def magnitude(deltas, weights, density):
    return sum(w * trim(d, density) for d, w in zip(deltas, weights, strict=True))


def ties(deltas, weights, density):
    return elect([w * trim(d, density) for d, w in zip(deltas, weights, strict=True)])


def knots(deltas, weights, density):
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    real = S / S[0] > 1e-6
    aligned = (S[real, None] * Vh[real]).split(deltas[0].shape[1], dim=1)
    return U[:, real] @ elect([w * trim(V, density) for V, w in zip(aligned, weights, strict=True)])
