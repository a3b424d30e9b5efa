"""Choosing coefficients: the candidates, the article's heuristics, and a search that only calls back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import UserError
from lorchestra.events import SILENT, Reporter

Origin = Literal["stack", "single", "uniform", "base", "simplex"]
Weights = Mapping[str, float]
HEURISTICS = ("equal", "later", "specialised", "last")
# Total scales of the drawn points: from half an average (Σλ = 1) to 1.25 times the largest stack (near Σλ = K).
LEAST, MOST = 0.5, 1.25


@dataclass(frozen=True)
class Candidate:
    """Coefficients, where they come from, and (after the search) their score."""

    weights: Weights
    origin: Origin
    score: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"weights": dict(self.weights), "origin": self.origin, "score": self.score}


@dataclass(frozen=True)
class SearchResult:
    """All candidates with their scores, in the order tried, and the chosen one (lowest score)."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate


def weights_key(weights: Weights) -> str:
    """One text for equal coefficients: sorted, zeros left out, six digits."""
    return ",".join(f"{name}={weight:.6g}" for name, weight in sorted(weights.items()) if abs(weight) > 5e-7)


def stack_of(name: str, members: Mapping[str, Adapter]) -> dict[str, float] | None:
    """The sum that member ``name`` was trained in: itself at 1, its context at the final weights, the others at 0.

    ``None`` if an adapter of its context is not among the members (by digest): they cannot make up its stack. One that
    had faded to nothing is not missed.
    """
    digests = {adapter.digest: other for other, adapter in members.items()}
    point = dict.fromkeys(members, 0.0)
    for parent in members[name].lineage.context:
        if parent.digest not in digests:
            if parent.coefficient == 0:
                continue
            return None
        point[digests[parent.digest]] = parent.coefficient
    return {**point, name: 1.0}


def candidates(members: Mapping[str, Adapter], budget: int, seed: int = 0) -> list[Candidate]:
    """The points worth trying, without repetition.

    Always: every trained stack point (stages trained on an active context sit outside Σλ = 1), each single
    adapter, uniform 1/K and the base. Then, up to ``budget``, total scale × simplex: directions from a scrambled
    Sobol sequence mapped to the simplex, with totals from 0.5 to 1.25 times the largest stack's.

    Args:
        members: name → adapter, in training order.
        budget: how many; the fixed points are tried even if they are more.
        seed: of the drawn points.
    """
    names = list(members)
    found: dict[str, Candidate] = {}

    def add(weights: Weights, origin: Origin) -> None:
        found.setdefault(weights_key(weights), Candidate(dict(weights), origin))

    stacks = [stack for name in names if (stack := stack_of(name, members)) is not None]
    for stack in reversed(stacks):
        if sum(weight != 0 for weight in stack.values()) > 1:
            add(stack, "stack")
    for name in names:
        add({other: float(other == name) for other in names}, "single")
    if len(names) > 1:
        add(dict.fromkeys(names, 1 / len(names)), "uniform")
    add(dict.fromkeys(names, 0.0), "base")
    most = max([1.0, *(sum(stack.values()) for stack in stacks)])
    for point in _spread(len(names), max(budget - len(found), 0), most, seed):
        add(dict(zip(names, point, strict=True)), "simplex")
    return list(found.values())


