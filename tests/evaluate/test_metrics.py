"""Metrics and differences against resampling written out, and against what chance alone gives."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.errors import LorchestraError
from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.metrics import (
    Difference,
    Row,
    differences,
    loss_draws,
    loss_ratios,
    loss_table,
    metrics,
    overall,
    ratio_draws,
    smallest,
    table,
)
from lorchestra.evaluate.score import Scores
from lorchestra.stats.intervals import Interval, resample


def answers(nll: Any, tokens: Any = None, groups: Any = None) -> Scores:
    """One branch an item."""
    n = len(nll)
    return Scores(
        "sft",
        tuple((-float(value),) for value in nll),
        tuple((int(t),) for t in (tokens if tokens is not None else [1] * n)),
        (0,) * n,
        tuple(map(str, groups if groups is not None else range(n))),
    )


def pairs(margins: Any, groups: Any = None, kind: Any = "dpo") -> Scores:
    """Two branches an item, the first one right; ``margins`` is how much likelier it is."""
    n = len(margins)
    return Scores(
        kind,
        tuple((float(m) - 50.0, -50.0) for m in margins),
        ((3, 3),) * n,
        (0,) * n,
        tuple(map(str, groups if groups is not None else range(n))),
    )


def by_metric(found: list[Any]) -> dict[str, Interval]:
    return {row.metric: row.interval for row in found}


def draws_by_hand(values: np.ndarray, weights: np.ndarray, groups: list[str], resamples: int, seed: int) -> list[float]:
    """Σ values / Σ weights over resamples that take a group's items all together, as often as it is drawn."""
    names = list(dict.fromkeys(groups))
    out = []
    for counts in resample(len(names), resamples, seed):
        top = bottom = 0.0
        for name, count in zip(names, counts, strict=True):
            for value, weight, group in zip(values, weights, groups, strict=True):
                if group == name:
                    top, bottom = top + count * value, bottom + count * weight
        out.append(top / bottom)
    return out


NLL = st.floats(0.1, 30)
ITEM = st.tuples(NLL, NLL, st.integers(1, 9), st.sampled_from("abcd"))


@pytest.mark.parametrize("shared", [True, False])
@settings(max_examples=20, deadline=None)
@given(items=st.lists(ITEM, min_size=2, max_size=8))
def test_the_loss_resamples_whole_groups_of_every_domain(
    shared: bool, items: list[tuple[float, float, int, str]]
) -> None:
    """A patient who is in two domains is drawn in both together; domains that share nobody are drawn apart."""
    ours, base, tokens, groups = (list(column) for column in zip(*items, strict=True))
    margins = [value - 15 for value in ours]
    others = groups if shared else [f"other {group}" for group in groups]
    scores = {"answers": answers(ours, tokens, groups), "pairs": pairs(margins, others)}
    bases = {"answers": answers(base, tokens, groups), "pairs": pairs(base, others)}
    found = loss_draws(scores, bases, {"pairs": 0.3}, resamples=20)
    preference = np.log1p(np.exp(-0.3 * (np.array(margins) - np.array(base))))
    by_hand = [
        draws_by_hand(np.array(ours), np.array(base), groups, 20, 0),
        draws_by_hand(preference, np.full(len(items), math.log(2)), groups, 20, 0 if shared else 1),
    ]
    np.testing.assert_allclose(found, np.mean(by_hand, axis=0), rtol=1e-9)
    assert smallest(scores) == len(set(groups))


@settings(max_examples=15, deadline=None)
@given(st.lists(ITEM, min_size=2, max_size=10), st.integers(2, 5))
def test_repeating_the_items_of_a_group_makes_nothing_surer(items: list[Any], times: int) -> None:
    """Five questions of one patient are not five patients."""
    ours, base, tokens, groups = (list(column) for column in zip(*items, strict=True))
    more = [list(column) * times for column in (ours, base, tokens, groups)]
    once = differences("a", "b", "d", answers(ours, tokens, groups), answers(base, tokens, groups))
    often = differences("a", "b", "d", answers(more[0], *more[2:]), answers(more[1], *more[2:]))
    for first, second in zip(once, often, strict=True):
        assert second.interval.n == first.interval.n
        for end in ("estimate", "low", "high"):
            assert getattr(second.interval, end) == pytest.approx(getattr(first.interval, end), rel=1e-9, abs=1e-9)


