"""Scores → named metrics with intervals, and differences between models on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorchestra.errors import LorchestraError
from lorchestra.evaluate.score import Scores
from lorchestra.stats.intervals import (
    RESAMPLES,
    Interval,
    group_index,
    interval_of,
    paired_difference,
    proportion_interval,
    ratio_interval,
    resample,
)

LOWER_IS_BETTER = ("nll", "loss_ratio")


@dataclass(frozen=True)
class Row:
    """One metric of one model on one domain."""

    model: str
    domain: str
    metric: str
    interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Flat JSON."""
        return {"model": self.model, "domain": self.domain, "metric": self.metric, **_flat(self.interval)}


@dataclass(frozen=True)
class Difference:
    """Metric of ``a`` minus that of ``b``, on the same items."""

    a: str
    b: str
    domain: str
    metric: str
    interval: Interval

    @property
    def better(self) -> bool | None:
        """``a`` is better (true), worse (false), or the interval does not say (none)."""
        if not self.interval.excludes(0.0):
            return None
        return (self.interval.estimate < 0) == (self.metric in LOWER_IS_BETTER)

    def as_dict(self) -> dict[str, Any]:
        """Flat JSON."""
        return {"a": self.a, "b": self.b, "domain": self.domain, "metric": self.metric, **_flat(self.interval)}


def metrics(model: str, domain: str, scores: Scores) -> list[Row]:
    """Negative log-likelihood per gold token; accuracy where there is a choice, by sum and per token.

    Raises:
        LorchestraError: log-probabilities that are not finite.
    """
    if broken := sum(not np.isfinite(sums).all() for sums in scores.sums):
        raise LorchestraError(
            f"{model!r} gives {broken} of the {len(scores)} items of {domain!r} a log-probability that is not finite; "
            "compute in float32, or look for a damaged adapter or a weight that is far too large"
        )
    rows = [Row(model, domain, "nll", ratio_interval(scores.nll, scores.gold_tokens, scores.groups))]
    name = "preference_accuracy" if scores.kind == "dpo" else "accuracy"
    for normalised, suffix in ((False, ""), (True, "_normalised")):
        values, groups = scores.correct(normalised)
        if values.size:
            rows.append(Row(model, domain, name + suffix, proportion_interval(values, groups)))
    return rows


def differences(a: str, b: str, domain: str, first: Scores, second: Scores) -> list[Difference]:
    """Paired differences of the same metrics."""
    change = ratio_interval(first.nll - second.nll, first.gold_tokens, first.groups)
    out = [Difference(a, b, domain, "nll", change)]
    name = "preference_accuracy" if first.kind == "dpo" else "accuracy"
    for normalised, suffix in ((False, ""), (True, "_normalised")):
        ours, groups = first.correct(normalised)
        if ours.size:
            theirs, _ = second.correct(normalised)
            out.append(Difference(a, b, domain, name + suffix, paired_difference(ours, theirs, groups)))
    return out


def loss_draws(
    scores: Mapping[str, Scores], base: Mapping[str, Scores], betas: Mapping[str, float], resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Mean over domains of loss / base loss: on the sample (first) and on resamples of its groups, ``[B + 1]``.

    The resamples depend on the domains alone, so the draws of two models are paired.

    Args:
        scores: domain → scores of a model.
        base: domain → scores of the base.
        betas: β of the preference domains.
        resamples: B.
    """
    total: NDArray[np.float64] | None = None
    for number, (domain, found) in enumerate(scores.items()):
        top, bottom = found.loss(base[domain], betas.get(domain, 0.1))
        index = group_index(found.groups, len(found))
        drawn = resample(int(index.max()) + 1, resamples=resamples, seed=number)
        ratio = (drawn @ np.bincount(index, top)) / (drawn @ np.bincount(index, bottom))
        total = ratio if total is None else total + ratio
    if total is None:
        raise ValueError("a loss needs at least one domain")
    return total / len(scores)


def overall(a: NDArray[np.float64], b: NDArray[np.float64], groups: int) -> Interval:
    """Interval of the difference of two models' :func:`loss_draws`; ``groups`` is the smallest domain's number."""
    return interval_of(a - b, groups)


def smallest(scores: Mapping[str, Scores]) -> int:
    """Number of groups of the smallest domain."""
    return min(len(set(found.groups)) for found in scores.values())


def table(rows: Sequence[Row], metric: str) -> dict[str, dict[str, Interval]]:
    """model → domain → interval of one metric."""
    out: dict[str, dict[str, Interval]] = {}
    for row in rows:
        if row.metric == metric:
            out.setdefault(row.model, {})[row.domain] = row.interval
    return out


def _flat(interval: Interval) -> dict[str, Any]:
    values = asdict(interval)
    del values["level"]
    # JSON has no infinity: an unbounded interval is null on that side.
    return {
        key: (None if isinstance(value, float) and not np.isfinite(value) else value) for key, value in values.items()
    }
