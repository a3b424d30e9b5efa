"""Core space: factor a set of adapters once, then any coefficients cost an R×R SVD per module.

For the stacked factors of all members, B̄ = Q_B R_B and Āᵀ = Q_A R_A. For each λ the SVD of the core
R_B·diag(λ)·R_Aᵀ = U S Vᵀ gives the best rank-r approximation of Σλᵢ·BᵢAᵢ (Eckart–Young), the same as an SVD of the
dense sum: Q_B U and Q_A V are its singular vectors. Q_B and Q_A are never formed. The left factor is
B̄·(λ R_Aᵀ V S⁻¹), the right one (S⁻¹ Uᵀ R_B λ)·Ā, so that only the R×R triangles are kept beside the adapters.
O((m + n)R² + R³) time; no m×n matrix.

Two ways to the R's, one module and one block of rows at a time, so that memory is bounded by a module:

- float32 (the default): R from the Gram matrix B̄ᵀB̄, summed in float64 with columns scaled to length 1. Squaring costs
  half of float64's digits, which leaves those of float32; it is a matrix product, many times as fast as a Householder
  QR of a tall matrix.
- float64: a blocked Householder QR, R ← qr([R; block]).

A side with R ≥ m (or n) needs no factorisation: Q = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, UserError
from lorchestra.fusion.bounds import Bounds
from lorchestra.fusion.workers import one_thread_each

# Numbers of a factor that are worked on at a time: as many as stay in a processor's cache.
_BLOCK = 1 << 17
# Triangles of larger R are worked out again at each use: that costs no more than the SVD of their core.
_KEPT = 512


@dataclass(frozen=True)
class Compressed:
    """Updates at a lower rank, and how much of the squared norm they kept, overall and per module (1 = all).

    A module that a budget gave no rank is missing in ``modules`` and 0 in ``per_module``.
    """

    modules: Mapping[str, LowRank]
    retained: float
    per_module: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class _Module:
    """One module's members: their updates, and ``owner [R]`` → index of the member that a column belongs to."""

    parts: tuple[LowRank, ...]
    owner: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def columns(self) -> Iterator[tuple[LowRank, slice]]:
        """Each member's update with its place among the R columns."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.rank)
            start += part.rank


class CoreSpace:
    """Adapters, factored together.

    Args:
        adapters: at least one; modules and ranks may differ. They are kept, not copied.
        dtype: of the arithmetic: float32 (relative accuracy about 1e-6 of Σ|λᵢ|·‖ΔWᵢ‖) or float64.

    Raises:
        AdapterError: members whose shapes differ.
        UserError: no adapters, or another dtype.
    """

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype = torch.float32) -> None:
        if not adapters:
            raise UserError("a core space needs at least one adapter")
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"a core space computes in float32 or float64; got {dtype}")
        self.members = len(adapters)
        self.dtype = dtype
        self._modules: dict[str, _Module] = {}
        self._triangles: dict[str, tuple[Tensor, Tensor]] = {}
        for path in sorted({path for adapter in adapters for path in adapter.modules}):
            parts = [(i, adapter.modules[path]) for i, adapter in enumerate(adapters) if path in adapter.modules]
            shapes = sorted({part.shape for _, part in parts})
            if len(shapes) > 1:
                raise AdapterError(
                    f"module {path!r}: updates of different shapes cannot be combined: {shapes}; the members belong "
                    "to different bases"
                )
            owner = torch.cat([torch.full((part.rank,), i) for i, part in parts])
            self._modules[path] = _Module(tuple(part for _, part in parts), owner)

    def spectra(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """Module → singular values of Σλᵢ·ΔWᵢ, descending, float64; those below the arithmetic's noise are 0.

        Raises:
            UserError: not one finite weight per member.
        """
        lambdas = self._weights(weights)
        with one_thread_each("core space") as pool:
            found = pool.map(lambda path: self._decomposed(path, lambdas, vectors=False)[1], self._modules)
            return dict(zip(self._modules, found, strict=True))

    def compress(
        self,
        weights: Sequence[float],
        rank: int | None = None,
        energy: float | None = None,
        budget: int | None = None,
    ) -> Compressed:
        """Σλᵢ·ΔWᵢ at a lower rank, factors in float32 and balanced (‖B‖ = ‖A‖ column by column).

        Args:
            weights: one λ per member; negative and zero are allowed.
            rank: at most this rank for every module.
            energy: the lowest rank that keeps this share of each module's squared norm.
            budget: at most this many numbers in all factors, shared out by singular value
                (:meth:`lorchestra.fusion.bounds.Bounds.shared_out`).

        Raises:
            UserError: no bound or a senseless one, or not one finite weight per member.
        """
        lambdas = self._weights(weights)
        bounds = Bounds(rank, energy, budget)
        if not bounds.given:
            raise UserError("compression needs a rank of at least 1 or an energy in (0, 1] or a budget; got none")
        ranks: dict[str, int] | None = None
        if budget is not None:
            powers = {path: values.square() for path, values in self.spectra(weights).items()}
            ranks = bounds.shared_out(powers, {path: sum(part.shape) for path, part in self._modules.items()})
        modules, kept, total, shares = {}, 0.0, 0.0, {}

        def approximated(path: str) -> tuple[LowRank | None, float, float]:
            """The module at its rank, ‖kept‖² and ‖ΔW‖²."""
            U, S, Vh = self._decomposed(path, lambdas)
            power = S.square()
            r = bounds.within(power) if ranks is None else ranks[path]
            made = self._lifted(path, lambdas, U[:, :r], S[:r], Vh[:r]) if r else None
            return made, float(power[:r].sum()), float(power.sum())

        with one_thread_each("core space") as pool:
            for path, (made, here, whole) in zip(self._modules, pool.map(approximated, self._modules), strict=True):
                if made is not None:
                    modules[path] = made
                kept, total = kept + here, total + whole
                shares[path] = here / whole if whole > 0 else 1.0
        if not modules:
            raise UserError("this sum is zero everywhere: there is nothing to share the budget out to")
        return Compressed(modules, kept / total if total > 0 else 1.0, shares)

    def _weights(self, weights: Sequence[float]) -> Tensor:
        if len(weights) != self.members:
            raise UserError(f"{self.members} members need as many weights; got {len(weights)}")
        bad = [weight for weight in weights if not math.isfinite(weight)]
        if bad:
            raise UserError(f"weights must be finite numbers; got {bad[0]}")
        return torch.tensor([float(weight) for weight in weights], dtype=torch.float64)

    def _decomposed(self, path: str, lambdas: Tensor, vectors: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """U ``[p, k]``, S ``[k]`` and Vᵀ ``[k, q]`` of the core, float64, S below the noise set to 0."""
        R_B, R_A = self._factored(path)
        scale = lambdas[self._modules[path].owner]
        core = (R_B * scale) @ R_A.T
        if vectors:
            U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        else:
            U, S, Vh = core, torch.linalg.svdvals(core), core
        size = float((R_B.norm(dim=0) * scale.abs() * R_A.norm(dim=0)).norm())
        noise = 2 * torch.finfo(self.dtype).eps * size
        return U, torch.where(noise < S, S, 0.0), Vh

    def _lifted(self, path: str, lambdas: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> LowRank:
        """Q_B U √S ``[m, r]`` and √S Vᵀ Q_Aᵀ ``[r, n]`` from the members' own factors; components with S = 0 go."""
        module = self._modules[path]
        (m, n), r = module.shape, int((S > 0).sum())
        if r == 0:
            return LowRank(torch.zeros(m, 1), torch.zeros(1, n))
        R_B, R_A = self._factored(path)
        scale = lambdas[module.owner][:, None]
        root = S[:r].sqrt()
        to_B = (scale * (R_A.T @ Vh[:r].T) / root).to(self.dtype)
        to_A = (scale * (R_B.T @ U[:, :r]) / root).to(self.dtype)
        B = torch.zeros(m, r, dtype=self.dtype)
        A = torch.zeros(r, n, dtype=self.dtype)
        for part, columns in module.columns():
            B.addmm_(part.B.to(self.dtype), to_B[columns])
            A.addmm_(to_A[columns].T, part.A.to(self.dtype))
        return LowRank(B.float(), A.float())

    def _factored(self, path: str) -> tuple[Tensor, Tensor]:
        """R_B ``[p, R]`` and R_A ``[q, R]``, float64."""
        if path in self._triangles:
            return self._triangles[path]
        module = self._modules[path]
        R = int(module.owner.numel())
        found = (
            _triangle([part.B for part in module.parts], R, self.dtype),
            _triangle([part.A.T for part in module.parts], R, self.dtype),
        )
        if R <= _KEPT:
            self._triangles[path] = found
        return found


def _triangle(factors: Sequence[Tensor], R: int, dtype: torch.dtype) -> Tensor:
    """``[p, R]`` float64 with the Gram matrix of the stacked ``factors`` (``[rows, rᵢ]`` each): R of their QR."""
    rows = factors[0].shape[0]
    if rows <= R:
        return torch.cat(list(factors), dim=1).double()
    step = max(_BLOCK // R, R)
    blocks = (torch.cat([factor[i : i + step] for factor in factors], dim=1).double() for i in range(0, rows, step))
    if dtype == torch.float64:
        triangle: Tensor = torch.zeros(0, R, dtype=torch.float64)
        for block in blocks:
            triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
        return triangle
    gram = torch.zeros(R, R, dtype=torch.float64)
    for block in blocks:
        gram.addmm_(block.T, block)
    length = gram.diagonal().sqrt()
    length = torch.where(length > 0, length, 1.0)
    values, vectors = torch.linalg.eigh(gram / length / length[:, None])
    return torch.mul(values.clamp(min=0).sqrt()[:, None], vectors.T * length)
