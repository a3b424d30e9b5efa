"""Group-wise folds: no group is parted, every domain is spread over the folds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def group_folds(present: NDArray[np.bool_], folds: int, repeats: int = 1, seed: int = 0) -> NDArray[np.int64]:
    """Deal groups to folds at random, anew in every repeat, so that each domain has about as many in every fold.

    Args:
        present: ``[D, G]`` whether domain d has items of group g. A group in several domains is in one fold.
        folds: K, at least 2, and at most the groups of the smallest domain.
        repeats: how often.
        seed: of the dealing.

    Returns:
        ``[repeats, G]`` number of each group's fold, from 0.

    Raises:
        ValueError: K out of range, or a group that is in no domain.
    """
    sizes = present.sum(axis=1)
    if not 2 <= folds <= sizes.min():
        raise ValueError(f"the smallest domain has {sizes.min()} groups; they make 2 to that many folds, not {folds}")
    if not present.any(axis=0).all():
        raise ValueError("every group must be in a domain")
    rarest_first = np.argsort(sizes, kind="stable")
    return np.stack([_dealt(present[rarest_first], folds, np.random.default_rng([seed, r])) for r in range(repeats)])


def _dealt(present: NDArray[np.bool_], folds: int, chance: np.random.Generator) -> NDArray[np.int64]:
    count = present.shape[1]
    held = np.zeros((folds, present.shape[0]), dtype=np.int64)  # groups of each domain in each fold
    fold = np.empty(count, dtype=np.int64)
    shuffled = chance.permutation(count)
    # Those in many domains first, while there is still a choice; each to the fold that has fewest like it.
    for group in shuffled[np.argsort(-present[:, shuffled].sum(axis=0), kind="stable")]:
        domains = np.flatnonzero(present[:, group])
        keys = [(*held[k, domains], held[k].sum(), chance.random()) for k in range(folds)]
        fold[group] = min(range(folds), key=keys.__getitem__)
        held[fold[group], domains] += 1
    return fold
