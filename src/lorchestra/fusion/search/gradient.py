"""Gradients: λ are K numbers, so L-BFGS finds the nearest minimum in a few forward and backward passes."""

from __future__ import annotations

import numpy as np

from lorchestra.fusion.search.problem import Array, Problem, Run, Space, Spent

FIRST = 0.25  # length of the first step in λ; the curvature decides from then on
CONFIRM = 1  # passes kept back to score the point that was found


def gradient(problem: Problem) -> None:
    """L-BFGS-B (Byrd et al. 1995) from the best fixed point; where it arrives is confirmed by a forward score.

    Each arrival that leaves budget is followed by a descent from the next best start.
    """
    points, scores = problem.tried()
    for k in np.argsort(scores, kind="stable"):
        if not descend(problem, points[k], "gradient"):
            return


def refine(space: Space, run: Run, seed: int) -> None:
    """λ of every part (layer group), from the best common λ of each member, towards which they are drawn."""
    problem = Problem(space, run, seed, [(part,) for name in space.members for part in space.parts_of(name)])
    common = Problem(space, run, seed)
    owners = [k for k, name in enumerate(space.members) for _ in space.parts_of(name)]
    descend(problem, problem.inside(common.best[owners]), "layer groups", centre=common.best[owners])


def descend(problem: Problem, start: Array, origin: str, centre: Array | None = None) -> bool:
    """One descent from ``start``, and its end scored; false if the budget ended it.

    Args:
        problem: see :class:`Problem`.
        start: ``[K]``.
        origin: of the point found.
        centre: ``[K]`` the loss is joined by shrinkage · mean((λ − centre)²).
    """
    from scipy.optimize import minimize

    seen: list[tuple[float, Array]] = []

    def evaluate(u: Array) -> tuple[float, Array]:
        point = problem.inside(start + FIRST * u)
        if problem.run.left < CONFIRM:
            raise Spent
        problem.run.left -= CONFIRM
        try:
            value, slope = problem.slope(point)
        finally:
            problem.run.left += CONFIRM
        if centre is not None:
            away = point - centre
            value += problem.space.shrinkage * float((away**2).mean())
            slope = slope + problem.space.shrinkage * 2 * away / away.size
        seen.append((value, point))
        return value, FIRST * slope

    low, high = ((edge - start) / FIRST for edge in (problem.space.low, problem.space.high))
    whole = True
    try:
        minimize(
            evaluate,
            np.zeros(problem.K),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"ftol": 1e-4, "gtol": 1e-3, "maxls": 10},
        )
    except Spent:
        whole = False
    if seen:
        best = min(seen, key=lambda pair: pair[0])[1]
        problem.scores([best], origin)
    return whole
