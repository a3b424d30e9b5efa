"""Gradients: λ are K numbers, and one forward and backward pass gives the loss and all K derivatives.

A trust region with a quadratic model: its gradient is the slope, its curvature starts as that of the response surface
through the scores so far and learns from every slope by the symmetric rank-one formula (Conn, Gould and Toint 1991,
doi 10.1007/BF01594934; Nocedal and Wright, *Numerical Optimization*, §6.2), which a box does not disturb.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lorchestra.fusion.search.problem import SLOPE, Array, Problem, Run, Space, Spent
from lorchestra.fusion.search.surrogate import Surface, fit

LEAP = 0.25  # how far the response surface may lead, as a share of the box
RADIUS = 0.2  # first trust radius, as a share of the box
SMALLEST = 0.005  # below this radius (a share of the box too) the descent has arrived
GAIN = 2e-4  # it has too when the model promises less than this share of the loss


def gradient(problem: Problem) -> None:
    """Descend from the best point so far; while budget is left, from the next best of them that lies elsewhere."""
    lead(problem)
    points, scores = problem.tried()
    box = problem.space.high - problem.space.low
    ends: list[Array] = []
    for k in np.argsort(scores, kind="stable"):
        if all(np.abs(points[k] - end).max() > RADIUS / 2 * box for end in ends):
            curvature = fit(*problem.tried(), points[k], RADIUS * box).H
            ends.append(descend(problem, points[k], curvature, "gradient"))


def lead(problem: Problem) -> None:
    """Try the minimum of the response surface near the best point: it costs one pass, a slope two.

    Only where the points so far determine a surface: few members, or many stacks.
    """
    points, scores = problem.tried()
    if scores.size >= problem.K * (problem.K + 3) // 2:
        reach = LEAP * (problem.space.high - problem.space.low)
        centre = problem.inside(problem.best)
        low, high = problem.inside(centre - reach), problem.inside(centre + reach)
        problem.scores([fit(points, scores, centre, reach).lowest(low, high)], "surrogate")


def refine(space: Space, run: Run, seed: int) -> None:
    """λ of every part (layer group), from the best common λ of each member, towards which they are drawn.

    The curvature begins as if every group had an equal share of the common one, and none between groups.
    """
    common = Problem(space, run, seed)
    parts = [part for name in space.members for part in space.parts_of(name)]
    problem = Problem(space, run, seed, [(part,) for part in parts])
    owner = [k for k, name in enumerate(space.members) for _ in space.parts_of(name)]
    group = [part.partition(":")[2] for part in parts]
    start = common.inside(common.best)
    box = space.high - space.low
    H = fit(*common.tried(), start, RADIUS * box).H
    same = np.array([[a == b for b in group] for a in group])
    curvature = np.where(same, H[np.ix_(owner, owner)] / len(set(group)), 0.0)
    centre, strength = start[owner], space.shrinkage / len(parts)

    def drawn(point: Array) -> tuple[float, Array]:
        away = point - centre
        return strength * float(away @ away), 2 * strength * away

    descend(problem, centre, curvature + 2 * strength * np.eye(len(parts)), "layer groups", drawn)


def descend(
    problem: Problem,
    start: Array,
    curvature: Array,
    origin: str,
    penalty: Callable[[Array], tuple[float, Array]] = lambda point: (0.0, np.zeros_like(point)),
) -> Array:
    """One descent; where it arrives is confirmed by a forward score, for which a pass is kept back.

    Args:
        problem: see :class:`Problem`.
        start: ``[K]``.
        curvature: ``[K, K]`` first guess.
        origin: of the point found.
        penalty: point → a number that joins the loss, and its gradient.

    Raises:
        Spent: the budget did not reach for a slope.
    """
    box = problem.space.high - problem.space.low

    def slope(point: Array) -> tuple[float, Array]:
        if problem.run.left < SLOPE + 1:
            raise Spent
        value, gradient = problem.slope(point)
        more, slant = penalty(point)
        return value + more, gradient + slant

    x, H, radius = start, curvature, RADIUS * box
    f, g = slope(x)
    if not (np.isfinite(f) and np.isfinite(g).all()):  # nothing leads on from here
        return x
    spent = False
    while radius > SMALLEST * box:
        model = Surface(x, f, g, H)
        target = np.round(model.lowest(problem.inside(x - radius), problem.inside(x + radius)), 4)
        promised = f - model(target)
        if promised <= GAIN * abs(f):
            break
        try:
            f1, g1 = slope(target)
        except Spent:
            spent = True
            break
        if not (np.isfinite(f1) and np.isfinite(g1).all()):
            radius = 0.5 * min(radius, float(np.abs(target - x).max()))
            continue
        s, missed = target - x, g1 - g - H @ (target - x)
        if abs(s @ missed) > 1e-8 * float(np.linalg.norm(s) * np.linalg.norm(missed)):
            H = H + np.outer(missed, missed) / (s @ missed)
        if f - f1 < 0.25 * promised:
            radius = 0.5 * min(radius, float(np.abs(s).max()))
        elif f - f1 > 0.75 * promised and float(np.abs(s).max()) > 0.8 * radius:
            radius = min(2 * radius, box)
        if f1 < f:
            x, f, g = target, f1, g1
    if not np.array_equal(x, start):
        problem.scores([x], origin)
    if spent:
        raise Spent
    return x
