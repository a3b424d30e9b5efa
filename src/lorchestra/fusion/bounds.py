"""How much of a sum is kept: a rank, a share of its energy, or a number of parameters for all modules together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """Bounds of a low-rank approximation; those that are given hold together.

    Args:
        rank: at most this rank for every module.
        energy: for every module the lowest rank that keeps this share of its ‖ΔW‖², in (0, 1].
        budget: at most this many numbers in the factors of all modules together, shared out by
            :meth:`shared_out`.

    Raises:
        UserError: a rank or budget below 1, an energy that is no share.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"a rank of at least 1 is needed; got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy is a share of the squared norm, in (0, 1]; got {self.energy}")
        if self.budget is not None and self.budget < 1:
            raise UserError(f"a budget is a number of parameters, at least 1; got {self.budget}")

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return (self.rank, self.energy, self.budget) != (None, None, None)

    def within(self, power: Tensor) -> int:
        """The rank that ``rank`` and ``energy`` leave a module with these squared singular values (descending)."""
        most = int(power.numel()) if self.rank is None else min(self.rank, int(power.numel()))
        if self.energy is None or not bool(power.sum() > 0):
            return max(most, 1)
        share = torch.cumsum(power, 0) / power.sum()
        needed = int((share < self.energy * (1 - 1e-12)).sum()) + 1
        return max(min(most, needed), 1)

    def shared_out(self, powers: Mapping[str, Tensor], costs: Mapping[str, int]) -> dict[str, int]:
        """Module → rank under ``budget``, after :meth:`within` for each.

        The components of all modules (σ² > 0) are taken in the order of σ² per parameter, σ²/(m + n), the largest
        first; equal ones by the order of the modules. A component that does not fit into what is left of the budget
        is passed over, with the rest of its module; modules with cheaper components may go on. A module can end with
        rank 0: it is then left out of the result.

        With modules of equal size this is the best choice there is; else it is within one component of the best.

        Args:
            powers: module → squared singular values, descending, float64.
            costs: module → numbers that one rank takes, m + n.

        Raises:
            UserError: the budget is below the cheapest component.
        """
        if self.budget is None:
            return {path: self.within(power) for path, power in powers.items()}
        paths = list(powers)
        value, owner = [], []
        for i, path in enumerate(paths):
            kept = powers[path][: self.within(powers[path])]
            kept = kept[kept > 0]
            value.append(kept / costs[path])
            owner.append(torch.full((kept.numel(),), i))
        order = torch.argsort(torch.cat(value), descending=True, stable=True)
        ranks, left, full = dict.fromkeys(paths, 0), self.budget, set()
        for i in torch.cat(owner)[order].tolist():
            path = paths[i]
            if costs[path] > left:
                full.add(path)
            if path not in full:
                ranks[path] += 1
                left -= costs[path]
        if not any(ranks.values()) and len(order):
            raise UserError(
                f"a budget of {self.budget:,} parameters is too small: one rank of the smallest module takes "
                f"{min(costs[path] for path, power in powers.items() if bool(power[0] > 0)):,}"
            )
        return ranks
