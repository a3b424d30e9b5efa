"""Core space: factor a set of adapters once, then any coefficients cost an R×R SVD per module.

B̄ = Q_B R_B and Āᵀ = Q_A R_A for the stacked factors of all members; for each λ the SVD of R_B·diag(λ)·R_Aᵀ gives
the best rank-r approximation of Σλᵢ·BᵢAᵢ (Eckart–Young), the same as an SVD of the dense sum.
O((m + n)R² + R³) time, O((m + n)R) memory; no m×n matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank, concat
from lorchestra.errors import UserError


@dataclass(frozen=True)
class Compressed:
    """Updates at a lower rank, and how much of the squared norm they kept, overall and per module (1 = all)."""

    modules: Mapping[str, LowRank]
    retained: float
    per_module: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class _Core:
    """One module: ``Q_B [m, p]``, ``Q_A [n, q]``, ``R_B [p, R]``, ``R_A [q, R]``, ``owner [R]`` → member."""

    Q_B: Tensor
    Q_A: Tensor
    R_B: Tensor
    R_A: Tensor
    owner: Tensor


class CoreSpace:
    """Adapters, factored together.

    Args:
        adapters: at least one; modules may differ.
        dtype: of the arithmetic.

    Raises:
        AdapterError: members whose shapes differ.
        UserError: no adapters.
    """

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype = torch.float32) -> None:
        if not adapters:
            raise UserError("a core space needs at least one adapter")
        self.members = len(adapters)
        self._cores: dict[str, _Core] = {}
        for path in sorted({path for adapter in adapters for path in adapter.modules}):
            parts = [(i, adapter.modules[path]) for i, adapter in enumerate(adapters) if path in adapter.modules]
            stacked = concat([part for _, part in parts], [1.0] * len(parts))
            Q_B, R_B = torch.linalg.qr(stacked.B.to(dtype))
            Q_A, R_A = torch.linalg.qr(stacked.A.to(dtype).T)
            owner = torch.cat([torch.full((part.rank,), i) for i, part in parts])
            self._cores[path] = _Core(Q_B, Q_A, R_B, R_A, owner)

    def compress(self, weights: Sequence[float], rank: int | None = None, energy: float | None = None) -> Compressed:
        """Σλᵢ·ΔWᵢ at a lower rank.

        Args:
            weights: one λ per member; negative and zero are allowed.
            rank: at most this rank for every module.
            energy: keep at least this share of each module's squared norm, at the lowest rank that does.

        Raises:
            UserError: neither or a senseless bound, or not one weight per member.
        """
        if len(weights) != self.members:
            raise UserError(f"{self.members} members need as many weights; got {len(weights)}")
        if (rank is None and energy is None) or (rank is not None and rank < 1):
            raise UserError(f"compression needs a rank of at least 1 or an energy in (0, 1]; got {rank}, {energy}")
        if energy is not None and not 0 < energy <= 1:
            raise UserError(f"energy is a share of the squared norm, in (0, 1]; got {energy}")
        modules, kept, total, shares = {}, 0.0, 0.0, {}
        for path, core in self._cores.items():
            scale = torch.tensor(list(weights), dtype=core.R_B.dtype)[core.owner]
            U, S, Vh = torch.linalg.svd((core.R_B * scale) @ core.R_A.T, full_matrices=False)
            power = S.double().square()
            r = min(_rank(power, rank, energy), S.numel())
            root = S[:r].sqrt()
            modules[path] = LowRank(
                (core.Q_B @ (U[:, :r] * root)).float(), ((root[:, None] * Vh[:r]) @ core.Q_A.T).float()
            )
            here, whole = float(power[:r].sum()), float(power.sum())
            kept, total = kept + here, total + whole
            shares[path] = here / whole if whole > 0 else 1.0
        return Compressed(modules, kept / total if total > 0 else 1.0, shares)


def _rank(power: Tensor, rank: int | None, energy: float | None) -> int:
    most = int(power.numel()) if rank is None else rank
    if energy is None or not bool(power.sum() > 0):
        return max(most, 1)
    share = torch.cumsum(power, 0) / power.sum()
    needed = int((share < energy * (1 - 1e-12)).sum()) + 1
    return max(min(most, needed), 1)
