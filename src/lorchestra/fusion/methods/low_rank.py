"""Approximations and alignments worked out on the factors alone: no matrix of the size of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.fusion.core_space import CoreSpace
from lorchestra.fusion.methods.exact import acting_members, fused_adapter
from lorchestra.fusion.methods.thinning import elected, magnitude_at, trimmed


@dataclass(frozen=True)
class Fused:
    """A fusion, and how much of what the method makes its factors hold.

    Args:
        adapter: the result.
        retained: share of the squared norm that its rank keeps, over all modules (1: exact).
        per_module: the same for each module; empty if nothing was approximated. 0 where a budget left one out.
    """

    adapter: Adapter
    retained: float = 1.0
    per_module: Mapping[str, float] = field(default_factory=dict)


def compress(
    adapter: Adapter,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Adapter, float]:
    """The best approximation at a lower rank, and the share of ‖ΔW‖² that it kept.

    Args:
        adapter: any.
        rank: at most this rank for every module.
        energy: or the lowest rank that keeps this share of each module's squared norm.
        budget: or at most this many numbers in all factors, shared out by singular value
            (:meth:`lorchestra.fusion.bounds.Bounds.shared_out`).
        dtype: of the arithmetic, float32 or float64.

    Raises:
        UserError: no bound, or a senseless one.
    """
    done = compressed(adapter, rank, energy, budget, dtype)
    return done.adapter, done.retained


def compressed(
    adapter: Adapter,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Fused:
    """:func:`compress`, with what each module kept."""
    done = CoreSpace([adapter], dtype).compress([1.0], rank, energy, budget)
    settings = {**adapter.lineage.settings, **_bounds(rank, energy, budget), "retained": done.retained}
    made = replace(adapter.lineage, settings=settings)
    return Fused(replace(adapter, modules=done.modules, lineage=made), done.retained, done.per_module)


def svd(
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "fused",
) -> Fused:
    """The best approximation of Σ λᵢ·ΔWᵢ within the bounds, by core space.

    Eckart and Young 1936, https://doi.org/10.1007/BF02288367.

    Args:
        members: name → adapter.
        weights: name → λ.
        rank: at most this rank for every module.
        energy: the lowest rank that keeps this share of each module's squared norm.
        budget: at most this many numbers in all factors.
        dtype: of the arithmetic, float32 or float64.
        name: of the result, for its lineage.

    Raises:
        AdapterError, UserError: as :func:`lorchestra.fusion.methods.linear`; no bound, or a senseless one.
    """
    acting = acting_members(members, weights)
    space = CoreSpace([adapter for _, adapter, _ in acting], dtype)
    done = space.compress([weight for *_, weight in acting], rank, energy, budget)
    settings = {**_bounds(rank, energy, budget), "retained": done.retained}
    return Fused(fused_adapter(acting, done.modules, "svd", name, settings), done.retained, done.per_module)


def knots(
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    *,
    density: float = 1.0,
    dtype: torch.dtype = torch.float32,
    name: str = "fused",
) -> Fused:
    """KnOTS-TIES: with [ΔW₁ … ΔW_K] = U S [V₁ᵀ … V_Kᵀ], the S Vᵢᵀ are merged by TIES and multiplied by U.

    Stoica et al. 2024, https://arxiv.org/abs/2410.19735. As there, S stands with V, and an entry of the result is the
    mean of those members' λᵢ·S Vᵢᵀ whose sign is elected. Here each member is trimmed module by module, and signs are
    elected on the weighted values. U ``[m, p]`` and S Vᵢᵀ ``[p, n]`` with p ≤ Σrᵢ come from the factors, so that the
    result has rank p, exactly.

    Args:
        members: name → adapter.
        weights: name → λ. Because of the mean, λ = 1 each is the paper's choice.
        density: share of the entries of each S Vᵢᵀ that are kept, the largest ones.
        dtype: of the arithmetic, float32 or float64.
        name: of the result, for its lineage.

    Raises:
        AdapterError, UserError: as :func:`lorchestra.fusion.methods.linear`; a density outside (0, 1].
    """
    check_density(density)
    acting = acting_members(members, weights)
    modules = {}
    for path in sorted({path for _, adapter, _ in acting for path in adapter.modules}):
        parts = [(adapter.modules[path], weight) for _, adapter, weight in acting if path in adapter.modules]
        U, aligned = _aligned([part for part, _ in parts], dtype)
        kept = [weight * trimmed(V, magnitude_at([V], density)) for V, (_, weight) in zip(aligned, parts, strict=True)]
        modules[path] = LowRank(U.float(), elected(kept).float())
    return Fused(fused_adapter(acting, modules, "knots", name, {"density": density}))


def check_density(density: float) -> None:
    """A density is a share, in (0, 1].

    Raises:
        UserError: it is not.
    """
    if not 0 < density <= 1:
        raise UserError(f"density is the share of entries that are kept, in (0, 1]; got {density}")


def _aligned(parts: list[LowRank], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """U ``[m, p]`` and each member's S Vᵢᵀ ``[p, n]`` of the SVD of [ΔW₁ … ΔW_K], null directions left out."""
    Q, R = torch.linalg.qr(torch.cat([part.B for part in parts], dim=1).to(dtype))
    blocks = [
        triangle @ part.A.to(dtype)
        for triangle, part in zip(R.split([p.rank for p in parts], dim=1), parts, strict=True)
    ]
    gram = sum((block.double() @ block.double().T for block in blocks), torch.zeros(R.shape[0], R.shape[0]).double())
    power, rotation = torch.linalg.eigh(gram)
    real = power > 1e-12 * power[-1].clamp(min=1e-300)
    rotation = rotation[:, real] if bool(real.any()) else rotation[:, -1:]
    rotation = rotation.to(dtype)
    return Q @ rotation, [rotation.T @ block for block in blocks]


def _bounds(rank: int | None, energy: float | None, budget: int | None) -> dict[str, float | None]:
    return {"rank": rank, "energy": energy, **({} if budget is None else {"budget": budget})}
