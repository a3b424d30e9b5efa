"""The points of a search that come from the members themselves: stacks, singles, the article's rules of thumb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import UserError

Weights = Mapping[str, float]
HEURISTICS = ("equal", "later", "specialised", "last")


@dataclass(frozen=True)
class Candidate:
    """Coefficients, where they come from, and (after the search) their score.

    ``origin`` is that of a fixed point (``stack``, ``drop``, ``single``, ``uniform``, ``base``) or the strategy that
    proposed it.
    """

    weights: Weights
    origin: str
    score: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"weights": dict(self.weights), "origin": self.origin, "score": self.score}


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


def candidates(members: Mapping[str, Adapter]) -> list[Candidate]:
    """The :func:`fixed_points` of ``members`` (name → adapter, in training order), which every search tries first."""
    return fixed_points(list(members), {name: stack_of(name, members) for name in members})


def fixed_points(names: Sequence[str], stacks: Mapping[str, Weights | None]) -> list[Candidate]:
    """Every trained stack (stages trained on an active context sit outside Σλ = 1), the largest first; that largest
    stack without one of its stages; each single adapter; uniform 1/K; the base; without repetition.

    Args:
        names: of the members, in training order.
        stacks: member → the sum it was trained in, as :func:`stack_of` gives it.
    """
    found: dict[str, Candidate] = {}

    def add(weights: Weights, origin: str) -> None:
        found.setdefault(weights_key(weights), Candidate(dict(weights), origin))

    trained = [stack for name in reversed(names) if (stack := stacks.get(name)) is not None and _parts(stack) > 1]
    for stack in trained:
        add(stack, "stack")
    for name in names:
        add({other: float(other == name) for other in names}, "single")
    if trained:
        largest = max(trained, key=_parts)
        for name in names:
            if largest[name]:
                add({**largest, name: 0.0}, "drop")
    if len(names) > 1:
        add(dict.fromkeys(names, 1 / len(names)), "uniform")
    add(dict.fromkeys(names, 0.0), "base")
    return list(found.values())


def largest_total(members: Mapping[str, Adapter]) -> float:
    """Σλ of the trained stack that has the most; 1 at least."""
    stacks = (stack_of(name, members) for name in members)
    return max([1.0, *(sum(stack.values()) for stack in stacks if stack is not None)])


def _parts(weights: Weights) -> int:
    return sum(weight != 0 for weight in weights.values())


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
