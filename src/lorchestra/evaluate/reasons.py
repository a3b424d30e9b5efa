"""Why a candidate was chosen, and what that is worth, in sentences; every claim with its interval."""

from __future__ import annotations

from collections.abc import Mapping

from lorchestra.evaluate.selection import Selection, Standing, Worth, blind
from lorchestra.fusion.search import Candidate
from lorchestra.stats.intervals import Interval

UNSEEN = 5e-5  # a difference that four decimals do not show


def mixture(weights: Mapping[str, float]) -> str:
    """``0.3·general + 0.7·clinic``."""
    return " + ".join(f"{weight:.3g}·{name}" for name, weight in weights.items() if weight) or "the base alone"


def called(candidate: Candidate) -> str:
    """Coefficients, and where they come from."""
    if candidate.origin == "base":
        return "the base alone"
    return f"{mixture(candidate.weights)} ({candidate.origin})"


def reasons(selection: Selection) -> list[str]:
    """The rule that was applied, what the plain minimum would have been, the optimism, the limit; in that order."""
    return [_choice(selection), *_worth(selection), *_followed(selection), *_limit(selection)]


def _choice(selection: Selection) -> str:
    chosen, lowest = selection.standings[selection.chosen], selection.standings[selection.minimum]
    if selection.rule == "minimum":
        other = next((worth for worth in selection.worth if worth.rule == "one_se"), None)
        said = f"Chosen is the plain minimum: {_scored(lowest)}."
        if other is not None and other.taken != selection.minimum:
            said += f" The one-standard-error rule would have taken {_scored(selection.standings[other.taken])}."
        return said
    if selection.chosen == selection.minimum:
        return f"Chosen by the one-standard-error rule: {_scored(chosen)}; it is the plain minimum too."
    behind = chosen.behind
    return (
        f"Chosen by the one-standard-error rule: {_scored(chosen)}. The plain minimum would have been "
        f"{_scored(lowest)}, lower by {behind.estimate:.4f} (on the same items: 95 % interval {behind.low:.4f} to "
        f"{behind.high:.4f}); that does not make up for a less simple answer."
    )


def _worth(selection: Selection) -> list[str]:
    if not selection.worth:
        return [
            "The smallest domain has one group of λ-validation items: nothing can be held out of it, so what the "
            "choice is worth on other items is not known. Give λ-validation more groups."
        ]
    tried, groups = len(selection.standings), min(selection.groups.values())
    by_rule = {worth.rule: worth for worth in selection.worth}
    lowest, simple = by_rule["minimum"], by_rule["one_se"]
    how = f"{selection.folds} group-wise folds, dealt {selection.repeats} times; {groups} groups in the smallest domain"
    other = "the same"
    if (simple.taken, simple.honest) != (lowest.taken, lowest.honest):
        other = f"{simple.naive:.4f}; {_seen(simple)}"
    return [
        f"The best of {tried} candidates scores {lowest.naive:.4f} on the items it was chosen on; {_seen(lowest)} "
        f"({how}). By the one-standard-error rule: {other}."
    ]


def _seen(worth: Worth) -> str:
    honest, optimism = worth.honest, worth.optimism
    if max(abs(optimism.low), abs(optimism.high)) < UNSEEN:
        return f"it is chosen without any of the folds too, so nothing flatters it: {_at(honest)}"
    return f"chosen without the items it is scored on, {_at(honest)}: flattered by {_at(optimism)}"


def _at(interval: Interval) -> str:
    return f"{interval.estimate:z.4f} [{interval.low:z.4f}, {interval.high:z.4f}]"


def _followed(selection: Selection) -> list[str]:
    origins = [standing.candidate.origin for standing in selection.standings]
    followed = [origin for origin in origins if not blind(origin)]
    if not followed or not selection.worth:
        return []
    kinds = ", ".join(dict.fromkeys(followed))
    return [
        f"Found by following λ-validation itself: {len(followed)} ({kinds}). The folds cover the choice among "
        "candidates, not the finding, whose own optimism they do not see; the sealed test does."
    ]


def _limit(selection: Selection) -> list[str]:
    if selection.goal.tolerance is None:
        return []
    out = sum(standing.excess > 0 for standing in selection.standings)
    if selection.kept:
        return [f"{out} of {len(selection.standings)} candidates crossed the limit and were not considered."]
    least = selection.standings[selection.chosen].excess
    return [
        "No candidate keeps the limit: each of them has a domain that is too far above the best single adapter there. "
        f"Those that cross it least were considered (by {least:.4f}); allow more than {selection.goal.tolerance:g}, or "
        "train on more data."
    ]


def _scored(standing: Standing) -> str:
    return f"{called(standing.candidate)}, {_at(standing.value)}"