def search(
    points: Sequence[Candidate],
    score: Callable[[Weights], float],
    *,
    known: Mapping[str, float] | None = None,
    reporter: Reporter = SILENT,
    on_score: Callable[[str, float], None] = lambda key, value: None,
) -> SearchResult:
    """Score every point, keep the lowest; ties go to the earlier point.

    Args:
        points: from :func:`candidates`.
        score: coefficients → loss on λ-validation (lower is better); one that is not finite counts as infinite.
        known: scores by :func:`weights_key` from an interrupted search; they are not computed again.
        reporter: progress, with the best score so far.
        on_score: hears every new score, so that the caller can keep it.

    Raises:
        UserError: no points, or a score that is not finite everywhere.
    """
    if not points:
        raise UserError("a search needs at least one candidate")
    scores = dict(known or {})
    done: list[Candidate] = []
    best = math.inf
    with reporter.task("search weights", len(points), "candidate") as task:
        for point in points:
            key = weights_key(point.weights)
            if key not in scores:
                found = float(score(point.weights))
                scores[key] = found if math.isfinite(found) else math.inf
                on_score(key, scores[key])
            done.append(Candidate(point.weights, point.origin, scores[key]))
            reporter.event("candidate", weights=dict(point.weights), score=scores[key], origin=point.origin)
            best = min(best, scores[key])
            task.advance(1, best=best)
    if not math.isfinite(best):
        raise UserError("no candidate has a finite score; the adapters or the validation data are damaged")
    return SearchResult(tuple(done), next(c for c in done if c.score == best))


def heuristic(name: str, members: Mapping[str, Adapter]) -> dict[str, float]:
    """The article's rules of thumb, made exact for K members in training order.

    ``equal``: λᵢ = 1/K (stages of different kinds). ``later``: λᵢ ∝ i (a later stage that builds on an earlier
    one weighs more). ``specialised``: λᵢ ∝ 1, but the first (general) stage at half (so that it does not drown what
    came after). All sum to 1. ``last``: the last member's stack, as it was trained.

    Raises:
        UserError: an unknown name; ``last`` without the whole context of the last member.
    """
    names = list(members)
    K = len(names)
    if name == "last":
        stack = stack_of(names[-1], members)
        if stack is None:
            context = ", ".join(parent.name for parent in members[names[-1]].lineage.context)
            raise UserError(
                f"{names[-1]!r} was trained beside {context}, which are not all members; make them members of the "
                "fusion, or give weights"
            )
        return stack
    shares = {
        "equal": [1.0] * K,
        "later": [float(i + 1) for i in range(K)],
        "specialised": [0.5 if i == 0 and K > 1 else 1.0 for i in range(K)],
    }
    if name not in shares:
        raise UserError(f"unknown heuristic {name!r}; there are {', '.join(HEURISTICS)}")
    total = sum(shares[name])
    return {member: share / total for member, share in zip(names, shares[name], strict=True)}


def context_warnings(members: Mapping[str, Adapter], weights: Weights) -> list[str]:
    """Says where a member was trained in a context that ``weights`` do not reproduce.

    A later stage is conditional on its context; alone or beside other weights it was never trained.
    """
    warnings = []
    digests = {adapter.digest: name for name, adapter in members.items()}
    for name, adapter in members.items():
        own = weights.get(name, 0.0)
        if own == 0.0:
            continue
        for parent in adapter.lineage.context:
            present = digests.get(parent.digest)
            have = weights.get(present, 0.0) if present is not None else 0.0
            want = parent.coefficient * own
            if abs(have - want) > 0.05 * max(abs(want), abs(have), 1e-12) and max(abs(want), abs(have)) > 1e-3:
                trained = f"{name} was trained beside {parent.name} at {parent.coefficient:g}"
                if present is None:
                    warnings.append(f"{trained}, which is no member of this mixture")
                else:
                    warnings.append(f"{trained}; with {name} at {own:g} that is {want:g}, but it is {have:g} here")
    return warnings


def _spread(K: int, count: int, most: float, seed: int) -> list[list[float]]:
    if count == 0:
        return []
    from scipy.stats import qmc

    size = 1 << max(count - 1, 0).bit_length()
    unit = qmc.Sobol(K + 1, seed=seed).random(size)[:count]
    shares = -np.log(np.clip(unit[:, :K], 1e-9, 1 - 1e-9))
    shares /= shares.sum(axis=1, keepdims=True)
    totals = LEAST + (MOST * most - LEAST) * unit[:, K]
    return [[round(float(v), 4) for v in row] for row in shares * totals[:, None]]
