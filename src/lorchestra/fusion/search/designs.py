"""Strategies whose points are known beforehand: the simplex grid, the article's rules, a spread over the simplex."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from lorchestra.errors import UserError
from lorchestra.fusion.search.candidates import HEURISTICS, Candidate, heuristic, stack_of
from lorchestra.fusion.search.problem import Problem

# Total scales of the drawn points: from half an average (Σλ = 1) to 1.25 times the largest stack (near Σλ = K).
LEAST, MOST = 0.5, 1.25


def simplex_grid(K: int, step: float) -> Iterator[tuple[float, ...]]:
    """All points of the simplex Σλ = 1 whose coefficients are multiples of ``step``: C(1/step + K − 1, K − 1) of them.

    Raises:
        UserError: 1 is no multiple of ``step``.
    """
    n = round(1 / step) if step > 0 else 0
    if n < 1 or abs(n * step - 1) > 1e-6:
        raise UserError(f"a simplex grid with steps of {step:g} does not reach 1; take 0.1, 0.05, 0.25, …")

    def compositions(left: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (left,)
            return
        for first in range(left, -1, -1):
            for rest in compositions(left - first, parts - 1):
                yield (first, *rest)

    for counts in compositions(n, K):
        yield tuple(count / n for count in counts)


def grid_size(K: int, step: float, totals: int = 1) -> int:
    """Points of the grids of all totals together."""
    return totals * math.comb(round(1 / step) + K - 1, K - 1)


def grid(problem: Problem) -> None:
    """The simplex grid at every total scale."""
    space = problem.space
    points = [
        tuple(total * x for x in point) for total in space.totals for point in simplex_grid(problem.K, space.step)
    ]
    problem.scores(points, "grid")


def heuristics(problem: Problem) -> None:
    """The article's rules of thumb; ``last`` only where the last member's whole context is among the members."""
    members = problem.space.members
    whole = stack_of(list(members)[-1], members) is not None
    for name in HEURISTICS:
        if name != "last" or whole:
            weights = problem.space.spread(heuristic(name, members))
            problem.run.scores([Candidate(weights, f"heuristic {name}")])  # unrounded: `equal` is the uniform point


def sobol(problem: Problem) -> None:
    """Total scale × simplex: directions from a scrambled Sobol sequence (Sobol 1967, Owen 1998)."""
    points = spread(problem.K, problem.run.left, problem.most, problem.seed)
    problem.scores(points, "sobol")


def spread(K: int, count: int, most: float, seed: int) -> list[list[float]]:
    """``count`` points in all directions of the simplex, with Σλ from 0.5 to 1.25 · ``most``."""
    if count <= 0:
        return []
    from scipy.stats import qmc

    size = 1 << max(count - 1, 0).bit_length()
    unit = qmc.Sobol(K + 1, seed=seed).random(size)[:count]
    shares = -np.log(np.clip(unit[:, :K], 1e-9, 1 - 1e-9))
    shares /= shares.sum(axis=1, keepdims=True)
    totals = LEAST + (MOST * most - LEAST) * unit[:, K]
    return [[float(v) for v in row] for row in shares * totals[:, None]]
