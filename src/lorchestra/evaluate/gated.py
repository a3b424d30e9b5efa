"""The verdict on a gate: on the sealed test, against every choice that is the same for all prompts, and an oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.metrics import MEAN, Difference, Row, differences, metrics, overall, ratio_draws, smallest
from lorchestra.evaluate.reasons import mixture
from lorchestra.evaluate.score import Scores
from lorchestra.evaluate.verdict import ALL
from lorchestra.stats.intervals import Interval, interval_of

BASE, STATIC, ORACLE, GATE = "base", "static", "oracle", "gate"
UNSEEN = 5e-4  # a difference that a tenth of a per cent does not show
Array = NDArray[np.float64]


@dataclass(frozen=True)
class GateVerdict:
    """Whether the gate is worth more than static coefficients; everything becomes plain JSON by :meth:`as_dict`.

    Args:
        sentence: for people.
        notes: what it rests on.
        kept: it beat base, static coefficients and every other rival beyond the interval.
        models: base, rivals, static, oracle, gate.
        domains: of the sealed test.
        rows: metrics of every model in every domain, and loss / base loss of all together.
        differences: gate minus each other model.
        behind_oracle: (loss of the gate − of the oracle) / of the oracle, where there is an oracle.
    """

    sentence: str
    notes: tuple[str, ...]
    kept: bool
    models: tuple[str, ...]
    domains: tuple[str, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    behind_oracle: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "sentence": self.sentence,
            "notes": list(self.notes),
            "kept": self.kept,
            "evaluation": {
                "models": list(self.models),
                "domains": list(self.domains),
                "rows": [row.as_dict() for row in self.rows],
                "differences": [difference.as_dict() for difference in self.differences],
            },
        }


def judge_gate(
    scores: Mapping[str, Mapping[str, Scores]],
    *,
    betas: Mapping[str, float],
    static: Mapping[str, float],
    oracle: Mapping[str, Mapping[str, float]],
    goal: Goal = MEAN,
    delivers: bool = True,
) -> GateVerdict:
    """Compare a gate with everything that treats all prompts alike, and with an oracle that is told the domain.

    The gate is kept if it beats each of its rivals beyond a 95 % interval. That is an intersection of tests: it is
    wrongly kept at most as often as the single test that is hardest to pass, so nothing is corrected for their number
    (Berger 1982, "Multiparameter hypothesis testing and acceptance sampling").

    Args:
        scores: model → domain → scores; ``base``, ``static`` and ``gate`` are among the models, ``oracle`` may be, with
            some of the domains; all others are rivals.
        betas: domain → β of the preference domains.
        static: the coefficients of ``static``.
        oracle: domain → the coefficients of ``oracle`` there.
        goal: what the domains' losses are to become together.
        delivers: the verdict decides what a run delivers; else it is advice on examples that somebody held out.
    """
    base = scores[BASE]
    rivals = [model for model in scores if model not in (BASE, STATIC, ORACLE, GATE)]
    models = [BASE, *rivals, STATIC, *([ORACLE] if scores.get(ORACLE) else []), GATE]
    meant = goal if goal.counts_in(base) else MEAN
    groups = smallest(base)
    ratios = {model: ratio_draws(scores[model], base, betas) for model in models if model != ORACLE}
    draws = {model: meant.combined(found) for model, found in ratios.items()}
    against = {model: overall(draws[GATE], draws[model], groups) for model in draws if model != GATE}
    known = scores.get(ORACLE, {})
    told = {model: _within(scores[model], base, known, betas, meant) for model in (ORACLE, GATE)} if known else {}
    rows = [row for model in models for domain, found in scores[model].items() for row in metrics(model, domain, found)]
    rows += [Row(model, ALL, "loss_ratio", interval_of(found, groups)) for model, found in draws.items()]
    pairs = [
        difference
        for model in models
        if model != GATE
        for domain, found in scores[model].items()
        for difference in differences(GATE, model, domain, scores[GATE][domain], found)
    ]
    pairs += [Difference(GATE, model, ALL, "loss_ratio", found) for model, found in against.items()]
    behind = None
    if told:
        few = smallest({name: base[name] for name in known})
        behind = interval_of(told[GATE] / told[ORACLE] - 1, few)
        if len(known) == len(base):
            rows.append(Row(ORACLE, ALL, "loss_ratio", interval_of(told[ORACLE], few)))
            pairs.append(Difference(GATE, ORACLE, ALL, "loss_ratio", overall(told[GATE], told[ORACLE], few)))
    kept = all(found.high < 0 for found in against.values())
    return GateVerdict(
        _sentence(kept, against, draws, static, behind, delivers),
        tuple(_notes(pairs, against, oracle if known else {}, len(known) < len(base), goal, meant, groups, delivers)),
        kept,
        tuple(models),
        tuple(base),
        tuple(rows),
        tuple(pairs),
        behind,
    )


def _within(
    scores: Mapping[str, Scores], base: Mapping[str, Scores], domains: Mapping[str, Scores],
    betas: Mapping[str, float], goal: Goal,
) -> Array:  # fmt: skip
    """The goal's draws on ``domains`` alone; those of two models are paired."""
    inside = {name: base[name] for name in domains}
    meant = goal if goal.counts_in(inside) else MEAN
    return meant.combined(ratio_draws({name: scores[name] for name in domains}, inside, betas))


