"""The verdict on the sealed test: what was delivered, against everything simpler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from lorchestra.evaluate.metrics import (
    Difference,
    Row,
    differences,
    loss_draws,
    metrics,
    overall,
    smallest,
    table,
)
from lorchestra.evaluate.score import Scores
from lorchestra.stats.intervals import Interval, interval_of

DELIVERED = "delivered"
FEW = 100  # groups in a domain below which a difference of a few points cannot be seen
ALL = "all domains"


@dataclass(frozen=True)
class Verdict:
    """The sentence, remarks, and the tables behind them; everything becomes plain JSON by :meth:`as_dict`."""

    sentence: str
    notes: tuple[str, ...]
    models: tuple[str, ...]
    domains: tuple[str, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report's ``verdict`` and ``evaluation``."""
        return {
            "verdict": {"sentence": self.sentence, "notes": list(self.notes)},
            "evaluation": {
                "models": list(self.models),
                "domains": list(self.domains),
                "rows": [row.as_dict() for row in self.rows],
                "differences": [difference.as_dict() for difference in self.differences],
            },
        }


def judge(
    scores: Mapping[str, Mapping[str, Scores]],
    *,
    stages: Sequence[str],
    betas: Mapping[str, float],
    recipe_of: str,
    same: Sequence[str] = (),
    budget: str = "",
    candidates: int = 0,
    validation_items: int = 0,
) -> Verdict:
    """Compare the delivered model with every other on the sealed test.

    Args:
        scores: model → domain → scores; ``base`` and ``delivered`` are among the models, the others are rivals.
        stages: the stages whose own domain is among the domains.
        betas: domain → β of the preference domains.
        recipe_of: what was delivered, in words (``0.3·general + 0.7·clinic``).
        same: rivals with the very coefficients of what was delivered; rounding alone tells them apart, so the sentence
            does not compare them.
        budget: what the mixed baseline and the stages were trained with (tokens, parameters).
        candidates: coefficients that were tried on λ-validation.
        validation_items: items each was tried on.
    """
    models = tuple(scores)
    domains = tuple(scores["base"])
    rows = [row for model in models for domain in domains for row in metrics(model, domain, scores[model][domain])]
    draws = {model: loss_draws(scores[model], scores["base"], betas) for model in models}
    groups = smallest(scores["base"])
    rows += [Row(model, ALL, "loss_ratio", interval_of(draws[model], groups)) for model in models]
    found = [
        difference
        for rival in models
        if rival != DELIVERED
        for domain in domains
        for difference in differences(DELIVERED, rival, domain, scores[DELIVERED][domain], scores[rival][domain])
    ]
    against = {rival: overall(draws[DELIVERED], draws[rival], groups) for rival in models if rival != DELIVERED}
    found += [Difference(DELIVERED, rival, ALL, "loss_ratio", interval) for rival, interval in against.items()]
    own = _own_domains(scores, stages)
    found += own
    notes = [
        *_stage_notes(own, table(rows, "nll")),
        *_preference_notes(rows, found, betas),
        *_staging_note(against, budget),
        *_size_notes(groups, candidates, validation_items, len(against)),
    ]
    named = f"{recipe_of}: {_called(same[0])}" if same else recipe_of
    sentence = _sentence(named, {rival: found for rival, found in against.items() if rival not in same}, draws)
    return Verdict(sentence, tuple(notes), models, domains, tuple(rows), tuple(found))


def _sentence(recipe_of: str, against: Mapping[str, Interval], draws: Mapping[str, NDArray[Any]]) -> str:
    base = against["base"]
    rivals = {name: interval for name, interval in against.items() if name != "base"}
    change = f"{abs(base.estimate):.1%} {'below' if base.estimate < 0 else 'above'} the base's"
    spread = f"95 % interval {_signed(base.low)} to {_signed(base.high)}"
    if base.low == base.high == 0:
        opening = (
            f"The delivered model ({recipe_of}) gives the same answers as the base: its sealed-test loss is the base's"
        )
    elif base.high < 0:
        opening = (
            f"The delivered model ({recipe_of}) is better than the base: its sealed-test loss is {change} ({spread})"
        )
    elif base.low > 0:
        opening = (
            f"The delivered model ({recipe_of}) is worse than the base: its sealed-test loss is {change} ({spread}); "
            "do not deploy it"
        )
    else:
        opening = (
            f"The delivered model ({recipe_of}) cannot be told from the base: "
            f"its sealed-test loss is {change} ({spread})"
        )
    if not rivals:
        return opening + "."
    winners = [name for name, interval in rivals.items() if interval.low > 0]
    unbeaten = [name for name, interval in rivals.items() if interval.high >= 0]
    best = min(winners or rivals, key=lambda name: float(draws[name][0]))
    interval = rivals[best]
    spread = f"difference {_signed(interval.estimate)}, {_signed(interval.low)} to {_signed(interval.high)}"
    link = "though" if base.low > 0 else "and"
    if winners:
        return f"{opening}; but {_called(best)} is better{' still' if base.high < 0 else ''} ({spread}): prefer it."
    if not unbeaten:
        return f"{opening}, {link} it beats every simpler choice, the best of which is {_called(best)} ({spread})."
    if interval.high < 0:
        others = " or ".join(map(_called, unbeaten))
        beaten = f"it beats {_called(best)}, the best simpler choice ({spread})"
        return f"{opening}, {link} {beaten}, but cannot be told from {others}."
    if interval.low == interval.high == 0:
        return f"{opening}; it gives the same answers as {_called(best)}, the best simpler choice."
    return f"{opening}; it cannot be told from {_called(best)}, the best simpler choice ({spread})."


