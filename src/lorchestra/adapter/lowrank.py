"""``LowRank``: one module's update ΔW = B·A, and its algebra.

Axis letters: m = out_features, n = in_features, r = rank. ΔW is always ``[m, n]`` (out, in).
The scale of the LoRA layer (α/r, α/√r, …) is folded into B: a ``LowRank`` has no scale beside itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LowRank:
    """A matrix held by its factors, ΔW = B @ A.

    Args:
        B: ``[m, r]``, float32 by default; carries the scale.
        A: ``[r, n]``, same dtype and device as ``B``.

    Raises:
        AdapterError: the factors are not matrices, or do not fit together.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AdapterError(
                f"low-rank factors must be B [m, r] and A [r, n]; got B {tuple(self.B.shape)}, A {tuple(self.A.shape)}"
            )

    def __repr__(self) -> str:
        m, n = self.shape
        return f"<LowRank {m}×{n}, rank {self.rank}, {str(self.B.dtype).removeprefix('torch.')} on {self.B.device}>"

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """r, the inner dimension: an upper bound of the rank of ΔW."""
        return self.A.shape[0]

    @property
    def parameters(self) -> int:
        """Numbers held: r·(m + n)."""
        return self.B.numel() + self.A.numel()

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW ``[m, n]`` in ``dtype`` (default: the factors' own). For tests and for merging one module at a time."""
        dtype = dtype or self.B.dtype
        return self.B.to(dtype) @ self.A.to(dtype)

    def to(self, *args: object, **kwargs: object) -> LowRank:
        """Both factors moved or cast as ``Tensor.to`` does."""
        return LowRank(self.B.to(*args, **kwargs), self.A.to(*args, **kwargs))  # type: ignore[call-overload]

    def __mul__(self, weight: float) -> LowRank:
        """``weight``·ΔW; the weight goes into B."""
        return LowRank(self.B * weight, self.A)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __add__(self, other: LowRank) -> LowRank:
        """The exact sum, by concatenation: rank r₁ + r₂."""
        return concat([self, other], [1.0, 1.0])

    def inner(self, other: LowRank) -> float:
        """⟨ΔW, ΔW'⟩ = tr((Bᵀ B')(A' Aᵀ)), in float64, without an m×n matrix."""
        _same_shape([self, other])
        B1, A1, B2, A2 = (t.double() for t in (self.B, self.A, other.B, other.A))
        return float(((B1.T @ B2) * (A1 @ A2.T)).sum())

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), in float64."""
        return math.sqrt(max(self.inner(self), 0.0))

    def singular_values(self) -> Tensor:
        """The ``min(r, m, n)`` leading singular values of ΔW ``[k]``, float64, descending."""
        _, R_B = torch.linalg.qr(self.B.double())
        _, R_A = torch.linalg.qr(self.A.double().T)
        values: Tensor = torch.linalg.svdvals(R_B @ R_A.T)
        return values


def concat(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ λᵢ·ΔWᵢ exactly: B̄ = [λ₁B₁ … λ_kB_k] ``[m, Σr]``, Ā = [A₁; …; A_k] ``[Σr, n]``.

    Raises:
        AdapterError: nothing to sum, or the shapes differ.
    """
    if not parts or len(parts) != len(weights):
        raise AdapterError(
            f"a sum needs one weight for each of at least one member; got {len(parts)} and {len(weights)}"
        )
    _same_shape(parts)
    if len(parts) == 1:
        return parts[0] * weights[0]
    return LowRank(
        torch.cat([p.B * w for p, w in zip(parts, weights, strict=True)], dim=1),
        torch.cat([p.A for p in parts], dim=0),
    )


def _same_shape(parts: Sequence[LowRank]) -> None:
    shapes = {p.shape for p in parts}
    if len(shapes) > 1:
        raise AdapterError(f"updates of different shapes cannot be combined: {sorted(shapes)}")