def _sentence(
    kept: bool,
    against: Mapping[str, Interval],
    draws: Mapping[str, Array],
    static: Mapping[str, float],
    behind: Interval | None,
    delivers: bool,
) -> str:
    found = against[STATIC]
    change = f"{abs(found.estimate):.1%} of the base's {'below' if found.estimate < 0 else 'above'}"
    spread = f"95 % interval {_signed(found.low)} to {_signed(found.high)}"
    weights = f"the static weights ({mixture(static)})"
    beside = f"its {'sealed-test ' if delivers else ''}loss is {change} that of {weights} ({spread})"
    oracle = ""
    if behind is not None:
        side = "above" if behind.estimate >= 0 else "below"
        said = f"{abs(behind.estimate):.1%} {side}" if abs(behind.estimate) >= UNSEEN else "no more than 0.05% from"
        oracle = f"; it is {said} an oracle that knows the domain ({_signed(behind.low)} to {_signed(behind.high)})"
    if kept:
        all_alike = "the base and every choice that is the same for all prompts"
        return f"The gate is {'kept' if delivers else 'worth having'}: {beside}, and it beats {all_alike}{oracle}."
    no = f"The gate is not {'kept' if delivers else 'worth having'}"
    static_stays = f"delivered are {weights}, which are the default" if delivers else "take those"
    if found.low > 0:
        return f"{no}: it is worse than the static weights, {beside}{oracle}; {static_stays}."
    if found.high >= 0:
        return (
            f"{no}: it cannot be told from {weights} (difference {_signed(found.estimate)} of the "
            f"base's loss, {_signed(found.low)} to {_signed(found.high)}){oracle}; "
            + ("those are the default, and are delivered." if delivers else "those are simpler, take them.")
        )
    unbeaten = {model: interval for model, interval in against.items() if interval.high >= 0}
    best = min(unbeaten, key=lambda model: float(draws[model][0]))
    other = unbeaten[best]
    return (
        f"{no}: {beside}, but it does not beat {_called(best)} (difference {_signed(other.estimate)}, "
        f"{_signed(other.low)} to {_signed(other.high)}){oracle}; "
        + ("the static weights stay what is delivered." if delivers else f"take {_called(best)}.")
    )


def _notes(
    pairs: Sequence[Difference],
    against: Mapping[str, Interval],
    oracle: Mapping[str, Mapping[str, float]],
    partly: bool,
    goal: Goal,
    meant: Goal,
    groups: int,
    delivers: bool,
) -> list[str]:
    notes = []
    if goal != meant:
        notes.append(
            "No domain that counts in the goal has a sealed test; judged is the mean over those that have one."
        )
    elif goal.kind != "mean":
        notes.append(f"Judged is {goal}.")
    by_domain = [d for d in pairs if d.b == STATIC and d.metric == "nll" and d.domain != ALL]
    if by_domain:
        words = {True: "better", False: "worse", None: "not told apart"}
        said = "; ".join(f"{d.domain!r} {words[d.better]} ({d.interval} nats a token)" for d in by_domain)
        notes.append(f"Domain by domain against the static weights, the gate is: {said}.")
    if oracle:
        told = "; ".join(f"{domain!r}: {mixture(weights)}" for domain, weights in oracle.items())
        where = " It is measured on these domains alone." if partly else ""
        on = "λ-validation" if delivers else "the gate's own validation examples"
        notes.append(
            f"The oracle takes in each domain the coefficients with the lowest loss there on {on} ({told}).{where}"
        )
    found = against[STATIC]
    if groups < 2:
        notes.append("The smallest domain has one independent group: no difference whatever can be seen.")
    elif found.detectable:
        notes.append(
            f"With {groups} independent groups in the smallest domain, this test finds a true difference of "
            f"{found.detectable:.1%} of the base's loss from the static weights in four cases of five."
        )
    return notes


def _called(model: str) -> str:
    return {
        BASE: "the base",
        "stack": "the last stage with its context (stack)",
        "uniform": "equal weights (uniform)",
        "mixed": "one adapter trained on the mixed data",
    }.get(model, f"{model!r} alone")


def _signed(value: float) -> str:
    return f"{value:+.1%}" if math.isfinite(value) else f"{'+' if value > 0 else '−'}∞"
