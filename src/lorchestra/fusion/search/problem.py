"""What a strategy works on: points in a box, scored through a callback within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorchestra.adapter.adapter import Adapter
from lorchestra.fusion.search.candidates import Candidate, Weights, candidates, largest_total, weights_key

Array = NDArray[np.float64]
DIGITS = 4  # decimals of a proposed coefficient; a loss does not see finer ones
SLOPE = 2  # what a gradient costs, in forward passes over λ-validation: backward goes through activations alone


class Objective(Protocol):
    """The loss on λ-validation, lower is better. It may remember: equal points are equal questions."""

    def values(self, points: Sequence[Weights]) -> Iterable[float]:
        """The loss at every point, as they come; one that is not finite never wins."""

    def slope(self, point: Weights) -> tuple[float, Weights]:
        """The loss at ``point``, and its derivative by every coefficient."""


class Spent(Exception):  # noqa: N818  (no error: the search is over)
    """The budget is used up."""


@dataclass(frozen=True)
class Space:
    """Where to search.

    Args:
        members: name → adapter, in training order.
        parts: member → the names its parts have in the objective (its layer groups); by default itself.
        low: of every coefficient; negative to allow for subtraction.
        high: of every coefficient.
        step: of the simplex grid.
        totals: Σλ of the grid's simplices.
        shrinkage: what it costs a part to leave its member's common λ, in units of the loss.
    """

    members: Mapping[str, Adapter]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    low: float = 0.0
    high: float = 2.0
    step: float = 0.1
    totals: tuple[float, ...] = (1.0,)
    shrinkage: float = 0.1

    def parts_of(self, member: str) -> tuple[str, ...]:
        """The names that carry ``member``."""
        return tuple(self.parts.get(member, (member,)))

    @property
    def divided(self) -> bool:
        """Whether some member has several parts."""
        return any(len(self.parts_of(member)) > 1 for member in self.members)

    def spread(self, weights: Weights) -> dict[str, float]:
        """Coefficients of members → of their parts."""
        return {part: float(weights[name]) for name in self.members for part in self.parts_of(name)}

    def fixed(self) -> list[Candidate]:
        """The points that are always tried first."""
        return [Candidate(self.spread(point.weights), point.origin) for point in candidates(self.members)]


class Run:
    """One search under way: everything tried so far, and what is left of the budget.

    Args:
        objective: to be made small.
        budget: forward passes over λ-validation; a slope counts :data:`SLOPE`.
        task: progress.
        reporter: hears every scored candidate.
    """

    def __init__(self, objective: Objective, budget: int, task: Any, reporter: Any) -> None:
        self.objective, self.left, self.task, self.reporter = objective, budget, task, reporter
        self.tried: dict[str, Candidate] = {}
        self.slopes = 0
        self.lowest = math.inf  # of all that was seen, slopes too

    def scores(self, points: Sequence[Candidate]) -> list[float]:
        """Score the points that are new, in one call, and remember them.

        Raises:
            Spent: the budget did not reach for all of them (those it reached for are scored).
        """
        new = {key: p for p in points if (key := weights_key(p.weights)) not in self.tried}
        within = dict(list(new.items())[: self.left])
        found = self.objective.values([p.weights for p in within.values()]) if within else []
        for (key, point), value in zip(within.items(), found, strict=True):
            score = float(value) if math.isfinite(value) else math.inf
            self.tried[key] = Candidate(point.weights, point.origin, score)
            self.lowest = min(self.lowest, score)
            self.reporter.event("candidate", weights=dict(point.weights), score=score, origin=point.origin)
            self._pay(1)
        if len(within) < len(new):
            raise Spent
        return [self._score(self.tried[weights_key(p.weights)]) for p in points]

    def slope(self, weights: Weights) -> tuple[float, Weights]:
        """Loss and derivatives at a point.

        Raises:
            Spent: the budget does not reach.
        """
        if self.left < SLOPE:
            raise Spent
        value, derivatives = self.objective.slope(weights)
        self.slopes += 1
        if math.isfinite(value):
            self.lowest = min(self.lowest, value)
        self.reporter.event("slope", weights=dict(weights), score=value)
        self._pay(SLOPE)
        return value, derivatives

    @property
    def best(self) -> Candidate:
        """The lowest score; of equals the one tried first."""
        return min(self.tried.values(), key=self._score)

    def _pay(self, passes: int) -> None:
        self.left -= passes
        self.task.advance(passes, best=self.lowest)

    @staticmethod
    def _score(candidate: Candidate) -> float:
        assert candidate.score is not None  # only scored candidates are remembered
        return candidate.score


class Problem:
    """A run seen as points ``[K]`` of a box, one axis a member (or one a part).

    Args:
        space: where to search.
        run: what scores.
        seed: of whatever is drawn.
        axes: names that move together, axis by axis; by default the parts of each member.
    """

    def __init__(self, space: Space, run: Run, seed: int, axes: Sequence[tuple[str, ...]] | None = None) -> None:
        self.space, self.run, self.seed = space, run, seed
        self.axes = tuple(axes or (space.parts_of(name) for name in space.members))

    @property
    def K(self) -> int:
        """Number of axes."""
        return len(self.axes)

    @property
    def most(self) -> float:
        """Σλ of the largest trained stack."""
        return largest_total(self.space.members)

    def weights(self, point: Sequence[float] | Array) -> dict[str, float]:
        """A point as coefficients, rounded."""
        return {name: round(float(x), DIGITS) for x, names in zip(point, self.axes, strict=True) for name in names}

    def point(self, weights: Weights) -> Array:
        """``[K]`` coefficients as a point (of names that move together, their mean)."""
        return np.array([np.mean([weights[name] for name in names]) for names in self.axes])

    def inside(self, point: Array) -> Array:
        """The nearest point of the box."""
        return np.clip(point, self.space.low, self.space.high)

    def scores(self, points: Sequence[Sequence[float] | Array], origin: str) -> list[float]:
        """See :meth:`Run.scores`."""
        return self.run.scores([Candidate(self.weights(point), origin) for point in points])

    def slope(self, point: Array) -> tuple[float, Array]:
        """Loss and gradient ``[K]`` at a point, see :meth:`Run.slope`."""
        value, derivatives = self.run.slope(self.weights(point))
        return value, np.array([sum(derivatives[name] for name in names) for names in self.axes])

    @property
    def best(self) -> Array:
        """``[K]`` the best point so far."""
        return self.point(self.run.best.weights)

    def tried(self) -> tuple[Array, Array]:
        """Points ``[n, K]`` inside the box with a finite score, and the scores ``[n]``; in the order tried."""
        known = [c for c in self.run.tried.values() if c.score is not None and math.isfinite(c.score)]
        points = np.array([self.point(c.weights) for c in known]).reshape(-1, self.K)
        scores = np.array([c.score for c in known], dtype=np.float64)
        near = ((points >= self.space.low - 1e-9) & (points <= self.space.high + 1e-9)).all(axis=1)
        return points[near], scores[near]
