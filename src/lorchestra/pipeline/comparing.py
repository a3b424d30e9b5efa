"""Two adapters on the same sealed test, though perhaps on different bases: the loss of one over the other's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorchestra.evaluate.metrics import finite_or_none
from lorchestra.evaluate.score import Scores
from lorchestra.registry.manifest import Metric
from lorchestra.stats.intervals import Interval, ratio_interval


@dataclass(frozen=True)
class Compared:
    """Losses in nats a token of the first one's tokenizer, lower is better.

    Args:
        before: of the first.
        after: of the second.
        difference: after − before, with its 95 % interval.
        paired: by item; otherwise from the two intervals alone, which is wider.
    """

    before: float
    after: float
    difference: Interval
    paired: bool

    @property
    def said(self) -> str:
        """``better``, ``worse`` or ``not told apart``, of the second."""
        if not self.difference.excludes(0.0):
            return "not told apart"
        return "better" if self.difference.estimate < 0 else "worse"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = self.difference
        return {
            "before": self.before,
            "after": self.after,
            "difference": found.estimate,
            "low": finite_or_none(found.low),
            "high": finite_or_none(found.high),
            "n": found.n,
            "paired": self.paired,
            "said": self.said,
        }


def paired(before: Mapping[str, Scores], after: Mapping[str, Scores]) -> Compared:
    """Item by item, over all domains together.

    Tokenizers may differ: an answer's Σ −log p is compared with the same answer's, and both are told per token of
    ``before``.

    Args:
        before: domain → scores.
        after: the same domains and items.
    """
    old, new = list(before.values()), [after[name] for name in before]
    theirs, ours = (np.concatenate([found.nll for found in every]) for every in (old, new))
    tokens = np.concatenate([found.gold_tokens for found in old])
    groups = [group for found in old for group in found.groups]
    difference = ratio_interval(ours - theirs, tokens, groups)
    return Compared(float(theirs.sum() / tokens.sum()), float(ours.sum() / tokens.sum()), difference, True)


def unpaired(before: Metric, after: Metric) -> Compared:
    """From two estimates with their intervals, as if of independent samples (which of the same items is too wide).

    MOVER: the sides' distances are added in squares (Zou & Donner 2008, "Construction of confidence limits about
    effect measures", Statistics in Medicine 27).
    """

    def apart(value: float, end: float | None) -> float:
        return math.inf if end is None else abs(value - end)

    estimate = after.value - before.value
    low = estimate - math.hypot(apart(after.value, after.low), apart(before.value, before.high))
    high = estimate + math.hypot(apart(after.value, after.high), apart(before.value, before.low))
    return Compared(before.value, after.value, Interval(estimate, low, high, min(before.n or 0, after.n or 0)), False)
