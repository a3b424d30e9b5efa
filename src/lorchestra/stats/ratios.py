"""Ratios of sums for many candidates on the same items, and what every group contributes to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RatioTable:
    """Σ numerators / Σ denominators of C candidates in D domains; the items of a group are summed up.

    Args:
        tops: ``[D, C, G]`` numerators; 0 where a domain has no items of a group.
        bottoms: ``[D, G]`` denominators, the same for all candidates.
        present: ``[D, G]`` whether a domain has items of a group.
    """

    tops: Array
    bottoms: Array
    present: NDArray[np.bool_]

    def over(self, kept: NDArray[np.bool_]) -> RatioTable:
        """The same on the groups ``kept [G]`` alone."""
        return RatioTable(self.tops[:, :, kept], self.bottoms[:, kept], self.present[:, kept])

    @property
    def groups(self) -> int:
        """Groups of the smallest domain: what a claim about all domains rests on."""
        return int(self.present.sum(axis=1).min())

    def ratios(self) -> Array:
        """``[D, C]``; 1 for all where a domain has nothing here (no reason to prefer any)."""
        total = self.bottoms.sum(axis=1)[:, None]
        return np.asarray(np.divide(self.tops.sum(axis=2), total, out=np.ones(self.tops.shape[:2]), where=total > 0))

    def influence(self) -> Array:
        """``[D, C, G]`` how far each group moves each ratio from its mean: (top − ratio · bottom) / Σ bottom.

        Their squares' sum is the variance of the ratio (linearisation; Cochran 1977, *Sampling Techniques*, §6.4), so
        those of a difference of candidates give its *paired* variance. It is what the spread of the scores of random
        group-wise folds comes to as the folds are drawn anew again and again, without the chance in drawing them.
        """
        total = np.maximum(self.bottoms.sum(axis=1), np.finfo(np.float64).tiny)
        moved = self.tops - self.ratios()[:, :, None] * self.bottoms[:, None, :]
        return np.asarray(moved / total[:, None, None])


def standard_error(influence: Array, n: int) -> Array:
    """``[...]`` from influences ``[..., G]`` of ``n`` groups; unknown (infinite) of fewer than two."""
    if n < 2:
        return np.full(influence.shape[:-1], np.inf)
    return np.asarray(np.sqrt(n / (n - 1) * (influence**2).sum(axis=-1)))
