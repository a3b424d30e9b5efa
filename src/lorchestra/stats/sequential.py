"""Tests of one arm against another that may be looked at after every observation, and acted on at once.

A fixed-sample test that is looked at often finds a difference between equal arms sooner or later. Here every look is
one at the same *e-process* E: not negative, and of expectation at most 1 whenever one stops, if the hypothesis is
true. The chance that E ever reaches 1/α is then at most α (Ville 1939), so "E ≥ 1/α" is a test and all values that
are not refused make an interval that holds at every moment together (Howard, Ramdas, McAuliffe, Sekhon 2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", arXiv 1810.08240). An arm's E is the likelihood
ratio mixed over the alternative, ∫ Π f_θ(x)/f_θ₀(x) dH(θ): the mSPRT (Robbins 1970; Johari, Koomen, Pekelis, Walsh
2017, "Peeking at A/B tests"). Each observation multiplies the E of its own arm, so the product over two arms is an
e-process for the pair, in whatever order and proportion they come; a hypothesis about the difference is refused when
every pair that fulfils it is: E = min over those pairs of E_c·E_s.

Only sums are needed: observations may be counted by several processes and added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lorchestra.stats.intervals import Array, Interval

PRIOR_RATE = 0.5  # Beta(½, ½): Jeffreys' prior, of which the price in log E grows slowest with n (½·log n)
BETS = tuple(0.02 * 45 ** (k / 9) for k in range(10))  # λ of the mixture of a mean, 0.02 … 0.9: for 10² to 10⁷ values
POINTS, ROUNDS = 33, 4  # of a search: 32⁻⁴ of the range is 10⁻⁶


@dataclass(frozen=True)
class Sample:
    """What was seen of one arm; numbers, or arrays of one shape for many at a time.

    Args:
        n: observations.
        total: their sum.
        squares: the sum of their squares; means alone need it.
    """

    n: ArrayLike
    total: ArrayLike
    squares: ArrayLike = 0.0

    @property
    def mean(self) -> Array:
        """The mean; NaN of nothing."""
        n = np.asarray(self.n, dtype=np.float64)
        return np.where(n > 0, np.asarray(self.total) / np.maximum(n, 1), np.nan)


def rate_evidence(candidate: Sample, stable: Sample, margin: float = 0.0) -> Array:
    """log E against "the candidate's rate is at most the stable one's + ``margin``"; refuse at log(1/α).

    Each arm: ∫ p^k (1−p)^(n−k) dBeta(½, ½) / p₀^k (1−p₀)^(n−k), with k the sum: the prior–posterior ratio
    (Waudby-Smith, Ramdas 2020, arXiv 2006.04347). For values *between* 0 and 1 it holds too, about their mean, since
    x ↦ (q/p)^x ((1−q)/(1−p))^(1−x) lies below its chord (the sub-Bernoulli case of Howard et al. 2021): scores are
    judged by the same function, conservatively where they vary less than 0 and 1 would.

    Args:
        candidate: sums of values in [0, 1].
        stable: the same.
        margin: in (−1, 1).

    Raises:
        ValueError: counts that cannot be, or a margin outside.
    """
    if not -1 < margin < 1:
        raise ValueError(f"the margin of a rate is between -1 and 1, not {margin}")
    pair = _Rates(candidate, stable)
    meets = pair.difference <= margin
    return np.where(meets, pair.at_best, pair.profile(np.full_like(pair.difference, margin)))


def rate_difference(candidate: Sample, stable: Sample, alpha: float) -> Interval:
    """The candidate's rate less the stable one's, with the interval of level 1−``alpha`` that holds at every look: of
    numbers, not arrays. Its lower end is above a margin exactly where :func:`rate_evidence` refuses that margin.

    Raises:
        ValueError: counts that cannot be, or a level outside (0, 1).
    """
    _check_alpha(alpha)
    pair = _Rates(candidate, stable)
    centre = float(pair.difference)
    low = _crossing(pair.profile, centre, -1.0, -math.log(alpha))
    high = _crossing(pair.profile, centre, 1.0, -math.log(alpha))
    return _interval(candidate, stable, low, high, alpha)


def limit_evidence(candidate: Sample, limit: float) -> Array:
    """log E against "the candidate's rate is at most ``limit``", of one arm alone.

    Raises:
        ValueError: counts that cannot be, or a limit outside (0, 1).
    """
    if not 0 < limit < 1:
        raise ValueError(f"the limit of a rate is between 0 and 1, not {limit}")
    n, k = _checked_rate(candidate)
    worst = np.minimum(limit, k / np.maximum(n, 1))
    return _mixed(n, k) - _log_likelihood(n, k, worst)


def rate_interval(sample: Sample, alpha: float) -> Interval:
    """One arm's rate, with the interval of level 1−``alpha`` that holds at every look: of numbers, not arrays.

    Raises:
        ValueError: counts that cannot be, or a level outside (0, 1).
    """
    _check_alpha(alpha)
    n, k = _checked_rate(sample)

    def evidence(p: Array) -> Array:
        return _mixed(n, k) - _log_likelihood(n, k, p)

    centre = float(k / n) if n > 0 else 0.5
    low, high = (_crossing(evidence, centre, end, -math.log(alpha)) for end in (0.0, 1.0))
    return Interval(float(sample.mean), low, high, int(n), 1 - alpha)


def mean_evidence(candidate: Sample, stable: Sample, margin: float, span: float) -> Array:
    """log E against "the candidate's mean is at most the stable one's + ``margin``"; refuse at log(1/α).

    Each arm bets on its mean being off μ: Π (1 + λξ) with ξ = ±(x−μ)/span ≥ −1 is an e-process, and
    1 + λξ ≥ exp(λξ + (λ + log(1−λ))·ξ²) for 0 ≤ λ < 1 (Fan, Grama, Liu 2015, "Exponential inequalities for martingales
    with applications"; the empirical Bernstein bounds of Howard et al. 2021 rest on it) leaves sums alone:
    exp(λ·n·|x̄−μ|/span + (λ + log(1−λ))·Σ(x−μ)²/span²), mixed over both signs and :data:`BETS`. It holds for every
    distribution between the bounds, also one of which the rare values were not seen yet, where a t-test fails; a small
    variance is noticed and used.

    Args:
        candidate: sums of values in an interval that was fixed beforehand.
        stable: the same.
        margin: in the units of the values.
        span: length of that interval.

    Raises:
        ValueError: sums that cannot be.
    """
    pair = _Means(candidate, stable, span)
    meets = pair.difference <= margin
    return np.where(meets, pair.at_best, pair.profile(np.full_like(pair.difference, margin)))


def mean_difference(candidate: Sample, stable: Sample, alpha: float, span: float) -> Interval:
    """The candidate's mean less the stable one's, with the interval of level 1−``alpha`` that holds at every look: of
    numbers, not arrays. Unbounded while there are too few observations to say anything. See :func:`mean_evidence`.

    Raises:
        ValueError: sums that cannot be, or a level outside (0, 1).
    """
    _check_alpha(alpha)
    pair = _Means(candidate, stable, span)
    low, high = (_crossing(pair.profile, float(pair.difference), end, -math.log(alpha)) for end in (-span, span))
    return _interval(candidate, stable, low if low > -span else -math.inf, high if high < span else math.inf, alpha)


class _Rates:
    """The e-process of a pair of rates, and its least value over the pairs of one difference."""

    def __init__(self, candidate: Sample, stable: Sample) -> None:
        (self.nc, self.kc), (self.ns, self.ks) = _checked_rate(candidate), _checked_rate(stable)
        pc, ps = self.kc / np.maximum(self.nc, 1), self.ks / np.maximum(self.ns, 1)
        # Of an arm without observations every rate is as likely: the nearest to the other arm's.
        pc, ps = np.where(self.nc > 0, pc, ps), np.where(self.ns > 0, ps, pc)
        self.difference: Array = np.asarray(pc - ps)
        self.mixed = _mixed(self.nc, self.kc) + _mixed(self.ns, self.ks)
        self.at_best: Array = self.mixed - self._log_likelihood(pc, ps)

    def profile(self, d: Array) -> Array:
        """min over p_c − p_s = d of log E. Convex in d: the likelihood is log-concave."""
        if not np.any(d):  # the pooled rate
            pooled = (self.kc + self.ks) / np.maximum(self.nc + self.ns, 1)
            return np.asarray(self.mixed - self._log_likelihood(pooled, pooled))
        low, high = np.maximum(0.0, -d), np.minimum(1.0, 1.0 - d)
        with np.errstate(divide="ignore", invalid="ignore"):
            for _ in range(50):  # the slope of a concave function falls: halve around its zero
                p = (low + high) / 2
                q = np.clip(p + d, 0.0, 1.0)
                rises = self.kc / q - (self.nc - self.kc) / (1 - q) + self.ks / p - (self.ns - self.ks) / (1 - p) > 0
                low, high = np.where(rises, p, low), np.where(rises, high, p)
        ends = [self._log_likelihood(np.clip(p + d, 0.0, 1.0), p) for p in (low, high)]
        return np.asarray(self.mixed - np.maximum(*ends))

    def _log_likelihood(self, pc: Array, ps: Array) -> Array:
        return _log_likelihood(self.nc, self.kc, pc) + _log_likelihood(self.ns, self.ks, ps)


class _Means:
    """The same of a pair of means."""

    def __init__(self, candidate: Sample, stable: Sample, span: float) -> None:
        if not (math.isfinite(span) and span > 0):
            raise ValueError(f"the span of a mean's values is finite and positive, not {span}")
        self.span = span
        (self.nc, mc, self.vc), (self.ns, ms, self.vs) = _checked_mean(candidate), _checked_mean(stable)
        mc, ms = np.where(self.nc > 0, mc, ms), np.where(self.ns > 0, ms, mc)
        self.difference: Array = np.asarray(mc - ms)
        self.at_best: Array = self._arm(np.zeros_like(mc), self.nc, self.vc) + self._arm(
            np.zeros_like(mc), self.ns, self.vs
        )

    def profile(self, d: Array) -> Array:
        """min over μ_c − μ_s = d of log E: the two means share |d − x̄_c + x̄_s| between them."""
        gap = np.abs(d - self.difference)
        low, high = np.zeros_like(gap), np.ones_like(gap)
        best = np.full_like(gap, np.inf)
        for _ in range(2):  # neither convex nor concave, so all of it is looked at first
            share = np.linspace(low, high, POINTS)
            found = self._arm(share * gap, self.nc, self.vc) + self._arm((1 - share) * gap, self.ns, self.vs)
            least = np.take_along_axis(share, found.argmin(axis=0)[None], axis=0)[0]
            best, width = np.minimum(best, found.min(axis=0)), (high - low) / (POINTS - 1)
            low, high = np.maximum(least - width, 0.0), np.minimum(least + width, 1.0)
        return best

    def _arm(self, d: Array, n: Array, v: Array) -> Array:
        """log E of one arm at the distance d from its mean; v = Σ(x−x̄)²."""
        first, second = n * d / self.span, (v + n * d**2) / self.span**2
        logs = [bet * first + (bet + math.log1p(-bet)) * second for bet in BETS]
        most = np.maximum.reduce(logs)
        return np.asarray(most + np.log(sum(np.exp(one - most) for one in logs) / (2 * len(BETS))))


def _mixed(n: Array, k: Array) -> Array:
    """log ∫ p^k (1−p)^(n−k) dBeta(½, ½)."""
    from scipy.special import betaln

    return np.asarray(betaln(k + PRIOR_RATE, n - k + PRIOR_RATE) - betaln(PRIOR_RATE, PRIOR_RATE))


def _log_likelihood(n: Array, k: Array, p: Any) -> Array:
    from scipy.special import xlog1py, xlogy

    return np.asarray(xlogy(k, p) + xlog1py(n - k, -p))


def _crossing(evidence: Callable[[Array], Array], inside: float, outside: float, bound: float) -> float:
    """Where ``evidence``, which grows from ``inside`` to ``outside``, reaches ``bound``; ``outside`` if nowhere.

    The end that is returned is the one beyond: the interval is never too narrow."""
    for _ in range(ROUNDS):
        points = np.linspace(inside, outside, POINTS)
        beyond = np.flatnonzero(evidence(points)[1:] >= bound)
        if not beyond.size:
            return outside
        inside, outside = float(points[beyond[0]]), float(points[beyond[0] + 1])
    return outside


def _interval(candidate: Sample, stable: Sample, low: float, high: float, alpha: float) -> Interval:
    estimate = float(candidate.mean - stable.mean)
    return Interval(estimate, low, high, int(candidate.n) + int(stable.n), 1 - alpha)  # type: ignore[arg-type]


def _checked_rate(sample: Sample) -> tuple[Array, Array]:
    n, k = np.asarray(sample.n, dtype=np.float64), np.asarray(sample.total, dtype=np.float64)
    if not np.all((n >= 0) & (k >= 0) & (k <= n) & np.isfinite(n)):
        raise ValueError(f"a rate needs 0 ≤ total ≤ n; got the total {k} of {n}")
    return n, k


def _checked_mean(sample: Sample) -> tuple[Array, Array, Array]:
    """n, mean, Σ(x−x̄)²."""
    n, total, squares = (np.asarray(x, dtype=np.float64) for x in (sample.n, sample.total, sample.squares))
    if not np.all((n >= 0) & np.isfinite(n) & np.isfinite(total) & np.isfinite(squares) & (squares >= 0)):
        raise ValueError(f"a mean needs n ≥ 0 and finite sums; got n {n}, total {total}, squares {squares}")
    mean = total / np.maximum(n, 1)
    return n, mean, np.maximum(squares - total * mean, 0.0)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"the level of an interval is 1 - alpha with alpha between 0 and 1, not {alpha}")