def test_pairing_sees_what_two_intervals_side_by_side_do_not() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 30, 50)
    ours, base = answers(hard - rng.uniform(0.1, 0.3, 50)), answers(hard)
    one, other = metrics("a", "d", ours)[0].interval, metrics("b", "d", base)[0].interval
    assert one.high > other.low
    (change,) = differences("a", "b", "d", ours, base)
    assert change.better is True
    assert change.interval.estimate == pytest.approx(one.estimate - other.estimate)


def test_which_metrics_there_are() -> None:
    assert set(by_metric(metrics("m", "d", answers([1.0, 2.0])))) == {"nll"}
    choice = metrics("m", "d", pairs([1.0, -1.0], kind="sft"))
    assert set(by_metric(choice)) == {"nll", "accuracy", "accuracy_normalised"}
    preference = metrics("m", "d", pairs([1.0, -1.0]))
    assert set(by_metric(preference)) == {"nll", "preference_accuracy", "preference_accuracy_normalised"}
    assert [d.metric for d in differences("a", "b", "d", pairs([1.0]), pairs([1.0]))] == [r.metric for r in preference]
    assert {(row.model, row.domain) for row in preference} == {("m", "d")}


def test_estimates() -> None:
    found = by_metric(metrics("m", "d", answers([2.0, 9.0], [1, 3])))
    assert found["nll"].estimate == pytest.approx(11 / 4), "per token of the domain, not per item"
    accuracy = by_metric(metrics("m", "d", pairs([1.0, 2.0, 0.0, -1.0])))["preference_accuracy"]
    assert accuracy.estimate == pytest.approx(2.5 / 4)
    change = by_metric(differences("a", "b", "d", answers([2.0, 9.0], [1, 3]), answers([3.0, 9.5], [1, 3])))
    assert change["nll"].estimate == pytest.approx(-1.5 / 4)


@pytest.mark.parametrize(
    ("metric", "sign"), [("nll", -1), ("loss_ratio", -1), ("accuracy", 1), ("preference_accuracy", 1)]
)
def test_better_is_down_for_losses_and_up_for_accuracies(metric: str, sign: int) -> None:
    def difference(low: float, high: float) -> Difference:
        return Difference("a", "b", "d", metric, Interval((low + high) / 2, low, high, 50))

    assert difference(0.1, 0.3).better is (sign > 0)
    assert difference(-0.3, -0.1).better is (sign < 0)
    assert difference(-0.1, 0.3).better is None
    assert difference(0.0, 0.3).better is None
    assert difference(-math.inf, math.inf).better is None


@pytest.mark.parametrize(("groups", "simulations"), [(3, 150), (8, 150), (60, 150)])
def test_two_models_that_differ_by_noise_are_rarely_told_apart(groups: int, simulations: int) -> None:
    """5 % is nominal; four standard deviations of the simulation above it are 12 %."""
    rng = np.random.default_rng(groups)
    told = {"nll": 0, "preference_accuracy": 0, "overall": 0}
    for _ in range(simulations):
        names = np.repeat(np.arange(groups), 2)
        hard, shared = rng.uniform(5, 9, 2 * groups), rng.normal(0, 0.3, (2, groups)).repeat(2, axis=1)
        one, other = (hard + shared[k] + rng.normal(0, 0.3, 2 * groups) for k in (0, 1))
        found = differences("a", "b", "d", answers(one, groups=names), answers(other, groups=names))
        told["nll"] += found[0].better is not None
        base = {"d": answers(hard, groups=names)}
        ours, theirs = (loss_draws({"d": answers(x, groups=names)}, base, {}) for x in (one, other))
        told["overall"] += overall(ours, theirs, groups).excludes(0.0)
        if groups == 60:
            preferred = differences("a", "b", "d", pairs(one - 7, names), pairs(other - 7, names))[1]
            told["preference_accuracy"] += preferred.better is not None
    assert max(told.values()) <= 0.12 * simulations, told


def test_a_real_difference_is_seen() -> None:
    rng = np.random.default_rng(5)
    seen = 0
    for _ in range(50):
        hard = rng.uniform(5, 9, 60)
        ours, base = (answers(hard + shift + rng.normal(0, 0.3, 60)) for shift in (-0.25, 0.0))
        seen += differences("a", "b", "d", ours, base)[0].better is True
    assert seen >= 45


