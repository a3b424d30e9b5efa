"""The verdict on made-up scores whose answer is known: the sentence of each case, the notes, nothing overclaimed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lorchestra.errors import LorchestraError
from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.score import Scores
from lorchestra.evaluate.verdict import ALL, DELIVERED, UNREFIT, Verdict, judge
from lorchestra.report.comparison import Comparison

N = 120
HARD = np.random.default_rng(0).uniform(5, 9, N)


def of(nll: Any, groups: Any = None) -> Scores:
    """Answers of ten tokens each."""
    n = len(nll)
    names = tuple(map(str, range(n) if groups is None else groups))
    return Scores("sft", tuple((-float(v),) for v in nll), ((10,),) * n, (0,) * n, names)


def answers(shift: float, noise: float = 0.2, seed: int = 1, n: int = N, groups: Any = None) -> Scores:
    """n answers, on average ``shift`` nats above the base's, item by item with ``noise``."""
    change = np.random.default_rng(seed).normal(0, noise, n)
    return of(HARD[:n] + shift + change - change.mean(), groups)


def pairs(margin: float, seed: int = 1, n: int = N) -> Scores:
    """n pairs, the chosen answer on average ``margin`` nats likelier; in eight tokens, the rejected one in four."""
    margins = margin + np.random.default_rng(seed).normal(0, 1, n)
    return Scores(
        "dpo", tuple((float(m) - 40, -40.0) for m in margins), ((8, 4),) * n, (0,) * n, tuple(map(str, range(n)))
    )


def verdict(models: dict[str, Scores], **settings: Any) -> Verdict:
    """One domain, ``clinic``; the base is there already."""
    by = {name: {"clinic": scores} for name, scores in {"base": answers(0, 0), **models}.items()}
    return judge(by, **{"stages": ["clinic"], "betas": {}, "recipe_of": "0.5·clinic"} | settings)


BETTER = "The delivered model is better than the base (sealed-test loss -"
WORSE = "The delivered model is worse than the base (sealed-test loss +"
SAME = "The delivered model cannot be told from the base (sealed-test loss "

