"""What a candidate is watched for while it answers a share of the traffic, and what was found.

Each guard compares the candidate with the stable version on the requests of the present step alone: within a step the
share is fixed, so that a bad hour befalls both. Its test may be looked at after every request
(:mod:`lorchestra.stats.sequential`), so there is no minimum before an alarm: twenty failures of the first twenty are
one at once. ``alpha`` is the chance that a candidate no worse than allowed is ever rolled back, by any guard, in any
step: each guard gets an equal part of it in each step (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.stats.intervals import Interval

FASTEST, SLOWEST = 0.01, 100.0  # seconds: a latency beyond counts as this one, so that none weighs more than it may
SPAN = math.log(SLOWEST / FASTEST)
State = Literal["holds", "unsure", "broken"]


@dataclass(frozen=True)
class Counts:
    """What was seen of one arm; counts of several processes are added.

    Args:
        requests: that were answered, or failed.
        errors: of them, those that failed through no fault of the client.
        latency_n: of them, those whose latency was measured.
        latency_sum: Σ of the natural logarithm of the latencies in seconds, within :data:`FASTEST` and :data:`SLOWEST`.
        latency_sq: Σ of its square.
        score_n: feedback.
        score_sum: Σ of scores, each in [0, 1].
    """

    requests: int = 0
    errors: int = 0
    latency_n: int = 0
    latency_sum: float = 0.0
    latency_sq: float = 0.0
    score_n: int = 0
    score_sum: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def since(self, earlier: Counts) -> Counts:
        """Requests and latencies that came after ``earlier``; rounding makes nothing of nothing."""
        n = max(self.requests - earlier.requests, 0)
        measured = max(self.latency_n - earlier.latency_n, 0)
        return Counts(
            requests=n,
            errors=min(max(self.errors - earlier.errors, 0), n),
            latency_n=measured,
            latency_sum=self.latency_sum - earlier.latency_sum if measured else 0.0,
            latency_sq=max(self.latency_sq - earlier.latency_sq, 0.0) if measured else 0.0,
        )


@dataclass(frozen=True)
class Reading:
    """What one guard saw.

    Args:
        guard: its name.
        allowed: how much worse the candidate may be; of the limit, the highest rate.
        candidate: its rate, geometric mean in seconds, or mean score; ``None`` of nothing.
        stable: the same of the stable version.
        worse: how much worse the candidate is by the estimate; ``None`` where one arm has seen nothing.
        low: with how much the interval begins that holds at every look; ``None`` for no bound.
        high: with how much it ends.
        level: of the interval.
        state: ``broken`` if all of the interval is beyond what is allowed, ``holds`` if nothing of it is.
    """

    guard: str
    allowed: float
    candidate: float | None
    stable: float | None
    worse: float | None
    low: float | None
    high: float | None
    level: float
    state: State

    def __str__(self) -> str:
        form = GUARDS[self.guard].form
        return (
            f"{GUARDS[self.guard].what} {shown(self.worse, form)} [{shown(self.low, form, '−∞')}, "
            f"{shown(self.high, form, '∞')}], allowed {shown(self.allowed, form)}"
        )


@dataclass(frozen=True)
class Guards:
    """What is asked of a candidate. ``None`` leaves a guard out.

    Args:
        alpha: of rolling back a candidate that is no worse than allowed, over the whole rollout.
        max_error_increase: how much higher its error rate may be: 0.01 is one request in a hundred.
        max_latency_increase: by which share its geometric mean latency may be longer: 0.25 is a quarter.
        max_score_drop: how much lower its mean score may be, of scores in [0, 1].
        max_error_rate: that it may have whatever the stable version does.
        min_requests: that the candidate answers in each step before the next.

    Raises:
        UserError: a number that makes no sense.
    """

    alpha: float = 0.05
    max_error_increase: float | None = 0.01
    max_latency_increase: float | None = 0.25
    max_score_drop: float | None = 0.05
    max_error_rate: float | None = 0.5
    min_requests: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise UserError(f"alpha is the chance of a false alarm, between 0 and 1 (0.05), not {self.alpha}")
        for name, most in (("max_error_increase", 1), ("max_score_drop", 1), ("max_latency_increase", math.inf)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < most:
                end = "and less than 1" if most == 1 else "and finite"
                raise UserError(f"{name} is {value}; it is at least 0 {end}, or left out")
        if self.max_error_rate is not None and not 0 < self.max_error_rate < 1:
            raise UserError(f"max_error_rate is {self.max_error_rate}; it is between 0 and 1, or left out")
        if self.min_requests < 0:
            raise UserError(f"min_requests is {self.min_requests}; it is at least 0")

    @property
    def active(self) -> list[str]:
        """The guards that are not left out."""
        return [name for name, guard in GUARDS.items() if getattr(self, guard.setting) is not None]

    def readings(self, candidate: Counts, stable: Counts, steps: int) -> list[Reading]:
        """What each guard sees in one step.

        Args:
            candidate: of this step.
            stable: of this step.
            steps: that the rollout has.
        """
        part = self.alpha / (max(len(self.active), 1) * steps)
        return [_reading(name, getattr(self, GUARDS[name].setting), candidate, stable, part) for name in self.active]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Guard:
    """One row of the table.

    Args:
        setting: of :class:`Guards`.
        what: before the figures in a sentence.
        form: of a difference: ``points``, ``percent`` or ``plain``.
        compare: candidate, stable, alpha → how much worse the candidate is, in the test's own scale.
        value: what one arm shows of itself.
        out: from the test's scale to the setting's.
    """

    setting: str
    what: str
    form: str
    compare: Callable[[Counts, Counts, float], Interval]
    value: Callable[[Counts], float | None]
    out: Callable[[float], float] = float


def _errors(candidate: Counts, stable: Counts, alpha: float) -> Interval:
    from lorchestra.stats.sequential import Sample, rate_difference

    one, other = (Sample(counts.requests, counts.errors) for counts in (candidate, stable))
    return rate_difference(one, other, alpha)


def _latency(candidate: Counts, stable: Counts, alpha: float) -> Interval:
    from lorchestra.stats.sequential import Sample, mean_difference

    one, other = (Sample(c.latency_n, c.latency_sum, c.latency_sq) for c in (candidate, stable))
    return mean_difference(one, other, alpha, SPAN)


def _score(candidate: Counts, stable: Counts, alpha: float) -> Interval:
    from lorchestra.stats.sequential import Sample, rate_difference

    one, other = (Sample(counts.score_n, counts.score_sum) for counts in (candidate, stable))
    return rate_difference(other, one, alpha)  # a lower score is the worse one


def _limit(candidate: Counts, _: Counts, alpha: float) -> Interval:
    from lorchestra.stats.sequential import Sample, rate_interval

    return rate_interval(Sample(candidate.requests, candidate.errors), alpha)


def _error_rate(counts: Counts) -> float | None:
    return counts.errors / counts.requests if counts.requests else None


def _mean_latency(counts: Counts) -> float | None:
    return math.exp(counts.latency_sum / counts.latency_n) if counts.latency_n else None


def _mean_score(counts: Counts) -> float | None:
    return counts.score_sum / counts.score_n if counts.score_n else None


def _longer(logarithm: float) -> float:
    """log of a ratio → by which share it is longer."""
    return math.expm1(logarithm) if logarithm < 700 else math.inf


GUARDS: dict[str, _Guard] = {
    "errors": _Guard("max_error_increase", "error rate higher by", "points", _errors, _error_rate),
    "latency": _Guard("max_latency_increase", "latency longer by", "percent", _latency, _mean_latency, _longer),
    "score": _Guard("max_score_drop", "score lower by", "plain", _score, _mean_score),
    "limit": _Guard("max_error_rate", "error rate", "points", _limit, _error_rate),
}


def _reading(name: str, allowed: float, candidate: Counts, stable: Counts, alpha: float) -> Reading:
    guard = GUARDS[name]
    found = guard.compare(candidate, stable, alpha)
    worse, low, high = (guard.out(value) for value in (found.estimate, found.low, found.high))
    state: State = "broken" if low > allowed else "holds" if high <= allowed else "unsure"
    return Reading(
        name,
        allowed,
        guard.value(candidate),
        guard.value(stable),
        _finite(worse),
        _finite(low),
        _finite(high),
        found.level,
        state,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def shown(value: float | None, form: str, unknown: str = "?") -> str:
    """``1.20 points``, ``25.0 %``, ``0.050``; ``unknown`` for ``None``."""
    if value is None:
        return unknown
    return {"points": f"{100 * value:.2f} points", "percent": f"{100 * value:.1f} %", "plain": f"{value:.3f}"}[form]
