"""What a version must have shown before an alias is moved to it.

As text: ``loss<=1.2`` (a metric of it), ``not-worse:loss`` (against what the alias leads to now, on the same sealed
test), ``requires:data`` (or ``lineage``, ``base``, ``recipe``, ``sealed``: something its manifest must tell).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorchestra.errors import UserError
from lorchestra.registry.manifest import Manifest, Metric
from lorchestra.registry.mistakes import PromotionRefused

OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_THRESHOLD = re.compile(r"([^<>=\s:]{1,128})\s*(<=|>=|<|>)\s*(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)")
FORMS = "loss<=1.2, accuracy>=0.9, not-worse:loss, requires:data"


@dataclass(frozen=True)
class Outcome:
    """What a gate said.

    Args:
        gate: as text.
        passed: whether it lets the version through.
        measured: what was found.
        asked: what was to be found.
    """

    gate: str
    passed: bool
    measured: str
    asked: str

    def __str__(self) -> str:
        return f"{self.gate}: {'passed' if self.passed else 'refused'}; measured {self.measured}, asked {self.asked}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for the audit log."""
        return {"gate": self.gate, "passed": self.passed, "measured": self.measured, "asked": self.asked}


class Gate(Protocol):
    """Something that lets a version through or not."""

    def check(self, candidate: Manifest, current: Manifest | None) -> Outcome:
        """Whether ``candidate`` may take the place of ``current`` (``None``: the alias leads nowhere yet).

        Raises:
            UserError: the gate makes no sense for what was measured.
        """
        ...


@dataclass(frozen=True)
class Threshold:
    """A metric of the candidate beyond a bound, in the direction that is better for it.

    Args:
        metric: its name.
        sign: ``<=``, ``<``, ``>=`` or ``>``.
        bound: a finite number.
    """

    metric: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}"

    def check(self, candidate: Manifest, current: Manifest | None) -> Outcome:
        """See :class:`Gate`. The estimate decides, not its interval.

        Raises:
            UserError: the bound is on the wrong side: an accuracy of at most 0.9.
        """
        asked = f"{self.sign} {self.bound:g}"
        found = candidate.metrics.get(self.metric)
        if found is None:
            return Outcome(str(self), False, _nothing(self.metric, candidate), asked)
        wanted = "<" if found.better == "lower" else ">"
        if self.sign[0] != wanted:
            raise UserError(
                f"gate {self}: {self.metric} is better when it is {found.better}, so this would let the worst through; "
                f"write {self.metric}{wanted}={self.bound:g}"
            )
        return Outcome(str(self), bool(OPERATORS[self.sign](found.value, self.bound)), _shown(found), asked)


@dataclass(frozen=True)
class NotWorse:
    """Not worse than what the alias leads to now, on the same sealed test.

    The rule: both manifests hold the metric, measured on a sealed test with the same digest; then the candidate's
    estimate may not lie beyond the end of the current version's interval on the bad side (above ``high`` where lower is
    better, below ``low`` where higher is), or beyond its estimate where it has no interval. There is no interval of
    the paired difference in a manifest, so this does not claim that the candidate is no worse, only that one reading
    of the same test does not show that it is. Anything missing refuses. The first version of an alias passes.

    Args:
        metric: its name.
    """

    metric: str

    def __str__(self) -> str:
        return f"not-worse:{self.metric}"

    def check(self, candidate: Manifest, current: Manifest | None) -> Outcome:
        """See :class:`Gate`."""
        if current is None:
            return Outcome(str(self), True, "no version before it", "not worse than the version before")
        ours, theirs = candidate.metrics.get(self.metric), current.metrics.get(self.metric)
        for found, manifest in ((ours, candidate), (theirs, current)):
            if found is None:
                return self._refused(_nothing(self.metric, manifest), current)
            if not found.sealed:
                return self._refused(
                    f"{manifest.reference} does not say on which sealed test (a run's own do)", current
                )
        assert ours is not None
        assert theirs is not None
        if ours.sealed != theirs.sealed:
            tests = f"{ours.sealed[:19]}… and {theirs.sealed[:19]}…"
            return self._refused(f"two different sealed tests ({tests})", current)
        if ours.better != theirs.better:
            return self._refused(f"{ours.better} is better in one and {theirs.better} in the other", current)
        if ours.better == "lower":
            end = theirs.value if theirs.high is None else theirs.high
            passed, sign = ours.value <= end, "<="
        else:
            end = theirs.value if theirs.low is None else theirs.low
            passed, sign = ours.value >= end, ">="
        asked = f"{sign} {end:g}, the worse end of {current.reference}'s {_shown(theirs)}"
        return Outcome(str(self), passed, _shown(ours), asked)

    def _refused(self, measured: str, current: Manifest) -> Outcome:
        return Outcome(str(self), False, measured, f"{self.metric} on the sealed test of {current.reference}")


