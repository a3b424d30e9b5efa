"""Means over runs and items that are crossed: the same test items, scored after training with several seeds.

Neither the seeds nor the items are all there are, so both are resampled, each as a whole (Owen 2007, "The pigeonhole
bootstrap", arXiv 0712.1111): the interval covers another seed as well as another test set. Resamples of three seeds
never leave the range of the three, so the interval is expanded as for the degrees of freedom that seeds and items
have together (Satterthwaite 1946): where seeds hardly matter it is that of the items, where they decide it is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from lorchestra.stats.intervals import Array, Interval, group_index, interval_of, resample

ITEMS, RUNS = 0, 1  # seeds of the two resamplings


def crossed_ratio(
    numerators: ArrayLike, denominators: ArrayLike | None = None, groups: Sequence[object] | None = None
) -> Interval:
    """Σ numerators / Σ denominators over runs and items; without denominators the mean.

    Args:
        numerators: ``[S, n]`` of S runs on the same n items; differences of two settings' runs are paired by run
            and item.
        denominators: ``[S, n]``, positive in sum.
        groups: ``[n]`` what each item belongs to.

    Returns:
        An interval whose ``n`` is the number of groups. With one run it covers the items alone.

    Raises:
        ValueError: no runs or items, shapes that differ, or values that are not finite.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if top.ndim != 2 or not top.size or top.shape != bottom.shape:
        raise ValueError(f"expected two tables [runs, items] of one shape; got {top.shape} and {bottom.shape}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("an interval needs finite values; there is NaN or infinity among them")
    index = group_index(groups, top.shape[1])
    count = int(index.max()) + 1
    tops, bottoms = (np.stack([np.bincount(index, row, count) for row in table]) for table in (top, bottom))  # [S, G]
    items = resample(count, seed=ITEMS)
    runs = resample(top.shape[0], seed=RUNS)
    sums = [np.einsum("bs,sg,bg->b", runs, table, items, optimize=True) for table in (tops, bottoms)]
    draws = sums[0] / sums[1]
    return replace(interval_of(draws, _effective(tops - draws[0] * bottoms)), n=count)


def _effective(residuals: Array) -> int:
    """Independent values that the mean of ``residuals`` ``[S, G]`` rests on: G if runs do not matter, S if they alone
    do, and what Satterthwaite says between these."""
    S, G = len(residuals), int(residuals.shape[1])
    if S == 1 or G == 1:
        return G
    by_item, by_run = residuals.mean(axis=0), residuals.mean(axis=1)
    both = residuals - by_item - by_run[:, None] + residuals.mean()
    noise = float((both**2).sum()) / ((S - 1) * (G - 1))  # of neither: a part of the variance between runs is this
    of_items = float(by_item.var(ddof=1)) / G
    of_runs = max(float(by_run.var(ddof=1)) / S - noise / (S * G), 0.0)
    if of_items + of_runs == 0:
        return G
    freedom = (of_items + of_runs) ** 2 / (of_items**2 / (G - 1) + of_runs**2 / (S - 1))
    return min(max(round(freedom) + 1, 2), G)
