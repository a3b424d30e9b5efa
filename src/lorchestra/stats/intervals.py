"""Intervals: arrays in, numbers out.

Items of one group (a patient, a question) are not independent, so whole groups are resampled. Intervals are
bootstrap percentiles, expanded for small numbers of groups (Hesterberg 2015, "What teachers should know about
the bootstrap", §5.3): plain percentiles are too narrow by √((n−1)/n) and by the normal's lighter tail. With very few
groups no percentile helps, since resamples never leave the range of the values: Student's interval then, around the
bootstrap's standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
POWER = 0.8
FEW = 10  # groups below which percentiles exclude the truth too often (two groups: every second time)


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it; ``n`` is the number of groups it rests on, ``error`` the standard error
    (``None`` of a proportion)."""

    estimate: float
    low: float
    high: float
    n: int
    level: float = LEVEL
    error: float | None = None

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside."""
        return value < self.low or value > self.high

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that a test with this standard error finds with a probability of 80 %.

        (t₁₋α/₂ + t₀.₈)·SE: Bloom 1995, "Minimum detectable effects". ``None`` without a standard error.
        """
        if self.error is None:
            return None
        if self.n < 2:
            return math.inf
        return (_student_quantile((1 + self.level) / 2, self.n) + _student_quantile(POWER, self.n)) * self.error

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def group_index(groups: Sequence[object] | None, n: int) -> NDArray[np.int64]:
    """``[n]`` number of each item's group, in order of first appearance; each item its own group without ``groups``."""
    if groups is None:
        return np.arange(n)
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


@lru_cache(maxsize=4)
def resample(groups: int, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """``[resamples + 1, groups]`` how often each group is drawn; the first row is the sample itself. Read-only: every
    metric of a domain is judged on the same draws, which are made once."""
    counts = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    drawn = np.vstack([np.ones((1, groups)), counts])
    drawn.flags.writeable = False
    return drawn


def interval_of(draws: Array, n: int, level: float = LEVEL) -> Interval:
    """Expanded percentile interval; of fewer than :data:`FEW` groups Student's.

    Args:
        draws: ``[resamples + 1]`` a statistic on the sample (first) and on the resamples.
        n: groups it rests on. With one group nothing is known: the interval is unbounded.
        level: of confidence.
    """
    from scipy.special import ndtr

    estimate = float(draws[0])
    if n < 2:
        return Interval(estimate, -math.inf, math.inf, n, level, math.inf)
    correction = math.sqrt(n / (n - 1))
    error = correction * float(draws[1:].std())
    if n < FEW:
        return student(estimate, error, n, level)
    widths = correction * _student_quantile((1 - level) / 2, n)  # standard errors to the lower end
    tail = float(ndtr(widths))
    low, high = np.quantile(draws[1:], [tail, 1 - tail])
    # Rounding may put the estimate of a constant a hair outside its own interval.
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), n, level, error)


def student(estimate: float, error: float, n: int, level: float = LEVEL) -> Interval:
    """Student's interval around an estimate with standard error ``error`` from ``n`` groups."""
    half = _student_quantile((1 + level) / 2, n) * error if n > 1 else math.inf
    return Interval(estimate, estimate - half, estimate + half, n, level, error)


def _student_quantile(p: float, n: int) -> float:
    """Of Student's distribution for ``n`` groups."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, p))


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, groups: Sequence[object] | None = None, seed: int = 0
) -> Interval:
    """Σ numerators / Σ denominators, as for a mean over tokens.

    Args:
        numerators: ``[n]``.
        denominators: ``[n]``, positive in sum.
        groups: ``[n]`` what each item belongs to.
        seed: of the resampling.

    Raises:
        ValueError: no items, lengths that differ, or values that are not finite.
    """
    top, bottom = _checked(numerators), _checked(denominators)
    if top.shape != bottom.shape:
        raise ValueError(f"numerators and denominators differ in length: {top.size} and {bottom.size}")
    index = group_index(groups, top.size)
    drawn = resample(int(index.max()) + 1, seed=seed)
    draws = (drawn @ np.bincount(index, top)) / (drawn @ np.bincount(index, bottom))
    return interval_of(draws, drawn.shape[1])


def mean_interval(values: ArrayLike, groups: Sequence[object] | None = None, seed: int = 0) -> Interval:
    """The mean of ``values [n]``; see :func:`ratio_interval`."""
    array = _checked(values)
    return ratio_interval(array, np.ones(array.size), groups, seed)


def paired_difference(a: ArrayLike, b: ArrayLike, groups: Sequence[object] | None = None, seed: int = 0) -> Interval:
    """The mean of a − b over the same items ``[n]``; both are resampled together."""
    first, second = _checked(a), _checked(b)
    if first.shape != second.shape:
        raise ValueError(f"paired values differ in length: {first.size} and {second.size}")
    return mean_interval(first - second, groups, seed)


def wilson(successes: float, n: int, level: float = LEVEL) -> Interval:
    """A proportion (Wilson 1927); sensible at 0 and 1 too. ``successes`` may hold halves, for ties.

    Raises:
        ValueError: ``n`` is not positive, or ``successes`` is not within 0 and ``n``.
    """
    from scipy.special import ndtri

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 ≤ successes ≤ n and n ≥ 1; got {successes} of {n}")
    z = float(ndtri(1 - (1 - level) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, max(centre - half, 0.0), min(centre + half, 1.0), n, level)


def proportion_interval(values: ArrayLike, groups: Sequence[object] | None = None) -> Interval:
    """The mean of values in [0, 1] as a proportion of the number of groups (Wilson): never of zero width."""
    array = _checked(values)
    index = group_index(groups, array.size)
    n = int(index.max()) + 1
    return wilson(min(max(float(array.mean()), 0.0), 1.0) * n, n)


def _checked(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0:
        raise ValueError("an interval needs at least one value")
    if not np.isfinite(array).all():
        raise ValueError("an interval needs finite values; there is NaN or infinity among them")
    return array