@dataclass(frozen=True)
class Requires:
    """Something that the manifest must tell.

    Args:
        what: ``data`` (digests of its examples), ``lineage`` (made here, and of what), ``base`` (digest of the base's
            weights), ``recipe``, or ``sealed`` (a metric of a sealed test).
    """

    what: str

    def __post_init__(self) -> None:
        if self.what not in _REQUIRED:
            raise UserError(f"gate requires:{self.what}: there is requires:{', requires:'.join(_REQUIRED)}")

    def __str__(self) -> str:
        return f"requires:{self.what}"

    def check(self, candidate: Manifest, current: Manifest | None) -> Outcome:
        """See :class:`Gate`."""
        asked, holds = _REQUIRED[self.what]
        passed = holds(candidate)
        return Outcome(str(self), passed, "told" if passed else f"{candidate.reference} does not tell", asked)


_REQUIRED: Mapping[str, tuple[str, Callable[[Manifest], bool]]] = {
    "data": ("digests of the data it was trained on", lambda m: bool(m.data) and all(m.data.values())),
    "lineage": (
        "how it was made: a stage, or a fusion of parents that have digests",
        lambda m: (
            (m.made_by == "stage" and bool(m.stage))
            or (m.made_by == "fusion" and bool(m.parents) and all(p.digest for p in m.parents))
        ),
    ),
    "base": ("the digest of its base's weights", lambda m: bool(m.base.weights)),
    "recipe": ("the recipe it was made by", lambda m: bool(m.recipe)),
    "sealed": (
        "a metric of a sealed test",
        lambda m: any(found.split == "sealed" or found.sealed for found in m.metrics.values()),
    ),
}


def parse_gate(text: str) -> Gate:
    """A gate from its text.

    Raises:
        UserError: it is none; the message shows the forms.
    """
    kind, sign, rest = text.strip().partition(":")
    if sign and kind == "not-worse" and rest:
        return NotWorse(rest)
    if sign and kind == "requires":
        return Requires(rest)
    threshold = parse_threshold(text)
    if threshold is None:
        raise UserError(f"{text[:60]!r} is no gate; gates are {FORMS}")
    return Threshold(*threshold)


def parse_threshold(text: str) -> tuple[str, str, float] | None:
    """Name, sign and bound of ``loss<=1.2``; ``None`` if it is not of that form."""
    found = _THRESHOLD.fullmatch(text.strip())
    if found is None:
        return None
    bound = float(found[3])
    return None if abs(bound) == float("inf") else (found[1], found[2], bound)


def check_gates(gates: Sequence[Gate], candidate: Manifest, current: Manifest | None) -> tuple[Outcome, ...]:
    """What each gate says, in their order."""
    return tuple(gate.check(candidate, current) for gate in gates)


def refuse(outcomes: Sequence[Outcome], candidate: Manifest, alias: str) -> None:
    """Nothing, if all passed.

    Raises:
        PromotionRefused: it lists each gate with what was measured and asked.
    """
    refused = [outcome for outcome in outcomes if not outcome.passed]
    if refused:
        lines = "\n".join(f"  {outcome}" for outcome in outcomes)
        raise PromotionRefused(
            f"{candidate.reference} is not moved to {candidate.name}@{alias}: {len(refused)} of {len(outcomes)} gates "
            f"refused it\n{lines}\nMend what was measured, or move it all the same with --force --why REASON",
            outcomes,
        )


def _shown(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return f"{metric.value:g}"
    return f"{metric.value:g} ({metric.low:g} to {metric.high:g})"


def _nothing(name: str, manifest: Manifest) -> str:
    known = ", ".join(sorted(manifest.metrics)) or "none"
    return f"no {name} of {manifest.reference} (it has {known})"
