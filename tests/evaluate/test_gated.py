"""The verdict on a gate, on made-up scores whose answer is known; and items scored each under its own coefficients."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tests.evaluate.test_mixtures import DOMAINS, adapter
from tests.evaluate.test_verdict import answers, pairs

from lorchestra.bank import Bank
from lorchestra.evaluate.gated import GATE, ORACLE, STATIC, GateVerdict, judge_gate
from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.mixtures import score_each
from lorchestra.evaluate.score import Scores, score
from lorchestra.evaluate.verdict import ALL
from lorchestra.report.comparison import Comparison

HALF = {"clinic": 0.5, "law": 0.5}
TOLD = {"clinic": {"clinic": 1.0}, "law": {"law": 1.0}}


def verdict(models: dict[str, tuple[Any, ...]], **settings: Any) -> GateVerdict:
    """Two domains, clinic and law; the base is there already. A model is its scores there."""
    of = {"base": (answers(0, 0), answers(0, 0)), **models}
    by = {name: dict(zip(("clinic", "law"), found, strict=False)) for name, found in of.items()}
    return judge_gate(by, **{"betas": {}, "static": HALF, "oracle": TOLD} | settings)


def both(shift: float, seed: int) -> tuple[Scores, Scores]:
    return answers(shift, seed=seed), answers(shift, seed=seed + 100)


CLINIC = (answers(-2, seed=11), answers(0.5, seed=12))
LAW = (answers(0.5, seed=13), answers(-2, seed=14))

# gate, static, kept, what the sentence says
CASES: dict[str, tuple[tuple[Scores, Scores], tuple[Scores, Scores], bool, tuple[str, ...]]] = {
    "better than all": (
        both(-2, 1), both(-1, 2), True,
        ("The gate is kept: its sealed-test loss is ", "of the base's below that of the static weights (0.5·clinic + "
         "0.5·law) (95 % interval −", "beats the base and every choice that is the same for all prompts"),
    ),
    "as good as static": (
        both(-1, 3), both(-1, 4), False,
        ("The gate is not kept: it cannot be told from the static weights", "are delivered."),
    ),
    "the same answers": (both(-1, 2), both(-1, 2), False, ("it cannot be told from the static weights",)),
    "worse": (both(-0.5, 3), both(-1, 4), False, ("it is worse than the static weights", "which are the default.")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_gate_is_kept_only_if_it_wins_beyond_the_interval(case):
    gate, static, kept, said = CASES[case]
    found = verdict({"clinic": CLINIC, "law": LAW, STATIC: static, GATE: gate})
    assert found.kept is kept
    for text in said:
        assert text.replace("−", "-") in found.sentence.replace("−", "-")
    assert found.models == ("base", "clinic", "law", STATIC, GATE)
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("case", CASES)
def test_advice_on_examples_speaks_of_no_run(case):
    """Without a run there is no sealed test, no λ-validation, and nothing that is delivered."""
    gate, static, kept, _ = CASES[case]
    found = verdict({"clinic": CLINIC, "law": LAW, STATIC: static, GATE: gate, ORACLE: both(-2, 9)}, delivers=False)
    assert found.sentence.startswith(f"The gate is {'' if kept else 'not '}worth having: ")
    for word in ("sealed", "deliver", "λ-validation", "kept"):
        assert word not in " ".join((found.sentence, *found.notes))


def test_a_single_adapter_that_it_does_not_beat_keeps_it_out():
    """Better than the static weights is not enough where one adapter alone would do."""
    found = verdict({"clinic": both(-2, 5), STATIC: both(-1, 6), GATE: both(-2, 7)})
    assert not found.kept
    assert "but it does not beat 'clinic' alone (difference " in found.sentence
    assert "the static weights stay what is delivered" in found.sentence
    worst = verdict({"clinic": CLINIC, STATIC: both(-1, 6), GATE: (answers(-4, seed=1), answers(1, seed=2))},
                    goal=Goal("worst"))  # fmt: skip
    assert not worst.kept
    assert any(note.startswith("Judged is the worst domain") for note in worst.notes)


def test_the_oracle_is_the_ratio_of_the_losses_and_needs_not_know_every_domain():
    gate, oracle = both(-2, 8), both(-2.2, 9)
    models = {STATIC: both(-1, 10), GATE: gate, ORACLE: oracle}
    found = verdict(models)
    base = answers(0, 0).nll.sum()
    ratio = [sum(s.nll.sum() / base for s in pair) / 2 for pair in (gate, oracle)]
    assert found.behind_oracle is not None
    assert found.behind_oracle.estimate == pytest.approx(ratio[0] / ratio[1] - 1)
    assert found.behind_oracle.low <= found.behind_oracle.estimate <= found.behind_oracle.high
    assert "above an oracle that knows the domain" in found.sentence
    assert any("'clinic': 1·clinic; 'law': 1·law" in note for note in found.notes)
    assert found.kept, "an oracle is no rival"
    partly = verdict({**models, ORACLE: oracle[:1]}, oracle={"clinic": TOLD["clinic"]})
    assert partly.behind_oracle is not None
    assert partly.behind_oracle.estimate == pytest.approx(gate[0].nll.sum() / oracle[0].nll.sum() - 1)
    assert any("on these domains alone" in note for note in partly.notes)
    assert not [row for row in partly.rows if row.model == ORACLE and row.domain == ALL]
    assert verdict({STATIC: both(-1, 10), GATE: gate}, oracle={}).behind_oracle is None


def test_every_model_has_its_row_in_every_domain_and_the_gate_its_difference():
    by = {"clinic": CLINIC, STATIC: both(-1, 2), GATE: (pairs(0.5, 3), pairs(0.5, 4)), "base": (pairs(0), pairs(0))}
    by |= {name: (pairs(0.1, k), pairs(0.2, k + 1)) for k, name in enumerate(("clinic", STATIC), start=10)}
    found = verdict(by, betas={"clinic": 0.1, "law": 0.1}, oracle={})
    for model in found.models:
        assert {row.domain for row in found.rows if row.model == model and row.metric == "nll"} == {"clinic", "law"}
        assert any(row.metric == "preference_accuracy" for row in found.rows if row.model == model)
    assert {d.b for d in found.differences if d.domain == ALL} == {"base", "clinic", STATIC}
    assert all(d.a == GATE for d in found.differences)
    table = Comparison(found.as_dict()["evaluation"])
    assert table.delivered == GATE, "the report marks the gate"


def test_too_few_groups_say_so():
    few = tuple(answers(-2, seed=1, n=1) for _ in range(2))
    base = tuple(answers(0, 0, n=1) for _ in range(2))
    found = verdict({"base": base, STATIC: base, GATE: few}, oracle={})
    assert not found.kept
    assert any("no difference whatever can be seen" in note for note in found.notes)
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", DOMAINS)
def test_each_item_under_its_own_coefficients(tiny_model, name, groups):
    """As if every item were scored alone, with the bank's selection of its row."""
    domain, bank = DOMAINS[name], Bank(tiny_model)
    bank.load("a", adapter(tiny_model, 2, 1, ("q_proj", "down_proj")))
    bank.load("b", adapter(tiny_model, 3, 2, ("v_proj", "up_proj")))
    n = len(domain.items)
    rows = torch.tensor(np.random.default_rng(0).uniform(-1, 1, (n, 2)), dtype=torch.float32)
    rows[1] = 0.0
    given: dict[str, Any] = {"coefficients": rows}
    if groups:  # both groups alike: the same answers
        given = {
            "coefficients": rows[:, None].expand(n, 2, 2),
            "groups": {path: k % 2 for k, path in enumerate(bank.layers())},
        }
    heard: list[int] = []
    found = score_each(bank, domain, ("a", "b"), pad_id=3, on_batch=heard.append, **given)
    assert sum(heard) == n
    for i in range(n):
        one = domain.items[i : i + 1]
        with bank.using({"a": float(rows[i, 0]), "b": float(rows[i, 1])}):
            alone = score(tiny_model, type(domain)(name, domain.kind, one, domain.gold[i : i + 1], ("g",)), 3)
        assert found.sums[i] == pytest.approx(alone.sums[0], rel=1e-4, abs=1e-4)
        assert found.tokens[i] == alone.tokens[0]
    assert (found.kind, found.gold, found.groups) == (domain.kind, domain.gold, domain.groups)