def _own_domains(scores: Mapping[str, Mapping[str, Scores]], stages: Sequence[str]) -> list[Difference]:
    """Each stage against the base on its own domain, alone and (the last) with its context."""
    found = []
    for stage in stages:
        for model in (stage, "stack") if stage == stages[-1] else (stage,):
            if model in scores and stage in scores[model]:
                found += differences(model, "base", stage, scores[model][stage], scores["base"][stage])
    return found


def _stage_notes(own: Sequence[Difference], nll: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    notes = []
    for difference in own:
        if difference.metric != "nll":
            continue
        before, after = nll["base"][difference.domain], nll[difference.a][difference.domain]
        said = {True: "lowers", False: "raises", None: "does not measurably change"}[difference.better]
        who = f"Stage {difference.a}" if difference.a != "stack" else "The stack of the last stage"
        notes.append(
            f"{who} {said} the loss of {difference.domain!r}: {before.estimate:.3f} to {after.estimate:.3f} "
            f"nats a token (difference {difference.interval})."
        )
    return notes


def _preference_notes(rows: Sequence[Row], found: Sequence[Difference], betas: Mapping[str, float]) -> list[str]:
    notes = []
    for metric in ("preference_accuracy", "preference_accuracy_normalised"):
        by_model = table(rows, metric)
        for domain in betas:
            if domain not in by_model.get("base", {}):
                continue
            accuracy = {model: values[domain].estimate for model, values in by_model.items()}
            changed = next(
                (d for d in found if d.a == DELIVERED and d.b == "base" and d.domain == domain and d.metric == metric),
                None,
            )
            spread = f" (difference {changed.interval})" if changed else ""
            how = "per token" if metric.endswith("normalised") else "by summed log-probability"
            parts = [f"{model} {value:.2f}" for model, value in accuracy.items() if model != DELIVERED]
            notes.append(
                f"Preference accuracy on {domain!r} {how}: delivered {accuracy[DELIVERED]:.2f}{spread}; "
                f"{', '.join(parts)}."
            )
    return notes


def _staging_note(against: Mapping[str, Interval], budget: str) -> list[str]:
    if "mixed" not in against:
        return []
    interval = against["mixed"]
    if interval.high < 0:
        said = "Training in stages beats one adapter trained on the mixed data"
    elif interval.low > 0:
        said = "One adapter trained on the mixed data beats training in stages"
    else:
        said = "Training in stages and one adapter trained on the mixed data cannot be told apart"
    return [f"{said} ({budget + '; ' if budget else ''}difference of loss ratios {interval})."]


def _size_notes(groups: int, candidates: int, validation_items: int, comparisons: int) -> list[str]:
    notes = []
    if candidates:
        notes.append(
            f"{candidates} sets of coefficients were tried on {validation_items} λ-validation items; none of them is "
            "in the sealed test."
        )
    if groups < FEW:
        notes.append(
            f"The smallest domain has {groups} independent sealed-test groups: differences of a few per cent cannot be "
            f"seen with fewer than about {FEW}."
        )
    if comparisons > 2:
        notes.append(f"Intervals are 95 % each; among {comparisons} comparisons one may exclude zero by chance.")
    return notes


def _called(model: str) -> str:
    return {
        "stack": "the last stage with its context (stack)",
        "uniform": "equal weights (uniform)",
        "mixed": "one adapter trained on the mixed data",
    }.get(model, f"{model!r} alone")


def _signed(value: float) -> str:
    return f"{value:+.1%}" if math.isfinite(value) else f"{'+' if value > 0 else '−'}∞"
