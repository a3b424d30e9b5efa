"""A search over coefficients on a loaded base: the members mounted once, every candidate scored through the bank."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.base.load import Base
from lorchestra.errors import Interrupted
from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.metrics import loss_ratios
from lorchestra.evaluate.mixtures import score_mixtures
from lorchestra.evaluate.score import Domain, Scores, score
from lorchestra.evaluate.slope import Slope, slope
from lorchestra.events import SILENT, Reporter
from lorchestra.fusion.groups import members_by_layer_groups
from lorchestra.fusion.search import DEFAULT, Candidate, Space, Weights, search, weights_key
from lorchestra.objective.batch import length
from lorchestra.pipeline.cache import SCRATCH

KEPT = "scores.jsonl"
TOGETHER = 4  # candidates that share a forward pass at most …
SHARED = 2048  # … and only while a domain has fewer positions than this: a pass that is full gains nothing
PENALTY = 10.0  # what crossing the goal's limit costs a candidate in the eyes of the strategy


@dataclass(frozen=True)
class SearchPlan:
    """How to search; what it says is all that a search depends on beside its inputs.

    Args:
        strategy: a name of :data:`lorchestra.fusion.search.STRATEGIES`.
        budget: forward passes over λ-validation; ``None`` for the strategy's own.
        goal: of the domains together.
        seed: of what is drawn.
        layer_groups: λ for so many groups of layers, drawn towards each adapter's common λ; 1 for one λ an adapter.
        shrinkage: how strongly.
        low: of every λ.
        high: of every λ.
        step: of the simplex grid.
        totals: Σλ of the grid's simplices.
    """

    strategy: str = DEFAULT
    budget: int | None = None
    goal: Goal = field(default_factory=Goal)
    seed: int = 0
    layer_groups: int = 1
    shrinkage: float = 0.1
    low: float = 0.0
    high: float = 2.0
    step: float = 0.1
    totals: tuple[float, ...] = (1.0,)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for a step's digest."""
        return {**asdict(self), "totals": list(self.totals)}


@dataclass(frozen=True)
class Searched:
    """What a search found, in the order tried.

    Args:
        candidates: coefficients (of the members; with layer groups of their parts), origin, score.
        scores: of each candidate: domain → per-item scores.
        reference: the base's.
        slopes: gradients that were taken beside them.
    """

    candidates: tuple[Candidate, ...]
    scores: tuple[dict[str, Scores], ...]
    reference: dict[str, Scores]
    slopes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "scores": [_plain(found) for found in self.scores],
            "reference": _plain(self.reference),
            "slopes": self.slopes,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Searched:
        """What :meth:`as_dict` gave."""
        return cls(
            tuple(Candidate(c["weights"], c["origin"], c["score"]) for c in value["candidates"]),
            tuple(_scores(found) for found in value["scores"]),
            _scores(value["reference"]),
            int(value["slopes"]),
        )


def space_of(members: Mapping[str, Adapter], plan: SearchPlan) -> Space:
    """The box that ``plan`` searches, with the names of the members' parts."""
    parts: dict[str, tuple[str, ...]] = {}
    if plan.layer_groups > 1:
        for name, label in members_by_layer_groups(members, plan.layer_groups):
            parts[name] = (*parts.get(name, ()), part_name(name, label))
    return Space(members, parts, plan.low, plan.high, plan.step, plan.totals, plan.shrinkage)


def parts_of(members: Mapping[str, Adapter], plan: SearchPlan) -> dict[str, Adapter]:
    """What is mounted: the members, or with layer groups their parts, by the names that candidates' weights have."""
    if plan.layer_groups <= 1:
        return dict(members)
    found = members_by_layer_groups(members, plan.layer_groups)
    return {part_name(name, label): part for (name, label), part in found.items()}


def part_name(member: str, label: str) -> str:
    """``clinic:layers.0-9``."""
    return f"{member}:{label}"


def search_weights(
    base: Base,
    members: Mapping[str, Adapter],
    domains: Mapping[str, Domain],
    betas: Mapping[str, float],
    plan: SearchPlan,
    work: Path,
    reporter: Reporter = SILENT,
) -> Searched:
    """Search λ on ``domains`` (λ-validation; nothing else is read).

    Args:
        base: loaded and frozen.
        members: name → adapter, in training order.
        domains: name → held-out items.
        betas: β of the preference domains.
        plan: how.
        work: a directory for what is kept: a killed search goes on from it to the very same outcome.
        reporter: progress, best so far.

    Raises:
        UserError: an unknown strategy, a grid beyond its budget, no finite score.
        AdapterError: a member does not fit the base.
        Interrupted: Ctrl-C; what was scored is kept.
    """
    bank = Bank(base.model, base.id)
    try:
        for name, adapter in parts_of(members, plan).items():
            bank.load(name, adapter)
        space = space_of(members, plan)
        singles = [point.weights for point in space.fixed() if point.origin == "single"]
        objective = _Validation(bank, domains, betas, plan.goal, base.pad_id, singles, _Memory(work))
        found = search(space, objective, strategy=plan.strategy, budget=plan.budget, seed=plan.seed, reporter=reporter)
    except KeyboardInterrupt:
        raise Interrupted("stopped; what was scored is kept, and the same command goes on from there") from None
    finally:
        bank.unmount()
    scores = tuple(objective.memory.scores[weights_key(c.weights)] for c in found.candidates)
    return Searched(found.candidates, scores, objective.reference, found.slopes)


