"""Which setting to take, chosen on validation and told with what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from lorchestra.errors import counted
from lorchestra.sweep.cells import called
from lorchestra.sweep.table import Row

FEW_SEEDS = 3


@dataclass(frozen=True)
class Advice:
    """A recommendation.

    Args:
        row: the setting that is recommended; ``None`` if no setting can be.
        best: the one with the lowest validation loss.
        sentence: what to take, and why.
        rests_on: what that is known from, and what it is not.
    """

    row: Row | None
    best: Row | None
    sentence: str
    rests_on: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "settings": dict(self.row.settings) if self.row else None,
            "best": dict(self.best.settings) if self.best else None,
            "sentence": self.sentence,
            "rests_on": self.rests_on,
        }


def advise(rows: Sequence[Row], examples: Mapping[str, int]) -> Advice:
    """The setting with the fewest parameters whose validation loss cannot be told from the lowest, by one standard
    error of the difference, paired by seed (the rule of Breiman et al. 1984).

    Args:
        rows: of one condition of the data.
        examples: part → how many.
    """
    able = [row for row in rows if row.validation is not None and not row.diverged and row.worse < row.runs]
    seeds = max((len(row.losses) for row in able), default=0)
    whole = [row for row in able if len(row.losses) == seeds]
    rests = _rests_on(seeds, any(row.stopped for row in rows), examples)
    if not whole:
        return Advice(None, None, f"No setting can be recommended: {_why_none(rows)}.", rests)
    best = min(whole, key=_loss)
    alike = [row for row in whole if _told_apart(row, best) is False]
    taken = min(alike, key=lambda row: (row.trainable, _loss(row)))
    number = counted(round(taken.examples), "training example")
    if not taken.settings:
        text = f"There is one setting alone, for {number}: its validation loss is {_loss(taken):.3f}"
    elif taken is best:
        tied = counted(len(alike) - 1, "setting that is not smaller", "settings that are not smaller")
        others = f", and {tied} cannot be told from it" if len(alike) > 1 else ""
        text = f"For {number} take {_named(taken)}: it has the lowest validation loss, {_loss(taken):.3f}{others}"
    else:
        text = (
            f"For {number} take {_named(taken)}: with {taken.trainable:,} parameters it has the fewest of "
            f"those whose validation loss ({_loss(taken):.3f}) cannot be told from the lowest "
            f"({_named(best)}, {_loss(best):.3f}, {best.trainable:,} parameters)"
        )
    return Advice(taken, best, text + ".", rests)


def _named(row: Row) -> str:
    """``rank 8, scaling rslora``."""
    return ", ".join(called(row.settings))


def _why_none(rows: Sequence[Row]) -> str:
    if all(row.validation is None and row.done for row in rows):
        return "there are no validation examples to choose by (split.validation)"
    if all(row.diverged for row in rows):
        return "all of them diverged; try lower learning rates"
    return "every one of them diverged, was stopped, or ended above the loss it began with"


def _loss(row: Row) -> float:
    return float("inf") if row.validation is None else row.validation


def _told_apart(row: Row, best: Row) -> bool:
    """Whether the mean difference over seeds is more than its standard error; without a common seed it is taken so."""
    both = [seed for seed in row.losses if seed in best.losses]
    differences = [row.losses[seed] - best.losses[seed] for seed in both]
    if not any(differences):
        return not both
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else 0.0
    return fmean(differences) > error


def _rests_on(seeds: int, halved: bool, examples: Mapping[str, int]) -> str:
    """``halved``: trainings were stopped early, so that a setting may have fewer seeds than it began with."""
    held = counted(examples.get("validation", 0), "validation example")
    test = f" and {counted(examples['test'], 'test example')}" if examples.get("test") else ""
    text = (
        f"It rests on {counted(seeds, 'seed')}, {held}{test} of one task with one base; another task may want another."
    )
    if seeds < FEW_SEEDS:
        more = "train those that lead again, without halving" if halved else "give at least three (seeds: 3)"
        text += f" With so few seeds the spread between them is hardly known: {more}."
    return text
