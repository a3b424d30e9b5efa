"""Outcomes → one row a setting: stability over seeds, test score, overfitting, parameters, time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lorchestra.stats.crossed import crossed_ratio
from lorchestra.stats.intervals import Interval
from lorchestra.sweep.cells import setting_key
from lorchestra.sweep.outcome import HeldOut, Outcome


@dataclass(frozen=True)
class Row:
    """One setting over its seeds (and folds).

    Args:
        settings: key → value.
        runs: trainings that were begun; ``done``, ``diverged``, ``stopped`` (by halving) of them.
        worse: trainings that ended with a validation loss above that of the untrained adapter, diverged ones included.
        examples: training examples, the mean over runs.
        trainable: parameters.
        scale: γ.
        learning_rate: mean over runs.
        validation: mean over seeds of the validation loss of the kept factors, nats a token.
        validation_spread: its standard deviation over seeds.
        gradient: mean over seeds of the median gradient norm; ``gradient_spread`` its relative standard deviation.
        gap: validation minus training loss at the end, mean over runs, nats a token.
        onset: mean epoch from which the validation loss only rose, of the ``rising`` runs where it did.
        metric: of the test.
        test: its mean over seeds and items, with an interval over both.
        seconds: of a training, mean.
        losses: seed → validation loss.
    """

    settings: Mapping[str, Any]
    runs: int
    done: int
    diverged: int
    stopped: int
    worse: int
    examples: float
    trainable: int
    scale: float
    learning_rate: float
    validation: float | None
    validation_spread: float | None
    gradient: float | None
    gradient_spread: float | None
    gap: float | None
    onset: float | None
    rising: int
    metric: str
    test: Interval | None
    seconds: float
    losses: Mapping[int, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        told = asdict(self)
        told["losses"] = {str(seed): loss for seed, loss in self.losses.items()}
        if self.test is not None:
            told["test"] = {
                key: value if math.isfinite(value) else None
                for key, value in asdict(self.test).items()
                if key in ("estimate", "low", "high", "n")
            }
        return told


def rows(outcomes: Sequence[Outcome], keys: Sequence[str], folds: int | None = None) -> list[Row]:
    """One row for every combination of the values of ``keys``, in the order in which they were first begun; ``folds``
    as in :func:`scores`."""
    return [row_of(group, keys, folds) for group in grouped(outcomes, keys).values()]


def grouped(outcomes: Sequence[Outcome], keys: Sequence[str]) -> dict[str, list[Outcome]]:
    """Setting → its outcomes."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(setting_key({key: outcome.settings[key] for key in keys}), []).append(outcome)
    return groups


def row_of(group: Sequence[Outcome], keys: Sequence[str], folds: int | None = None) -> Row:
    """The row of one setting's outcomes."""
    done = [outcome for outcome in group if outcome.state == "done"]
    losses = _by_seed(done, "validation_loss")
    norms = list(_by_seed(done, "gradient_norm").values())
    gaps = [outcome.gap for outcome in done if outcome.gap is not None]
    onsets = [outcome.onset for outcome in done if outcome.onset is not None]
    table = scores(done, folds)
    return Row(
        settings={key: group[0].settings[key] for key in keys},
        runs=len(group),
        done=len(done),
        diverged=sum(outcome.state == "diverged" for outcome in group),
        stopped=sum(outcome.state == "stopped" for outcome in group),
        worse=sum(outcome.worse_than_untrained for outcome in group),
        examples=fmean((outcome.examples or {}).get("train", 0) for outcome in group),
        trainable=max(outcome.trainable for outcome in group),
        scale=group[0].scale,
        learning_rate=fmean(outcome.learning_rate for outcome in group),
        validation=_mean(list(losses.values())),
        validation_spread=_spread(list(losses.values())),
        gradient=_mean(norms),
        gradient_spread=spread / fmean(norms) if (spread := _spread(norms)) is not None and any(norms) else None,
        gap=_mean(gaps),
        onset=_mean(onsets),
        rising=len(onsets),
        metric=table.metric if table else "",
        test=table.interval() if table else None,
        seconds=_mean([outcome.seconds for outcome in done]) or 0.0,
        losses=losses,
    )


@dataclass(frozen=True)
class ScoreTable:
    """Test scores of one setting: ``values`` and ``weights`` ``[S, n]`` of S seeds on n items in ``groups``."""

    metric: str
    seeds: tuple[int, ...]
    values: np.ndarray[Any, np.dtype[np.float64]]
    weights: np.ndarray[Any, np.dtype[np.float64]]
    groups: tuple[str, ...]

    def interval(self) -> Interval:
        """The mean, with an interval over seeds and items."""
        return crossed_ratio(self.values, self.weights, self.groups)

    def minus(self, other: ScoreTable) -> Interval:
        """The difference of two settings' means, paired by seed and item; seeds that only one of them has are left out.

        Raises:
            ValueError: they were tested on different items, or have no seed in common.
        """
        if self.groups != other.groups or self.metric != other.metric:
            raise ValueError("two settings can be compared on the same test items only")
        both = [seed for seed in self.seeds if seed in other.seeds]
        ours, theirs = ([table.seeds.index(seed) for seed in both] for table in (self, other))
        return crossed_ratio(self.values[ours] - other.values[theirs], self.weights[ours], self.groups)


def scores(done: Sequence[Outcome], folds: int | None = None) -> ScoreTable | None:
    """The test scores of one setting's trainings; the folds of a seed make up one test. ``None`` without a test.

    Seeds that lack one of the K ``folds`` are left out.
    """
    by_seed: dict[int, dict[int | None, HeldOut]] = {}
    for outcome in done:
        if outcome.test is not None:
            by_seed.setdefault(outcome.seed, {})[outcome.fold] = outcome.test
    parts = range(folds) if folds else (None,)
    whole = {seed: [found[k] for k in parts] for seed, found in by_seed.items() if all(k in found for k in parts)}
    if not whole:
        return None
    tests = next(iter(whole.values()))
    return ScoreTable(
        tests[0].metric,
        tuple(whole),
        np.array([[value for test in found for value in test.values] for found in whole.values()]),
        np.array([[weight for test in found for weight in test.weights] for found in whole.values()]),
        tuple(group for test in tests for group in test.groups),
    )


def _by_seed(done: Sequence[Outcome], name: str) -> dict[int, float]:
    """Seed → mean over its folds."""
    found: dict[int, list[float]] = {}
    for outcome in done:
        if (value := getattr(outcome, name)) is not None:
            found.setdefault(outcome.seed, []).append(value)
    return {seed: fmean(values) for seed, values in found.items()}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
