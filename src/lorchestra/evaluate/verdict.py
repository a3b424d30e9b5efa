"""The verdict on the sealed test: what was delivered, against everything simpler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from lorchestra.evaluate.goal import Goal, undominated
from lorchestra.evaluate.metrics import (
    MEAN,
    Difference,
    Row,
    differences,
    metrics,
    overall,
    ratio_draws,
    smallest,
    table,
)
from lorchestra.evaluate.score import Scores
from lorchestra.stats.intervals import Interval, interval_of

DELIVERED = "delivered"
UNREFIT = "chosen"  # the chosen sum of the stages as they were before a refit
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
    singles: Sequence[str] = (),
    goal: Goal = MEAN,
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
        singles: the models that are one member of the fusion alone; the goal's limit is measured against them.
        goal: what the domains' losses are to become together; the sentence is about it.
        budget: what the mixed baseline and the stages were trained with (tokens, parameters).
        candidates: coefficients that were tried on λ-validation.
        validation_items: items each was tried on.
    """
    models = tuple(scores)
    domains = tuple(scores["base"])
    groups = smallest(scores["base"])
    rows = [row for model in models for domain in domains for row in metrics(model, domain, scores[model][domain])]
    ratios = {model: ratio_draws(scores[model], scores["base"], betas) for model in models}
    meant = goal if goal.counts_in(domains) else MEAN
    draws = {model: meant.combined(found) for model, found in ratios.items()}
    if len(domains) > 1:
        sizes = {domain: len(set(scores["base"][domain].groups)) for domain in domains}
        rows += [
            Row(model, domain, "loss_ratio", interval_of(ratios[model][domain], sizes[domain]))
            for model in models
            for domain in domains
        ]
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
        f"Delivered is {recipe_of}{f', which is {_called(same[0])}' if same else ''}.",
        *_goal_notes(goal, meant),
        *_stage_notes(own, table(rows, "nll")),
        *_preference_notes(rows, found, betas),
        *_staging_note(against, budget),
        *_refit_note(against),
        *_limit_notes(goal, ratios, [name for name in singles if name in models], scores["base"]),
        *_front_note(ratios),
        *_search_note(candidates, validation_items),
        *_power_notes(against, same, draws, groups),
    ]
    sentence = _sentence({rival: found for rival, found in against.items() if rival not in same}, draws)
    return Verdict(sentence, tuple(notes), models, domains, tuple(rows), tuple(found))


def _sentence(against: Mapping[str, Interval], draws: Mapping[str, NDArray[Any]]) -> str:
    base = against["base"]
    # What was there before a refit is no simpler choice: it has a say only where it is better.
    rivals = {name: found for name, found in against.items() if name != "base" and (name != UNREFIT or found.low > 0)}
    change = f"sealed-test loss {_signed(base.estimate)}, 95 % interval {_signed(base.low)} to {_signed(base.high)}"
    if base.low == base.high == 0:
        opening = "The delivered model gives the same answers as the base"
    elif base.high < 0:
        opening = f"The delivered model is better than the base ({change})"
    elif base.low > 0:
        opening = f"The delivered model is worse than the base ({change}); do not deploy it"
    else:
        opening = f"The delivered model cannot be told from the base ({change})"
    if not rivals:
        return opening + "."
    winners = [name for name, interval in rivals.items() if interval.low > 0]
    unbeaten = [name for name, interval in rivals.items() if interval.high >= 0]
    best = min(winners or rivals, key=lambda name: float(draws[name][0]))
    interval = rivals[best]
    spread = f"{_signed(interval.estimate)}, {_signed(interval.low)} to {_signed(interval.high)}"
    link = "though" if base.low > 0 else "and"
    if winners:
        return f"{opening}; but {_called(best)} is better{' still' if base.high < 0 else ''} ({spread}): prefer it."
    if not unbeaten:
        return f"{opening}, {link} it beats every simpler choice, the best being {_called(best)} ({spread})."
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


