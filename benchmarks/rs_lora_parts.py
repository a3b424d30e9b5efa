"""The finished trainings of a sweep, and how they are compared; for ``benchmarks/rs_lora.py``.

Differences are paired: the same seed, the same test items. Their 95 % intervals cover another seed as well as other
items (``lorchestra.stats.crossed``); what is known of a seed as a whole (a loss, a curve) has Student's interval over
the seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lorchestra.stats.crossed import crossed_ratio
from lorchestra.stats.intervals import Interval, student
from lorchestra.sweep.cells import worded
from lorchestra.sweep.outcome import Outcome
from lorchestra.sweep.table import Row, ScoreTable, row_of, scores

RESULTS = Path(__file__).parent / "results" / "sweeps"
Key = tuple[Any, ...]


class Sweep:
    """The finished trainings of one sweep, by setting.

    Args:
        name: of its file in :data:`RESULTS`.
        keys: of its axes, without their section: ``rank``, ``scaling``.
        groups: values of the axes → trainings, in the order of their seeds, which are the same everywhere.
    """

    def __init__(self, name: str) -> None:
        told = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        self.name = name
        axes = list(told["spec"]["axes"])
        self.keys = tuple(axis.rpartition(".")[2] for axis in axes)
        self.groups: dict[Key, list[Outcome]] = {}
        for cell in told["cells"]:
            outcome = Outcome.from_dict(cell)
            if outcome.state == "done":
                key = tuple(_plain(outcome.settings[axis]) for axis in axes)
                self.groups.setdefault(key, []).append(outcome)
        whole = set.intersection(*({run.seed for run in group} for group in self.groups.values()))
        for key, group in self.groups.items():  # a sweep that was ended early has some settings with one seed more
            self.groups[key] = sorted((run for run in group if run.seed in whole), key=lambda run: run.seed)
        self.rows: dict[Key, Row] = {key: row_of(group, axes) for key, group in self.groups.items()}

    def values(self, name: str) -> list[Any]:
        """The values of one axis, in order."""
        place = self.keys.index(name)
        return list(dict.fromkeys(key[place] for key in self.groups))

    def at(self, **values: Any) -> Key:
        """The setting with these values."""
        return tuple(values[name] for name in self.keys)

    def score(self, key: Key) -> ScoreTable:
        """Test scores of a setting.

        Raises:
            ValueError: it has none.
        """
        found = scores(self.groups[key])
        if found is None:
            raise ValueError(f"{self.name}: no test scores for {key}")
        return found

    def difference(self, ours: Sequence[Key], theirs: Sequence[Key]) -> Interval:
        """Mean score of the settings ``ours`` minus that of ``theirs``, pair by pair, seed by seed, item by item."""
        tables = [(self.score(a), self.score(b)) for a, b in zip(ours, theirs, strict=True)]
        return crossed_ratio(np.mean([a.values - b.values for a, b in tables], axis=0), groups=tables[0][0].groups)

    def by_seed(self, ours: Sequence[Key], theirs: Sequence[Key], of: Callable[[Outcome], float]) -> Interval:
        """Mean of ``of`` over the settings ``ours`` minus that over ``theirs``, with Student's interval over seeds."""
        pairs = [(self.groups[a], self.groups[b]) for a, b in zip(ours, theirs, strict=True)]
        apart = [[of(mine) - of(other) for mine, other in zip(a, b, strict=True)] for a, b in pairs]
        values = [fmean(seed) for seed in zip(*apart, strict=True)]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return student(fmean(values), error, len(values))


def _plain(value: Any) -> Any:
    """A value of several keys in words."""
    return worded(value) if isinstance(value, dict) else value


# ---- what is measured of a training


def after_first_epoch(run: Outcome) -> float:
    """Validation loss after one epoch, nats a token."""
    return next(loss for step, loss in run.validation if step >= run.steps_per_epoch)


def mean_training_loss(run: Outcome) -> float:
    """Mean over all steps, nats a token: the area under the curve. A faster training has less."""
    return fmean(loss for loss, _ in run.history)


def last_validation(run: Outcome) -> float:
    """Validation loss at the end, nats a token."""
    found = run.final_validation_loss
    if found is None:
        raise ValueError("a training without validation")
    return found


@lru_cache
def sweep_of(name: str) -> Sweep:
    """Read once."""
    return Sweep(name)


# ---- how it is told


def estimate(found: Interval | None) -> tuple[str, str]:
    """A mean, and its interval."""
    return ("–", "") if found is None else (f"{found.estimate:.3f}", f"[{found.low:.3f}, {found.high:.3f}]")


def whole(found: Interval | None) -> str:
    """Both in one."""
    return " ".join(estimate(found))


def signed(found: Interval) -> str:
    """With its interval if there is one, bold where that leaves zero out; ``0`` where there is no difference at all."""
    if found.low == found.high == 0:
        return "0"
    if math.isinf(found.high):  # of one seed, which tells nothing of another
        return f"{found.estimate:+.3f}"
    text = f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.excludes(0) else text