# delivered, rivals, how the sentence begins, how it ends
CASES: dict[str, tuple[Scores, dict[str, Scores], str, str]] = {
    "better than all": (
        answers(-2), {"clinic": answers(-1, seed=2), "uniform": answers(-0.5, seed=3)},
        BETTER, ", and it beats every simpler choice, the best being 'clinic' alone (",
    ),
    "better than the base, no rival": (answers(-2), {}, BETTER, ")."),
    "not told from the best rival": (
        answers(-2), {"clinic": answers(-2, seed=2), "uniform": answers(-0.5, seed=3)},
        BETTER, "; it cannot be told from 'clinic' alone, the best simpler choice (",
    ),
    "a rival is better still": (
        answers(-1), {"clinic": answers(-2, seed=2), "stack": answers(-1.5, seed=3), "uniform": answers(-0.5, seed=4)},
        BETTER, "; but 'clinic' alone is better still (",
    ),
    "the same answers as a rival": (
        answers(-2), {"stack": answers(-2), "uniform": answers(-0.5, seed=3)},
        BETTER, "; it gives the same answers as the last stage with its context (stack), the best simpler choice.",
    ),
    "worse": (
        answers(1), {"uniform": answers(2, seed=2)},
        WORSE, "; do not deploy it, though it beats every simpler choice, the best being equal weights (uniform",
    ),
    "worse, and a rival is better": (
        answers(1), {"mixed": answers(-1, seed=2)},
        WORSE, "; do not deploy it; but one adapter trained on the mixed data is better (",
    ),
    "not told from the base": (answers(0, 2), {"uniform": answers(1, seed=2)}, SAME, " equal weights (uniform) ("),
    "not told from the base, no rival": (answers(0, 2), {}, SAME, ")."),
    "the base itself": (
        answers(0, 0), {"clinic": answers(1, seed=2)},
        "The delivered model gives the same answers as the base",
        ", and it beats every simpler choice, the best being 'clinic' alone (",
    ),
    "beats the best on average, not a rival that varies more": (
        answers(-2), {"clinic": answers(-1.5, 0.2, seed=2), "uniform": answers(-0.9, 20, seed=3)},
        BETTER, ", and it beats 'clinic' alone, the best simpler choice (",
    ),
    "the best on average is unsure, another is surely better": (
        answers(-1), {"clinic": answers(-3, 25, seed=2), "uniform": answers(-1.2, 0.2, seed=3)},
        BETTER, "; but equal weights (uniform) is better still (",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_sentence(case: str) -> None:
    delivered, rivals, opening, ending = CASES[case]
    found = verdict({DELIVERED: delivered, **rivals})
    assert found.sentence.startswith(opening), found.sentence
    assert ending in found.sentence[len(opening) :], found.sentence
    assert found.sentence.endswith(".")
    assert "95 % interval" in found.sentence or opening.endswith("answers as the base")
    assert len(found.sentence) < 250, "a sentence, not a paragraph"
    assert found.notes[0] == "Delivered is 0.5·clinic."


def test_what_is_a_rival_itself_is_named_and_not_compared_with_it() -> None:
    """A delivered sum that is a rival's differs from it by rounding alone: no reason to prefer that rival."""
    rivals = {"clinic": answers(-2.001, 0.0, seed=2), "uniform": answers(-1, seed=3)}
    found = verdict({**rivals, DELIVERED: answers(-2, 0.0)}, same=["clinic"])
    assert found.notes[0] == "Delivered is 0.5·clinic, which is 'clinic' alone."
    assert "the best being equal weights (uniform)" in found.sentence
    assert "'clinic'" not in found.sentence
    assert any(d.b == "clinic" for d in found.differences), "the tables keep it"


def test_beating_the_best_on_average_is_not_beating_all() -> None:
    delivered, rivals, _, _ = CASES["beats the best on average, not a rival that varies more"]
    found = verdict({DELIVERED: delivered, **rivals})
    assert found.sentence.endswith(", but cannot be told from equal weights (uniform).")


def test_every_claim_of_the_sentence_has_its_interval_in_the_tables() -> None:
    found = verdict({DELIVERED: answers(-2), "clinic": answers(-1, seed=2)})
    against = {d.b: d for d in found.differences if (d.a, d.domain, d.metric) == (DELIVERED, ALL, "loss_ratio")}
    assert set(against) == {"base", "clinic"}
    assert all(d.better for d in against.values())
    low, high = against["base"].interval.low, against["base"].interval.high
    assert f", 95 % interval {low:+.1%} to {high:+.1%})" in found.sentence
    ratio = {r.model: r.interval.estimate for r in found.rows if r.metric == "loss_ratio"}
    assert ratio["base"] == 1.0
    assert ratio[DELIVERED] == pytest.approx(answers(-2).nll.sum() / HARD.sum())
    assert f"(sealed-test loss {ratio[DELIVERED] - 1:+.1%}," in found.sentence


def test_the_page_shows_what_the_verdict_compares_lower_being_better() -> None:
    found = verdict({DELIVERED: answers(-2), "clinic": answers(-1, seed=2)})
    comparison = Comparison(found.as_dict()["evaluation"])
    (estimates,) = [t for t in comparison.estimates() if t["title"].startswith("Loss over the base's")]
    assert (estimates["domains"], estimates["hint"]) == ([ALL], "lower is better")
    (best,) = [row for row in estimates["rows"] if row["cells"][0]["best"]]
    assert best["name"] == DELIVERED
    (changes,) = [t for t in comparison.differences() if t["title"].startswith("Loss over the base's")]
    assert changes["hint"] == "below zero is better"
    assert {row["cells"][0]["kind"] for row in changes["rows"]} == {"better"}


def test_the_notes_of_stages_compare_each_with_the_base_on_its_own_domain() -> None:
    by = {
        "base": {"general": answers(0, 0), "clinic": answers(0, 0)},
        "general": {"general": answers(-1), "clinic": answers(2)},
        "clinic": {"general": answers(2), "clinic": answers(0, 3)},
        "stack": {"general": answers(-1), "clinic": answers(1)},
        DELIVERED: {"general": answers(-1), "clinic": answers(-1)},
    }
    notes = judge(by, stages=["general", "clinic"], betas={}, recipe_of="x").notes
    assert notes[0] == "Delivered is x."
    notes = notes[1:]
    assert notes[0].startswith("Stage general lowers the loss of 'general': ")
    assert notes[1].startswith("Stage clinic does not measurably change the loss of 'clinic': ")
    assert notes[2].startswith("The stack of the last stage raises the loss of 'clinic': ")
    assert sum(note.startswith(("Stage", "The stack")) for note in notes) == 3
    base, general = HARD.mean() / 10, answers(-1).nll.mean() / 10
    assert f"{base:.3f} to {general:.3f} nats a token (difference {general - base:.3f} [" in notes[0]


@pytest.mark.parametrize(
    ("mixed", "said"),
    [
        (answers(-1, seed=2), "Training in stages beats one adapter trained on the mixed data"),
        (answers(-3, seed=2), "One adapter trained on the mixed data beats training in stages"),
        (answers(-2, seed=2), "Training in stages and one adapter trained on the mixed data cannot be told apart"),
    ],
)
def test_the_note_on_the_mixed_baseline(mixed: Scores, said: str) -> None:
    found = verdict({DELIVERED: answers(-2), "mixed": mixed})
    assert sum(note.startswith(said) for note in found.notes) == 1
    assert not any("mixed data" in note for note in verdict({DELIVERED: answers(-2)}).notes)


def test_the_notes_on_preferences_give_both_accuracies_of_all_models() -> None:
    by = {name: {"preference": pairs(margin)} for name, margin in (("base", 0.0), ("dpo", 1.0), (DELIVERED, 2.0))}
    found = judge(by, stages=["preference"], betas={"preference": 0.1}, recipe_of="x")
    summed, normalised = (note for note in found.notes if note.startswith("Preference accuracy"))
    accuracy = {name: float(scores["preference"].correct()[0].mean()) for name, scores in by.items()}
    assert f"by summed log-probability: delivered {accuracy[DELIVERED]:.2f} (difference " in summed
    assert summed.endswith(f"; base {accuracy['base']:.2f}, dpo {accuracy['dpo']:.2f}.")
    per_token = float(by["base"]["preference"].correct(normalised=True)[0].mean())
    assert per_token != accuracy["base"], "twice the tokens on the chosen side"
    assert "per token: delivered" in normalised
    assert f"base {per_token:.2f}" in normalised


def small(n: int, groups: Any = None) -> dict[str, dict[str, Scores]]:
    return {
        "base": {"clinic": answers(0, 0), "few": answers(0, 0, n=n, groups=groups)},
        DELIVERED: {"clinic": answers(-1), "few": answers(-1, n=n, groups=groups)},
    }


def test_the_notes_on_size_count_groups_of_the_smallest_domain() -> None:
    found = judge(small(40, np.arange(40) // 2), stages=[], betas={}, recipe_of="x", candidates=9, validation_items=60)
    assert (
        "9 sets of coefficients were tried on 60 λ-validation items; none of them is in the sealed test." in found.notes
    )
    assert any(
        note.startswith("With 20 independent groups in the smallest domain, this test finds") for note in found.notes
    )
    assert not any("were tried" in note for note in judge(small(100), stages=[], betas={}, recipe_of="x").notes)


def test_what_the_test_could_have_seen_is_in_the_notes_and_follows_from_its_standard_error() -> None:
    found = verdict({DELIVERED: answers(-0.5, 1), "clinic": answers(-0.45, 1, seed=2)})
    against = {d.b: d.interval for d in found.differences if d.metric == "loss_ratio" and d.a == DELIVERED}
    (note,) = [note for note in found.notes if note.startswith("With 120 independent groups")]
    base, clinic = against["base"].detectable, against["clinic"].detectable
    assert f"{base:.1%} against the base and {clinic:.1%} against 'clinic' alone" in note
    difference = (answers(-0.5, 1).nll - answers(-0.45, 1, seed=2).nll) / HARD.mean()
    assert clinic == pytest.approx((1.98 + 0.845) * difference.std(ddof=1) / np.sqrt(N), rel=0.1)


def test_a_claim_that_needs_more_items_says_how_many() -> None:
    """(t + t₀.₈)² · variance / difference²: the textbook's sample size."""
    found = verdict({DELIVERED: answers(-0.05, 1)})
    (note,) = [note for note in found.notes if note.startswith("Too small for a claim against the base")]
    needed = int(note.split("takes about ")[1].split(" groups")[0].replace(",", ""))
    assert needed == pytest.approx(N * ((1.98 + 0.845) / (0.05 * np.sqrt(N) / 1)) ** 2, rel=0.25)
    assert not any("Too small" in note for note in verdict({DELIVERED: answers(-2)}).notes)
    assert not any("Too small" in note for note in verdict({DELIVERED: answers(0, 0)}).notes)


def two(a: float, b: float, seed: int = 1) -> dict[str, Scores]:
    return {"a": answers(a, 0.05, seed=seed), "b": answers(b, 0.05, seed=seed + 9)}


def judged(goal: Goal, **models: dict[str, Scores]) -> Verdict:
    base = {"a": answers(0, 0), "b": answers(0, 0)}
    return judge({"base": base, **models}, stages=[], betas={}, recipe_of="x", goal=goal, singles=["s", "t"])


def test_the_sentence_is_about_the_goal() -> None:
    """Better on average, worse in the worst domain."""
    models = {DELIVERED: two(-3, 1), "s": two(-1, -0.5, 3)}
    assert "better than the base" in judged(Goal(), **models).sentence
    worst = judged(Goal("worst"), **models)
    assert "worse than the base" in worst.sentence
    assert "Judged is the worst domain of loss / base loss." in worst.notes
    assert "worse than the base" in judged(Goal("weighted", {"b": 1}), **models).sentence
    ratio = {r.model: r.interval.estimate for r in worst.rows if (r.metric, r.domain) == ("loss_ratio", ALL)}
    each = {r.domain: r.interval.estimate for r in worst.rows if r.metric == "loss_ratio" and r.model == DELIVERED}
    assert ratio[DELIVERED] == max(each["a"], each["b"]) > 1
    assert "judged is the mean" in judged(Goal("weighted", {"else": 1}), **models).notes[1]


@pytest.mark.parametrize(("b", "said"), [(-1.0, "kept"), (1.0, "crossed"), (-0.85, "not told")])
def test_the_limit_is_tested_on_the_sealed_test_against_the_best_single_adapter(b: float, said: str) -> None:
    found = judged(Goal(tolerance=0.02), **{DELIVERED: two(-3, b), "s": two(-1, 0, 3), "t": two(0, -1, 5)})
    (note,) = [note for note in found.notes if note.startswith("The limit, no domain more than 0.02 above the best")]
    first, second = note.split(": ", 1)[1].split("; ")
    assert first.startswith("'a' kept (")
    assert first.endswith("above 's' alone)")
    assert second.startswith(f"'b' {said} (")
    assert second.endswith("above 't' alone).")
    assert not any("limit" in note for note in judged(Goal(), **{DELIVERED: two(-3, b), "s": two(-1, 0)}).notes)


def test_the_pareto_front_is_named() -> None:
    found = judged(Goal(), **{DELIVERED: two(-3, 1), "s": two(-1, -1, 3), "t": two(0, -0.5, 5)})
    assert "By their estimates, no model is at least as good in every domain as delivered and s." in found.notes


@pytest.mark.parametrize(
    ("before", "said"),
    [(-1.0, "is better than what was"), (-3.0, "is worse than what was"), (-2.0, "cannot be told from what was")],
)
def test_the_note_on_the_refit(before: float, said: str) -> None:
    found = verdict({DELIVERED: answers(-2), UNREFIT: answers(before, seed=2)})
    (note,) = [note for note in found.notes if note.startswith("The refit on training and")]
    assert said in note
    named = "the same weights before the refit is better still" in found.sentence
    assert named == (before == -3.0), "what was there before is no simpler choice that one could beat"


def test_many_comparisons_are_told() -> None:
    rivals = {name: answers(-1, seed=i) for i, name in enumerate(("clinic", "uniform", "stack"), start=2)}
    assert "among 4 comparisons" in verdict({DELIVERED: answers(-2), **rivals}).notes[-1]


def test_one_group_claims_nothing_and_is_json_all_the_same() -> None:
    found = judge(small(3, ["g"] * 3), stages=["few"], betas={}, recipe_of="x")
    assert "cannot be told from the base" in found.sentence
    assert ", 95 % interval −∞ to +∞)" in found.sentence
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert "NaN" not in text
    assert '"low": null' in text


def test_two_groups_claim_nothing() -> None:
    """Both got better, as one time in four by chance alone; percentiles would exclude zero."""
    found = judge({"base": {"d": of([7, 7])}, DELIVERED: {"d": of([6, 6.9])}}, stages=[], betas={}, recipe_of="x")
    assert "cannot be told from the base" in found.sentence


def test_everything_becomes_plain_json() -> None:
    by = {
        name: {"clinic": answers(m), "preference": pairs(-m)}
        for name, m in (("base", 0), ("clinic", -1), (DELIVERED, -2))
    }
    found = judge(by, stages=["clinic", "preference"], betas={"preference": 0.1}, recipe_of="x", candidates=3)
    told = found.as_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["evaluation"]["models"] == ["base", "clinic", DELIVERED]
    assert told["evaluation"]["domains"] == ["clinic", "preference"]
    keys = {"model", "domain", "metric", "estimate", "low", "high", "n"}
    assert all(set(row) == keys for row in told["evaluation"]["rows"])
    rows = [(row["model"], row["domain"], row["metric"]) for row in told["evaluation"]["rows"]]
    assert len(rows) == len(set(rows)) == 3 * (1 + 3 + 2 + 1)
    pairs_of = [(d["a"], d["b"], d["domain"], d["metric"]) for d in told["evaluation"]["differences"]]
    assert len(pairs_of) == len(set(pairs_of))


def test_a_broken_model_is_no_verdict() -> None:
    with pytest.raises(LorchestraError, match="'delivered' gives 120 of the 120 items of 'clinic'"):
        verdict({DELIVERED: answers(float("nan"))})


def test_a_model_that_is_the_base_up_to_noise_is_rarely_called_better_or_worse() -> None:
    """5 % is nominal; four standard deviations of a hundred simulations above it are 14."""
    noise = np.random.default_rng(7).normal(0, 0.5, (100, N))
    said = [verdict({DELIVERED: of(HARD + change)}).sentence for change in noise]
    assert sum("cannot be told from the base" not in sentence for sentence in said) <= 14