def _refit_note(against: Mapping[str, Interval]) -> list[str]:
    if UNREFIT not in against:
        return []
    interval = against[UNREFIT]
    said = "cannot be told from what was there before it"
    if interval.high < 0:
        said = "is better than what was there before it"
    elif interval.low > 0:
        said = "is worse than what was there before it; set fusion.refit: false"
    return [f"The refit on training and λ-validation data together {said} (difference of loss ratios {interval})."]


def _goal_notes(goal: Goal, meant: Goal) -> list[str]:
    if goal != meant:
        return [
            "No domain that counts in the goal has a sealed test; judged is the mean over the domains that have one."
        ]
    return [f"Judged is {goal}."] if goal.kind != "mean" else []


def _limit_notes(
    goal: Goal, ratios: Mapping[str, Mapping[str, NDArray[Any]]], singles: Sequence[str], base: Mapping[str, Scores]
) -> list[str]:
    """Whether the delivered model keeps the goal's limit, domain by domain."""
    if goal.tolerance is None or not singles:
        return []
    found = []
    for domain, scores in base.items():
        best = min(singles, key=lambda name: float(ratios[name][domain][0]))
        over = overall(ratios[DELIVERED][domain], ratios[best][domain], len(set(scores.groups)))
        said = "kept" if over.high <= goal.tolerance else "crossed" if over.low > goal.tolerance else "not told"
        found.append(f"{domain!r} {said} ({over} above {_called(best)})")
    return [f"The limit, no domain more than {goal.tolerance:g} above the best single adapter: {'; '.join(found)}."]


def _front_note(ratios: Mapping[str, Mapping[str, NDArray[Any]]]) -> list[str]:
    if len(ratios[DELIVERED]) < 2:
        return []
    points = [{domain: float(draws[0]) for domain, draws in found.items()} for found in ratios.values()]
    front = [name for name, kept in zip(ratios, undominated(points), strict=True) if kept]
    return [f"By their estimates, no model is at least as good in every domain as {_listed(front)}."]


def _search_note(candidates: int, validation_items: int) -> list[str]:
    if not candidates:
        return []
    return [
        f"{candidates} sets of coefficients were tried on {validation_items} λ-validation items; none of them is "
        "in the sealed test."
    ]


def _power_notes(
    against: Mapping[str, Interval], same: Sequence[str], draws: Mapping[str, NDArray[Any]], groups: int
) -> list[str]:
    """What this test could have seen, and how large one would have to be to see what it could not tell."""
    if groups < 2:
        return ["The smallest domain has one independent sealed-test group: no difference whatever can be seen."]
    rivals = [name for name in against if name not in ("base", UNREFIT, *same)]
    asked = ["base", *([min(rivals, key=lambda name: float(draws[name][0]))] if rivals else [])]
    seen = [(name, against[name]) for name in asked if against[name].detectable]
    notes = []
    if seen:
        sizes = " and ".join(f"{interval.detectable:.1%} against {_called(name)}" for name, interval in seen)
        notes.append(
            f"With {groups} independent groups in the smallest domain, this test finds a true difference (as a share "
            f"of the base's loss) of {sizes} in four cases of five, and misses smaller ones more often."
        )
    for name, interval in seen:
        if interval.excludes(0.0) or not interval.estimate:
            continue
        needed = groups * ((interval.detectable or 0.0) / interval.estimate) ** 2
        size = f"about {needed:,.0f}" if needed < 1e5 else "more than 100,000"
        notes.append(
            f"Too small for a claim against {_called(name)}: a difference as small as the one seen "
            f"({abs(interval.estimate):.2%}) takes {size} groups a domain to be found in four cases of five."
        )
    if len(against) > 2:
        notes.append(f"Intervals are 95 % each; among {len(against)} comparisons one may exclude zero by chance.")
    return notes


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _called(model: str) -> str:
    return {
        "stack": "the last stage with its context (stack)",
        "uniform": "equal weights (uniform)",
        "mixed": "one adapter trained on the mixed data",
        "base": "the base",
        UNREFIT: "the same weights before the refit",
    }.get(model, f"{model!r} alone")


def _signed(value: float) -> str:
    return f"{value:+.1%}" if math.isfinite(value) else f"{'+' if value > 0 else '−'}∞"
