"""What became of one department: everything that its row, the page and ``departments.json`` are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lorchestra.errors import counted
from lorchestra.evaluate.metrics import differences, flat, metrics
from lorchestra.evaluate.score import Scores
from lorchestra.pipeline.figures import called, figure
from lorchestra.stats.intervals import Interval

BASE, SHARED, DELIVERED = "base", "shared", "delivered"


@dataclass(frozen=True)
class Judged:
    """One metric on a department's sealed test.

    Args:
        metric: ``nll`` (nats a token, lower is better), ``accuracy`` or ``preference_accuracy``.
        groups: independent ones.
        models: ``base``, ``shared`` (the context alone) and ``delivered`` → the metric.
        over_base: delivered − base, paired by item.
        over_shared: delivered − shared.
    """

    metric: str
    groups: int
    models: Mapping[str, Interval]
    over_base: Interval
    over_shared: Interval

    def sign(self, difference: Interval) -> int:
        """1: better, −1: worse, 0: cannot be told."""
        if not difference.excludes(0.0):
            return 0
        return 1 if (difference.estimate < 0) == (self.metric == "nll") else -1

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "metric": self.metric,
            "groups": self.groups,
            **{name: flat(found) for name, found in self.models.items()},
            "over_base": flat(self.over_base),
            "over_shared": flat(self.over_shared),
        }


def judged(scores: Mapping[str, Scores]) -> tuple[Judged, ...]:
    """All metrics that the items have, the telling one first: accuracy where every item has a choice, else the loss."""
    found = {model: {row.metric: row.interval for row in metrics(model, "", own)} for model, own in scores.items()}
    over = {
        rival: {row.metric: row.interval for row in differences(DELIVERED, rival, "", scores[DELIVERED], scores[rival])}
        for rival in (BASE, SHARED)
    }
    test = scores[DELIVERED]
    choices = len(test.correct()[0]) == len(test)
    names = [name for name in found[DELIVERED] if not name.endswith("_normalised")]
    names.sort(key=lambda name: (name == "nll") == choices)
    return tuple(
        Judged(
            name,
            len(set(test.groups)),
            {model: own[name] for model, own in found.items()},
            over[BASE][name],
            over[SHARED][name],
        )
        for name in names
    )


@dataclass(frozen=True)
class Outcome:
    """One department.

    Args:
        name: of the department.
        origin: its row, ``departments.csv:3``.
        settings: column → cell.
        state: ``done``; ``diverged``: a loss or gradient was not finite; ``failed``: its data or settings cannot be
            used, for ``reason``.
        reason: one sentence; empty if done.
        examples: part → how many.
        data: source → digest of its examples.
        warnings: what should be looked at in the data.
        rank: of the department's own adapter; ``trainable`` its parameters.
        step: the last step; ``steps`` of the whole; ``best_step`` whose factors were kept.
        before: validation loss before the first step, nats a token; ``after`` that of what was kept.
        seconds: of training and validation; ``tokens`` trained on.
        weights: member → λ of what is delivered; ``members`` their content digests.
        digest: of the delivered adapter.
        retained: share of the sum's energy that ``fusion.rank`` kept; 1 for the exact sum.
        tools: name → version of what its members were made with.
        tests: on the sealed test; empty without one.
        readings: how often the test has been read so far; ``sealed`` its :func:`sealed_digest`.
        directory: of the finished step, with ``adapter/``.
        cached: it was finished before.
    """

    name: str
    origin: str
    settings: Mapping[str, str]
    state: Literal["done", "diverged", "failed"]
    reason: str = ""
    examples: Mapping[str, int] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    rank: int = 0
    trainable: int = 0
    step: int = 0
    steps: int = 0
    best_step: int | None = None
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    members: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    retained: float = 1.0
    tools: Mapping[str, str] = field(default_factory=dict)
    tests: tuple[Judged, ...] = ()
    readings: int = 0
    sealed: str = ""
    directory: str = ""
    cached: bool = False

    @property
    def test(self) -> Judged | None:
        """The telling metric."""
        return self.tests[0] if self.tests else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without what is of this machine and this time alone."""
        told = asdict(self)
        del told["name"], told["directory"], told["cached"]
        told["tests"] = [test.as_dict() for test in self.tests]
        return told


def department_figures(stage: str, outcome: Outcome) -> dict[str, Any]:
    """What a registry knows of a department's sealed test: ``loss`` and ``clinic.loss``, as after a run."""
    found = {}
    for test in outcome.tests:
        told = figure(test.metric, test.models[DELIVERED], outcome.sealed)
        found[called(test.metric)] = found[f"{stage}.{called(test.metric)}"] = told
    return found


def remarks(outcomes: tuple[Outcome, ...], context: bool) -> dict[str, tuple[str, ...]]:
    """Department → what should be known beside its figures.

    Args:
        outcomes: of all departments.
        context: the last stage has one, so that the shared stages alone are something to compare with.
    """
    same: dict[tuple[str, ...], str] = {}
    found = {}
    for outcome in outcomes:
        said = [outcome.reason] if outcome.reason else list(_on_test(outcome, context))
        key = tuple(sorted(outcome.data.values()))
        if key and same.setdefault(key, outcome.name) != outcome.name:
            said.append(f"the same examples as {same[key]}")
        if outcome.warnings:
            said.append(counted(len(outcome.warnings), "warning"))
        found[outcome.name] = tuple(said)
    return found


def _on_test(outcome: Outcome, context: bool) -> list[str]:
    test = outcome.test
    if test is None:
        return ["no sealed test, so nothing is known of unseen questions"]
    over = test.over_shared if context else test.over_base
    rival = "the shared stages alone" if context else "the base"
    if test.groups < 2:
        return ["one independent test question: nothing can be told"]
    sign = test.sign(over)
    if sign < 0:
        return [f"worse than {rival}: do not deploy it"]
    if sign > 0:
        return []
    if over.low == over.high == 0:
        return [f"the same answers as {rival}"]
    return [f"too few test examples ({test.groups}) to tell it from {rival}"]
