"""A quadratic response surface through what was tried: minimised, tried there, fitted again (Box and Wilson 1951)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorchestra.fusion.search.problem import Array, Problem

RADIUS = 0.5  # first trust radius around the best point, as a share of the box
SMALLEST = 0.01  # below this radius (a share of the box too) the search has converged
FLAT = 1e-6  # ridge on the curvature, so that too few points leave a surface flat instead of wild


@dataclass(frozen=True)
class Surface:
    """f(x) ≈ value + gᵀ(x − centre) + ½ (x − centre)ᵀ H (x − centre).

    Args:
        centre: ``[K]``.
        value: there.
        g: ``[K]``.
        H: ``[K, K]`` symmetric.
    """

    centre: Array
    value: float
    g: Array
    H: Array

    def __call__(self, x: Array) -> float:
        """The surface at ``x``."""
        d = x - self.centre
        return float(self.value + self.g @ d + 0.5 * d @ self.H @ d)

    def lowest(self, low: Array, high: Array) -> Array:
        """The lowest point of the box ``[low, high]`` (from the centre and from the box's corners near it)."""
        from scipy.optimize import minimize

        starts = [self.centre, (low + high) / 2, *(np.where(np.sign(s * self.g) > 0, low, high) for s in (1, -1))]
        found = [
            minimize(
                self,
                np.clip(start, low, high),
                jac=lambda x: self.g + self.H @ (x - self.centre),
                bounds=list(zip(low, high, strict=True)),
                method="L-BFGS-B",
            )
            for start in starts
        ]
        best = min(found, key=lambda result: float(result.fun))
        return np.asarray(best.x, dtype=np.float64)


def fit(points: Array, scores: Array, centre: Array, width: float) -> Surface:
    """Least squares over the tried points, which weigh the less the farther (beside ``width``) and the worse they are.

    Args:
        points: ``[n, K]``.
        scores: ``[n]``.
        centre: ``[K]`` the best point; the surface goes through it.
        width: of a Gaussian weight in ``points``' units.
    """
    K = points.shape[1]
    at = points - centre
    here = int(np.argmin((at**2).sum(axis=1)))
    rows, columns = np.triu_indices(K)
    pairs = at[:, rows] * at[:, columns] * np.where(rows == columns, 0.5, 1.0)
    features = np.hstack([at, pairs])
    spread = max(float(np.median(scores) - scores.min()), 1e-12)
    weight = np.exp(-0.25 * (at**2).sum(axis=1) / width**2) / (1.0 + (scores - scores[here]).clip(0) / spread)
    ridge = np.sqrt(FLAT * spread) * np.eye(features.shape[1])
    ridge[:K] = 0.0
    left = np.vstack([features * weight[:, None], ridge])
    right = np.concatenate([(scores - scores[here]) * weight, np.zeros(features.shape[1])])
    solved = np.linalg.lstsq(left, right, rcond=None)[0]
    H = np.zeros((K, K))
    H[rows, columns] = H[columns, rows] = solved[K:]
    return Surface(centre, float(scores[here]), solved[:K], H)


def surrogate(problem: Problem) -> None:
    """Fit, minimise within the trust region, try, fit again: until the region has shrunk or the budget is spent.

    Where the minimum has been tried already, or was no improvement while the region holds fewer points than a quadratic
    has coefficients, a point drawn in the region is tried instead. The region shrinks when nothing improves.
    """
    box, K = problem.space.high - problem.space.low, problem.K
    radius, wanting = RADIUS * box, False
    generator = np.random.default_rng(problem.seed)
    while radius > SMALLEST * box:
        centre = problem.inside(problem.best)
        points, scores = problem.tried()
        if not len(points):  # everything finite lies outside the box
            return
        low, high = problem.inside(centre - radius), problem.inside(centre + radius)
        surface = fit(points, scores, centre, radius)
        target = surface.lowest(low, high)
        if wanting or np.abs(points - target).max(axis=1).min() < SMALLEST * box / 2:
            target = generator.uniform(low, high)
        before = float(scores.min())
        (score,) = problem.scores([target], "surrogate")
        expected = before - surface(target)
        near = (np.abs(points - centre).max(axis=1) <= radius).sum()
        wanting = score >= before and near < (K + 1) * (K + 2) // 2
        if score < before:
            if before - score > 0.75 * expected and np.abs(target - centre).max() > 0.9 * radius:
                radius = min(radius * 1.5, RADIUS * box)
        elif not wanting:
            radius /= 2
