"""Scores → named metrics with intervals, and differences between models on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorchestra.errors import LorchestraError
from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.score import Scores
from lorchestra.stats.intervals import (
    RESAMPLES,
    Interval,
    interval_of,
    paired_difference,
    proportion_interval,
    ratio_interval,
    resample,
)
from lorchestra.stats.ratios import RatioTable

LOWER_IS_BETTER = ("nll", "loss_ratio")
MEAN = Goal()


@dataclass(frozen=True)
class Row:
    """One metric of one model on one domain."""

    model: str
    domain: str
    metric: str
    interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Flat JSON."""
        return {"model": self.model, "domain": self.domain, "metric": self.metric, **flat(self.interval)}


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
        told = {"a": self.a, "b": self.b, "domain": self.domain, "metric": self.metric, **flat(self.interval)}
        return {**told, "detectable": finite_or_none(self.interval.detectable)}


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


def loss_ratios(
    scores: Mapping[str, Scores], base: Mapping[str, Scores], betas: Mapping[str, float]
) -> dict[str, float]:
    """domain → loss / base loss: 1 at the base, lower is better; what a :class:`~lorchestra.evaluate.goal.Goal` weighs.

    Args:
        scores: domain → scores of a model.
        base: domain → scores of the base.
        betas: β of the preference domains.
    """
    sums = {name: found.loss(base[name], betas.get(name, 0.1)) for name, found in scores.items()}
    return {name: float(top.sum() / bottom.sum()) for name, (top, bottom) in sums.items()}


def loss_table(
    scores: Sequence[Mapping[str, Scores]], base: Mapping[str, Scores], betas: Mapping[str, float]
) -> RatioTable:
    """Numerators and denominators of the :func:`loss_ratios` of many models, group by group.

    A group that is in several domains is one column.
    """
    groups = list(dict.fromkeys(group for found in base.values() for group in found.groups))
    numbers = {group: k for k, group in enumerate(groups)}
    tops = np.zeros((len(base), len(scores), len(groups)))
    bottoms = np.zeros((len(base), len(groups)))
    present = np.zeros((len(base), len(groups)), dtype=bool)
    for d, (name, reference) in enumerate(base.items()):
        index = np.array([numbers[group] for group in reference.groups])
        present[d, index] = True
        for c, found in enumerate(scores):
            top, bottom = found[name].loss(reference, betas.get(name, 0.1))
            tops[d, c] = np.bincount(index, top, len(groups))
            bottoms[d] = np.bincount(index, bottom, len(groups))
    return RatioTable(tops, bottoms, present)


def ratio_draws(
    scores: Mapping[str, Scores], base: Mapping[str, Scores], betas: Mapping[str, float], resamples: int = RESAMPLES
) -> dict[str, NDArray[np.float64]]:
    """domain → its loss / base loss on the sample (first) and on resamples of the groups, ``[B + 1]``.

    The resamples depend on the groups alone, so the draws of two models are paired. A group that is in several domains
    is drawn in all of them together; groups of the same domains make a stratum, so that no domain is drawn empty.
    """
    table = loss_table([scores], base, betas)
    drawn = np.empty((resamples + 1, table.present.shape[1]))
    memberships = [tuple(column) for column in table.present.T]
    for number, stratum in enumerate(dict.fromkeys(memberships)):
        inside = np.array([membership == stratum for membership in memberships])
        drawn[:, inside] = resample(int(inside.sum()), resamples=resamples, seed=number)
    return {name: (drawn @ table.tops[d, 0]) / (drawn @ table.bottoms[d]) for d, name in enumerate(base)}


def loss_draws(
    scores: Mapping[str, Scores],
    base: Mapping[str, Scores],
    betas: Mapping[str, float],
    resamples: int = RESAMPLES,
    goal: Goal = MEAN,
) -> NDArray[np.float64]:
    """The goal's value of :func:`ratio_draws`, ``[B + 1]``: the mean over domains of loss / base loss, say."""
    return goal.combined(ratio_draws(scores, base, betas, resamples))


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


def flat(interval: Interval) -> dict[str, Any]:
    values = asdict(interval)
    del values["level"], values["error"]
    return {key: finite_or_none(value) for key, value in values.items()}


def finite_or_none(value: float | None) -> float | None:
    """JSON has no infinity: an unbounded interval is null on that side."""
    return value if value is not None and np.isfinite(value) else None
