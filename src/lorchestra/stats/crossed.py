"""Means over runs and items that are crossed: the same test items, scored after training with several seeds.

Neither the seeds nor the items are all there are, so both are resampled, each as a whole (Owen 2007, "The pigeonhole
bootstrap", arXiv 0712.1111): the interval covers another seed as well as another test set, and errs on the wide side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lorchestra.stats.intervals import Interval, group_index, interval_of, resample

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
    by_group = [np.stack([np.bincount(index, row, count) for row in table]) for table in (top, bottom)]  # [S, G]
    items = resample(count, seed=ITEMS)
    runs = resample(top.shape[0], seed=RUNS)
    sums = [np.einsum("bs,sg,bg->b", runs, table, items, optimize=True) for table in by_group]
    return interval_of(sums[0] / sums[1], count)