def test_the_order_of_domains_pairs_the_draws_of_two_models() -> None:
    """Both models are resampled alike, so a model against itself differs by nothing at all."""
    rng = np.random.default_rng(6)
    base = {name: answers(rng.uniform(5, 9, 20)) for name in "xyz"}
    ours = {name: answers(rng.uniform(5, 9, 20)) for name in "xyz"}
    zero = overall(loss_draws(ours, base, {}), loss_draws(ours, base, {}), 20)
    assert (zero.estimate, zero.low, zero.high) == (0, 0, 0)
    assert not zero.excludes(0.0)


def test_json_has_no_infinity_and_no_nan() -> None:
    one_group = answers([1.0, 2.0], groups=["g", "g"])
    rows: list[Row | Difference] = [*metrics("m", "d", one_group), *differences("a", "b", "d", one_group, one_group)]
    for row in rows:
        told = json.loads(json.dumps(row.as_dict(), allow_nan=False))
        assert (told["low"], told["high"], told["n"]) == (None, None, 1)
        assert told["metric"] == "nll"
    assert rows[0].as_dict()["estimate"] == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_model_is_a_clear_error(value: float) -> None:
    with pytest.raises(
        LorchestraError, match=r"'m' gives 1 of the 3 items of 'd' a log-probability that is not finite"
    ):
        metrics("m", "d", answers([1.0, value, 2.0]))
    with pytest.raises(LorchestraError, match="1 of the 2 items"):
        metrics("m", "d", pairs([1.0, value]))


def test_no_domain_is_no_loss() -> None:
    with pytest.raises(ValueError, match="at least one domain"):
        loss_draws({}, {}, {})


def test_groups_of_several_domains_leave_no_domain_empty() -> None:
    """One patient of thirty is in the small domain too; plain resampling would leave that domain empty now and then."""
    many, few = answers(range(1, 31)), answers([1.0, 2.0], groups=[0, "else"])
    found = ratio_draws({"many": many, "few": few}, {"many": many, "few": few}, {})
    assert np.isfinite(found["few"]).all()
    assert (found["few"] == 1).all()


@pytest.mark.parametrize("goal", [Goal(), Goal("worst"), Goal("weighted", {"a": 3, "b": 1})], ids=lambda g: g.kind)
def test_ratios_draws_and_table_tell_the_same(goal: Goal) -> None:
    rng = np.random.default_rng(1)
    names = {"a": list("ppqrs"), "b": list("rstu")}
    base = {name: answers(rng.uniform(5, 9, len(by)), rng.integers(1, 9, len(by)), by) for name, by in names.items()}
    models = [
        {name: answers(rng.uniform(4, 9, len(by)), base[name].gold_tokens, by) for name, by in names.items()}
        for _ in range(3)
    ]
    whole = loss_table(models, base, {})
    assert whole.present.sum(axis=1).tolist() == [4, 4]
    assert whole.groups == 4
    for k, model in enumerate(models):
        ratios = loss_ratios(model, base, {})
        assert ratios == {d: pytest.approx(model[d].nll.sum() / base[d].nll.sum()) for d in names}
        assert whole.ratios()[:, k] == pytest.approx(list(ratios.values()))
        assert loss_draws(model, base, {}, goal=goal)[0] == pytest.approx(goal.value(ratios))


def test_a_difference_says_what_it_could_have_seen() -> None:
    (change,) = differences("a", "b", "d", answers([1.0, 2.0, 4.0]), answers([2.0, 1.0, 1.0]))
    told = change.as_dict()
    assert told["detectable"] == change.interval.detectable > abs(told["high"] - told["estimate"])


def test_table() -> None:
    rows = [
        *metrics("a", "x", pairs([1.0, -1.0])),
        *metrics("a", "y", answers([1.0])),
        *metrics("b", "x", pairs([1.0])),
    ]
    found = table(rows, "preference_accuracy")
    assert {model: list(by) for model, by in found.items()} == {"a": ["x"], "b": ["x"]}
    assert found["a"]["x"] == rows[1].interval
    assert table(rows, "accuracy") == {}
