"""Which of many candidates to take, and what that choice is worth on items it has not seen.

The best of many candidates on a few items looks better than it is. Against this stand the one-standard-error rule
(Breiman, Friedman, Olshen and Stone 1984, §3.4.3; Hastie, Tibshirani and Friedman, *The Elements of Statistical
Learning*, §7.10), which takes the simplest candidate that the best cannot be told from, and an estimate of the whole
procedure by repeated group-wise cross-validation: choose on some folds, score on the one left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lorchestra.evaluate.goal import Goal, undominated
from lorchestra.evaluate.metrics import finite_or_none, flat, loss_table
from lorchestra.evaluate.score import Scores
from lorchestra.fusion.search import Candidate
from lorchestra.stats.folds import group_folds
from lorchestra.stats.intervals import Interval, student
from lorchestra.stats.ratios import Array, RatioTable, standard_error

Rule = Literal["one_se", "minimum"]
RULES: tuple[Rule, ...] = get_args(Rule)
# From simple to intricate, by the first word of a candidate's origin; what a search proposed comes after all these.
SIMPLICITY = ("base", "single", "stack", "uniform", "drop", "heuristic")
INTRICATE = "layer groups"  # a weight for every group of layers: more numbers than any other has
# Origins whose points were fixed before λ-validation was looked at; the others followed its scores.
BLIND = (*SIMPLICITY, "grid", "sobol", "simplex")


@dataclass(frozen=True)
class Standing:
    """One candidate on λ-validation.

    Args:
        candidate: coefficients and origin.
        value: the goal's value; the interval is of the level, by which candidates must not be compared.
        ratios: domain → loss / base loss.
        behind: the value minus the lowest one, on the same items; paired.
        excess: by how much a domain crosses the goal's limit; 0 if none does.
        undominated: no other candidate is at least as good in every domain and better in one.
        picked: share of the folds (of all repeats) in which the rule chose it without that fold.
    """

    candidate: Candidate
    value: Interval
    ratios: Mapping[str, Interval]
    behind: Interval
    excess: float
    undominated: bool
    picked: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **self.candidate.as_dict(),
            **flat(self.value),
            "score": self.value.estimate,
            "ratios": {name: flat(interval) for name, interval in self.ratios.items()},
            "behind": flat(self.behind),
            "error": finite_or_none(self.behind.error),
            "excess": self.excess,
            "undominated": self.undominated,
            "picked": self.picked,
        }


@dataclass(frozen=True)
class Worth:
    """What choosing by a rule is worth.

    Args:
        rule: of choosing.
        taken: number of the candidate that it takes on all items.
        naive: the taken candidate's value on the very items it was chosen on.
        honest: the value on folds that the choice had not seen. The folds share most of what they choose on, which the
            interval allows for as Nadeau and Bengio do (2003, "Inference for the generalization error", §3).
        optimism: honest − naive, item by item.
    """

    rule: Rule
    taken: int
    naive: float
    honest: Interval
    optimism: Interval

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "rule": self.rule,
            "taken": self.taken,
            "naive": self.naive,
            "honest": flat(self.honest),
            "optimism": flat(self.optimism),
        }


@dataclass(frozen=True)
class Selection:
    """The choice.

    Args:
        standings: of every candidate with finite scores, in the order given; the numbers below are places here.
        chosen: number of the candidate that the rule takes.
        adapters: number of the one it takes when the base alone may not be taken: what can be delivered.
        minimum: number of the one with the lowest value (among those that keep the goal's limit).
        rule: that was applied.
        goal: that was pursued.
        worth: of every rule; empty where a domain has too few groups for two folds.
        folds: K.
        repeats: how often the groups were dealt to folds anew.
        groups: domain → number of its groups.
        items: scored per candidate.
    """

    standings: tuple[Standing, ...]
    chosen: int
    adapters: int
    minimum: int
    rule: Rule
    goal: Goal
    worth: tuple[Worth, ...]
    folds: int
    repeats: int
    groups: Mapping[str, int]
    items: int

    @property
    def kept(self) -> bool:
        """Whether some candidate keeps the goal's limit."""
        return any(standing.excess == 0 for standing in self.standings)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, candidates apart (they are the :class:`Standing` of each)."""
        return {
            "rule": self.rule,
            "goal": str(self.goal),
            "tolerance": self.goal.tolerance,
            "chosen": self.chosen,
            "adapters": self.adapters,
            "minimum": self.minimum,
            "folds": self.folds,
            "repeats": self.repeats,
            "groups": dict(self.groups),
            "worth": [worth.as_dict() for worth in self.worth],
        }


def select(
    candidates: Sequence[Candidate],
    scores: Sequence[Mapping[str, Scores]],
    reference: Mapping[str, Scores],
    goal: Goal,
    betas: Mapping[str, float],
    folds: int = 5,
    repeats: int = 10,
    seed: int = 0,
    rule: Rule = "one_se",
) -> Selection:
    """Choose a candidate on λ-validation.

    ``minimum`` takes the lowest value. ``one_se`` takes the simplest candidate within one standard error of it: the
    base, then a single adapter, the stack a stage was trained in, uniform weights, the stack without a stage, a rule of
    thumb, a searched point; among equally simple ones the lowest. Two things differ from the books:

    - The standard error is that of the *paired difference*, not that of the level. All candidates answered the same
      items, so the spread of the items' difficulty, which makes most of the level's error, cancels in the difference.
      By the level's error everything would be within one standard error, the base included.
    - What it is measured from is the cross-validated worth of taking the lowest (:class:`Worth`), not the lowest value
      itself: of many candidates that is flattered by more than a standard error. If every fold agrees on the lowest,
      the two are the same.

    Candidates that cross the goal's limit are out; if all do, those that cross it least are in.

    The candidates themselves are taken as given. Where a strategy followed λ-validation to find them, the estimates of
    :class:`Worth` cover the choice among them and not the finding.

    Args:
        candidates: with their origins.
        scores: of each: domain → scores on the same items.
        reference: the base's.
        goal: what is to become small.
        betas: β of the preference domains.
        folds: K; fewer if the smallest domain has fewer groups.
        repeats: how often the groups are dealt to folds anew; every item is held out once in each.
        seed: of the dealing.
        rule: of choosing.

    Raises:
        ValueError: no candidates, or none with finite scores.
    """
    if not candidates or len(candidates) != len(scores):
        raise ValueError(f"a choice needs candidates, each with its scores; got {len(candidates)} and {len(scores)}")
    every = loss_table(scores, reference, betas)
    sound = [c for c in range(len(candidates)) if np.isfinite(every.tops[:, c]).all()]
    if not sound:
        raise ValueError("no candidate has finite scores; the adapters or the validation data are damaged")
    table = replace(every, tops=every.tops[:, sound])
    field = _Field([candidates[c] for c in sound], list(reference), goal)
    n = table.groups
    parts = min(folds, n)
    dealt = np.zeros((1, table.present.shape[1]), dtype=np.int64)
    if parts >= 2:
        dealt = group_folds(table.present, parts, repeats, seed)
    ours = _Look(field, table, dealt)
    worth, picked = _worth(ours, rule) if parts >= 2 else ((), np.zeros(len(field.candidates)))
    minimum = ours.take("minimum")
    levels = standard_error(ours.spread, n)
    behind = standard_error(ours.spread - ours.spread[minimum], n)
    by_domain = standard_error(ours.influence, n)
    excess = field.excess(ours.ratios)
    front = undominated([dict(zip(reference, map(float, column), strict=True)) for column in ours.ratios.T])
    standings = [
        Standing(
            candidate,
            student(float(ours.values[c]), float(levels[c]), n),
            {name: student(float(ours.ratios[d, c]), float(by_domain[d, c]), n) for d, name in enumerate(reference)},
            student(float(ours.values[c] - ours.values[minimum]), float(behind[c]), n),
            float(excess[c]),
            front[c],
            float(picked[c]),
        )
        for c, candidate in enumerate(field.candidates)
    ]
    return Selection(
        tuple(standings),
        chosen=ours.take(rule),
        adapters=ours.take(rule, field.adapters),
        minimum=minimum,
        rule=rule,
        goal=goal,
        worth=worth,
        folds=parts if worth else 0,
        repeats=repeats if worth else 0,
        groups=dict(zip(reference, map(int, table.present.sum(axis=1)), strict=True)),
        items=sum(len(found) for found in reference.values()),
    )


def simplicity(origin: str) -> int:
    """Place in the order of simplicity, 0 for the base."""
    if origin == INTRICATE:
        return len(SIMPLICITY) + 1
    word = origin.split()[0]
    return SIMPLICITY.index(word) if word in SIMPLICITY else len(SIMPLICITY)


def blind(origin: str) -> bool:
    """Whether such a candidate was fixed before λ-validation was looked at."""
    return origin != INTRICATE and origin.split()[0] in BLIND


class _Field:
    """The candidates, as far as no item is concerned."""

    def __init__(self, candidates: Sequence[Candidate], names: Sequence[str], goal: Goal) -> None:
        self.candidates, self.names, self.goal = candidates, names, goal
        self.rank = np.array([simplicity(candidate.origin) for candidate in candidates])
        self.everyone = np.ones(len(candidates), dtype=bool)
        adapters = np.array([candidate.origin != "base" for candidate in candidates])
        self.adapters = adapters if adapters.any() else self.everyone
        self.singles = np.array([candidate.origin == "single" for candidate in candidates])

    def values(self, ratios: Array) -> Array:
        """``[C, …]`` the goal's value of ratios ``[D, C, …]``."""
        return self.goal.combined(dict(zip(self.names, ratios, strict=True)))

    def spread(self, ratios: Array, influence: Array) -> Array:
        """``[C, G]`` influence of every group on the goal's value, from that on the ratios ``[D, C, G]``."""
        slopes = self.goal.slopes(dict(zip(self.names, ratios, strict=True)))
        return np.asarray(np.einsum("dc,dcg->cg", np.stack(list(slopes.values())), influence))

    def excess(self, ratios: Array) -> Array:
        """``[C]`` by how much each of the candidates crosses the goal's limit."""
        rows = [dict(zip(self.names, map(float, column), strict=True)) for column in ratios.T]
        singles = [row for row, single in zip(rows, self.singles, strict=True) if single]
        return np.array([self.goal.excess(row, singles) for row in rows])

    def lowest(self, ratios: Array, values: Array, among: NDArray[np.bool_]) -> int:
        """Number of the lowest of ``among``, of those that keep the limit (or cross it least)."""
        return int(np.argmin(np.where(self.pool(ratios, among), values, np.inf)))

    def pool(self, ratios: Array, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``[C]`` which of ``among`` keep the goal's limit, or cross it least if all cross it."""
        if self.goal.tolerance is None:
            return among
        excess = self.excess(ratios)
        return np.asarray(among & (excess <= excess[among].min() + 1e-12))


class _Look:
    """The candidates on some items, whose groups are dealt to folds ``[repeats, G]`` (of which there may be one)."""

    def __init__(self, field: _Field, table: RatioTable, dealt: NDArray[np.int64]) -> None:
        self.field, self.table, self.dealt = field, table, dealt
        self.ratios, self.influence = table.ratios(), table.influence()
        self.values = field.values(self.ratios)
        self.spread = field.spread(self.ratios, self.influence)

    def take(self, rule: Rule, among: NDArray[np.bool_] | None = None) -> int:
        """Number of the candidate that ``rule`` takes."""
        among = self.field.everyone if among is None else among
        best = self.field.lowest(self.ratios, self.values, among)
        if rule == "minimum":
            return best
        worth, error = self._yardstick(best, among)
        near = self.field.pool(self.ratios, among) & (self.values - worth <= error)
        near[best] = True
        near &= self.field.rank == self.field.rank[near].min()
        return int(np.argmin(np.where(near, self.values, np.inf)))

    def unseen(self, fold: NDArray[np.int64], among: NDArray[np.bool_]) -> list[int]:
        """For each fold the candidate that is lowest without it."""
        member = fold[:, None] == np.arange(fold.max() + 1)  # [G, K]
        tops, bottoms = self.table.tops @ member, self.table.bottoms @ member
        left = bottoms.sum(axis=1, keepdims=True) - bottoms
        rest = tops.sum(axis=2, keepdims=True) - tops
        ratios = np.divide(rest, left[:, None], out=np.ones_like(rest), where=left[:, None] > 0)
        values = self.field.values(ratios)
        return [self.field.lowest(ratios[..., k], values[:, k], among) for k in range(member.shape[1])]

    def _yardstick(self, best: int, among: NDArray[np.bool_]) -> tuple[float, Array]:
        """What choosing the lowest is worth, and ``[C]`` the standard error of each candidate's difference to that."""
        n, values, squares = self.table.groups, [], []
        for fold in self.dealt:
            if fold.max() == 0:
                return float(self.values[best]), standard_error(self.spread - self.spread[best], n)
            value, spread = _pooled(self.field, self.table, fold, self.unseen(fold, among))
            values.append(value)
            squares.append(standard_error(self.spread - spread, n) ** 2)
        return float(np.mean(values)), np.sqrt(np.mean(squares, axis=0))


def _pooled(field: _Field, table: RatioTable, fold: NDArray[np.int64], taken: Sequence[int]) -> tuple[float, Array]:
    """The goal's value when every fold is scored by the candidate that was taken for it, and ``[G]`` influences."""
    tops = np.take_along_axis(table.tops, np.array(taken)[fold][None, None, :], axis=1)
    pooled = RatioTable(tops, table.bottoms, table.present)
    ratios = pooled.ratios()
    return float(field.values(ratios)[0]), field.spread(ratios, pooled.influence())[0]


def _worth(ours: _Look, rule: Rule) -> tuple[tuple[Worth, ...], Array]:
    """Choose by every rule without each fold, score on it; and the share of folds in which ``rule`` chose whom."""
    field, table, n = ours.field, ours.table, ours.table.groups
    folds = int(ours.dealt.max()) + 1
    picked = np.zeros(ours.values.size)
    found = []
    for each in RULES:
        naive = ours.take(each)
        values, squares = [], []
        for fold in ours.dealt:
            if each == "minimum":
                taken = ours.unseen(fold, field.everyone)
            else:
                taken = [_without(ours, fold, k).take(each) for k in range(folds)]
            if each == rule:
                picked += np.bincount(taken, minlength=picked.size)
            value, spread = _pooled(field, table, fold, taken)
            values.append(value)
            squares.append(standard_error(np.stack([spread, spread - ours.spread[naive]]), n) ** 2)
        # Nadeau and Bengio 2003: what the folds choose on overlaps, so the scores of the repeats are no news.
        level, paired = np.sqrt(np.mean(squares, axis=0) * (folds / (folds - 1) + 1 / len(ours.dealt)))
        mean, seen = float(np.mean(values)), float(ours.values[naive])
        found.append(Worth(each, naive, seen, student(mean, float(level), n), student(mean - seen, float(paired), n)))
    return tuple(found), picked / picked.sum()


def _without(ours: _Look, fold: NDArray[np.int64], k: int) -> _Look:
    """The same without fold ``k``: the folds that are left are those of the smaller table."""
    kept = fold != k
    left = fold[kept]
    return _Look(ours.field, ours.table.over(kept), (left - (left > k))[None])