class _Memory:
    """Scores and slopes by :func:`weights_key`, kept line by line: what was computed together is one line, so a torn
    last line is computed again in the same company, to the same bits."""

    def __init__(self, work: Path) -> None:
        self.path = work / SCRATCH / KEPT
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.scores: dict[str, dict[str, Scores]] = {}
        self.slopes: dict[str, Slope] = {}
        whole = b""
        if self.path.exists():
            whole = self.path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            with self.path.open("r+b") as stream:  # what a kill tore is cut off, and the next line stands alone
                stream.truncate(len(whole))
        for line in whole.splitlines():
            self._learn(json.loads(line))

    def keep(self, line: dict[str, Any]) -> None:
        """Remember, here and on disk."""
        self._learn(line)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _learn(self, line: Mapping[str, Any]) -> None:
        for key, found in line.get("scores", {}).items():
            self.scores[key] = _scores(found)
        for key, found in line.get("slopes", {}).items():
            self.slopes[key] = Slope(found["ratios"], found["jacobian"])


class _Validation:
    """The loss on λ-validation as the search sees it (:class:`lorchestra.fusion.search.Objective`)."""

    def __init__(
        self,
        bank: Bank,
        domains: Mapping[str, Domain],
        betas: Mapping[str, float],
        goal: Goal,
        pad_id: int,
        singles: Sequence[Weights],
        memory: _Memory,
    ) -> None:
        self.bank, self.domains, self.betas, self.goal, self.pad_id = bank, domains, betas, goal, pad_id
        self.singles, self.memory = singles, memory

    @property
    def reference(self) -> dict[str, Scores]:
        """The base's scores; it is one of the fixed points."""
        return self.memory.scores[weights_key({})]

    def values(self, points: Sequence[Weights]) -> Iterator[float]:
        """See :class:`Objective`. The base, which all losses are divided by, and the single adapters, from which the
        goal's limit is measured, are among the fixed points: in that first call they are scored first."""
        measures = {weights_key(point) for point in ({}, *self.singles)}
        new = [point for point in points if weights_key(point) not in self.memory.scores]
        new.sort(key=lambda point: weights_key(point) not in measures)
        chunks = iter([new[start : start + TOGETHER] for start in range(0, len(new), TOGETHER)])
        for point in points:
            while not {weights_key(point), *measures} <= self.memory.scores.keys():
                together = next(chunks)
                found = self._measured(together)
                lines = {weights_key(each): _plain(scores) for each, scores in zip(together, found, strict=True)}
                self.memory.keep({"scores": lines})
            yield self._value(self._ratios(point))

    def slope(self, point: Weights) -> tuple[float, Weights]:
        """See :class:`Objective`."""
        key = weights_key(point)
        if key not in self.memory.slopes:
            found = slope(self.bank, self.domains, point, self.reference, self.betas, self.pad_id)
            self.memory.keep({"slopes": {key: asdict(found)}})
        known = self.memory.slopes[key]
        shares = self.goal.shares(known.ratios)
        if self._excess(known.ratios) > 0:
            best = {name: min(single[name] for single in map(self._ratios, self.singles)) for name in shares}
            worst = max(shares, key=lambda name: known.ratios[name] - best[name])
            shares[worst] += PENALTY
        gradient = np.sum([share * np.array(known.jacobian[name]) for name, share in shares.items()], axis=0)
        return self._value(known.ratios), dict(zip(point, map(float, gradient), strict=True))

    def _measured(self, points: Sequence[Weights]) -> list[dict[str, Scores]]:
        out: list[dict[str, Scores]] = [{} for _ in points]
        for name, domain in self.domains.items():
            if len(points) > 1 and sum(map(length, domain.items)) < SHARED:
                together = score_mixtures(self.bank, domain, points, self.pad_id)
            else:
                together = [self._alone(domain, point) for point in points]
            for found, scores in zip(out, together, strict=True):
                found[name] = scores
        return out

    def _alone(self, domain: Domain, point: Weights) -> Scores:
        with self.bank.using(dict(point)):
            return score(self.bank.model, domain, self.pad_id)

    def _ratios(self, point: Weights) -> dict[str, float]:
        return loss_ratios(self.memory.scores[weights_key(point)], self.reference, self.betas)

    def _excess(self, ratios: Mapping[str, float]) -> float:
        return self.goal.excess(ratios, [self._ratios(single) for single in self.singles])

    def _value(self, ratios: Mapping[str, float]) -> float:
        return self.goal.value(ratios) + PENALTY * self._excess(ratios)


def _plain(scores: Mapping[str, Scores]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in scores.items()}


def _scores(value: Mapping[str, Any]) -> dict[str, Scores]:
    return {name: Scores.from_dict(found) for name, found in value.items()}
