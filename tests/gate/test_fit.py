"""Training a gate on two domains that can be told apart: near the oracle, the same bits again, collapse said."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tests.gate.scenes import ALPHABETS, BASE, example, examples, random_adapter, scene, tiny, trained

from lorchestra.bank import Bank
from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import AdapterError, DataError, UserError
from lorchestra.evaluate.mixtures import score_each
from lorchestra.evaluate.score import Domain, score
from lorchestra.gate.features import features
from lorchestra.gate.fit import _spread, fit
from lorchestra.gate.measure import Measured, domain_shares, measure
from lorchestra.gate.settings import FitSettings
from lorchestra.objective.batch import pack
from lorchestra.objective.logprobs import branch_logprobs

MEMBERS = tuple(ALPHABETS)


def fitted(settings=None, bank=None, train=None, validation=None, **more):
    return fit(
        bank or scene(), MEMBERS, train or examples(16, 0), validation or examples(8, 100),
        settings or FitSettings(), pad_id=3, **more,
    )  # fmt: skip


def test_a_gate_learns_to_route():
    """Close to the oracle on new prompts, by an independent scoring of merged rows, and far from any single adapter."""
    bank = scene()
    found = fitted(bank=bank)
    new = examples(8, 500)
    x = features(bank.model, [e.item.prompt for e in new], found.gate.spec.features)
    coefficients = found.gate.coefficients(x)
    chosen = [MEMBERS[k] for k in coefficients.argmax(dim=1).tolist()]
    assert chosen == [e.domain for e in new]
    items = tuple(e.item for e in new)
    domain = Domain("new", "sft", items, (0,) * len(new), tuple(str(i) for i in range(len(new))))
    gate = score_each(bank, domain, MEMBERS, coefficients, 3).nll
    oracle, single = [], {}
    for name in MEMBERS:
        with bank.using({name: 1.0}):
            single[name] = score(bank.model, domain, 3).nll
    oracle = sum(single[e.domain][i] for i, e in enumerate(new))
    assert gate.sum() < 1.05 * oracle + 0.5
    assert gate.sum() < 0.5 * min(values.sum() for values in single.values())
    assert found.loads.kind == "routes"
    assert found.loads.best == {name: name for name in MEMBERS}
    assert found.validation["gate"] < 1.1 * found.validation["oracle"] + 0.02


@pytest.mark.parametrize(
    "changed",
    [
        {"activation": "sigmoid"},
        {"activation": "linear"},
        {"hidden": 8},
        {"groups": 2},
        {"none": True, "top_k": 1},
        {"layers": 1, "last_token": True, "top_k": 1},
    ],
    ids=str,
)
def test_every_kind_of_gate_learns(changed):
    found = fitted(FitSettings(epochs=1, **changed))
    alone = min(found.validation[name] for name in MEMBERS)
    assert found.validation["gate"] < 0.5 * alone
    assert found.gate.spec.outputs == found.gate.last.bias.numel()


def test_the_warm_start_alone_routes_and_training_does_not_make_it_worse():
    warm = fitted(FitSettings(epochs=0))
    assert len(warm.history) == 1
    assert warm.loads.kind == "routes"
    assert fitted(FitSettings(epochs=2)).validation["gate"] <= warm.validation["gate"]


def test_the_same_seed_gives_the_same_bits():
    settings = FitSettings(hidden=4, epochs=1, seed=3)
    one, two = fitted(settings), fitted(settings)
    assert one.gate.digest == two.gate.digest
    assert one.as_dict() == two.as_dict()
    assert torch.equal(one.gate.memory.vectors, two.gate.memory.vectors)
    assert fitted(dataclasses.replace(settings, seed=4)).gate.digest != one.gate.digest


def test_neither_base_nor_adapters_change_and_nothing_stays_behind():
    bank = scene()
    before = {name: value.clone() for name, value in bank.model.state_dict().items()}
    digests = [bank.member(name).digest for name in MEMBERS]
    attention = bank.model.config._attn_implementation
    fitted(FitSettings(epochs=1), bank=bank)
    assert all(torch.equal(value, before[name]) for name, value in bank.model.state_dict().items())
    assert [bank.member(name).digest for name in MEMBERS] == digests
    assert not any(parameter.requires_grad for parameter in bank.model.parameters())
    assert bank.model.config._attn_implementation == attention


def test_preference_pairs_alone_and_beside_answers():
    pairs = fitted(train=examples(12, 0, "dpo"), validation=examples(6, 100, "dpo"))
    assert pairs.loads.kind == "routes"
    assert pairs.validation["gate"] < min(pairs.validation[name] for name in MEMBERS)
    mixed = fitted(
        train=[*examples(8, 0, domains=("law",)), *examples(8, 20, "dpo", ("medicine",))],
        validation=[*examples(4, 100, domains=("law",)), *examples(4, 120, "dpo", ("medicine",))],
        betas={"medicine": 0.3},
    )
    assert mixed.loads.kind == "routes"


def test_losses_are_those_of_each_model_alone():
    """Against plain forward passes, one example at a time; a pair's against DPO's formula in float64."""
    bank = scene()
    train, validation = [example("law", 1), example("medicine", 2, "dpo")], [example("law", 3)]
    found = measure(bank, MEMBERS, train, validation, pad_id=3, betas={"medicine": 0.4})

    def sums(e, weights):
        with torch.no_grad(), bank.using(weights):
            return branch_logprobs(bank.model, pack([e.item], 3, tree=False)).sums.double()

    for e, losses in zip([*train, *validation], [*found.train, *found.validation], strict=True):
        base = sums(e, {})
        for loss, weights in zip(losses, [{}, *({name: 1.0} for name in MEMBERS)], strict=True):
            ours = sums(e, weights)
            expected = -ours[0]
            if e.kind == "dpo":
                expected = -torch.nn.functional.logsigmoid(0.4 * ((ours[0] - ours[1]) - (base[0] - base[1])))
            assert loss == pytest.approx(float(expected), rel=1e-4)
    assert found.train[1][0] == pytest.approx(0.6931472)
    assert Measured.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_only_the_right_one_of_several_choices_counts():
    choices = Rendered((20, 21, 22), (Branch((170, 2), (True, True)), Branch((70, 71, 72, 2), (True,) * 4)))
    alone = Rendered((20, 21, 22), (choices.branches[1],))
    several = dataclasses.replace(example("law", 1), item=choices, gold=1)
    found = measure(scene(), MEMBERS, [several], [dataclasses.replace(several, item=alone, gold=0)], pad_id=3)
    assert found.train[0] == pytest.approx(found.validation[0], rel=1e-5)


def test_measured_losses_are_shared_by_gates_and_belong_to_their_examples():
    bank = scene()
    train, validation = examples(6, 0), examples(4, 100)
    found = measure(bank, MEMBERS, train, validation, pad_id=3)
    again = {"bank": bank, "train": train, "validation": validation}
    assert (
        fitted(FitSettings(epochs=0), **again).as_dict()
        == fitted(FitSettings(epochs=0), measured=found, **again).as_dict()
    )
    with pytest.raises(UserError, match="other examples or adapters"):
        fitted(bank=bank, train=examples(6, 50), validation=validation, measured=found)


def test_shares_make_the_mean_over_domains_of_loss_over_base_loss():
    few = [example("law", 0), example("law", 1), example("medicine", 2)]
    base, ours = [2.0, 6.0, 3.0], torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)
    assert float((domain_shares(few, base) * ours).sum()) == pytest.approx(((1 + 3) / 8 + 6 / 3) / 2)


def test_static_weights_are_a_start_where_they_are_better():
    """Halves of one adapter, which are worth something together: what each does alone cannot show it."""
    bank = Bank(tiny(), BASE)
    bank.load("one", trained("law") * 0.5)
    bank.load("two", trained("law") * 0.5)
    train, validation = examples(8, 0, domains=("law",)), examples(6, 100, domains=("law",))
    found = fit(
        bank, ("one", "two"), train, validation, FitSettings(epochs=0, activation="linear"),
        pad_id=3, start={"one": 1.0, "two": 1.0},
    )  # fmt: skip
    assert found.begun == "static"
    torch.testing.assert_close(found.gate.coefficients(torch.randn(3, 32)), torch.ones(3, 2))


def test_collapse_is_seen_and_told():
    """The same adapter twice under two names for one domain's examples: one gate has nothing to tell apart."""
    bank = Bank(tiny(), BASE)
    bank.load("law", trained("law"))
    bank.load("noise", trained("medicine") * 3.0)
    train = [dataclasses.replace(e, domain=f"part {i % 2}") for i, e in enumerate(examples(16, 0, domains=("law",)))]
    held = [dataclasses.replace(e, domain=f"part {i % 2}") for i, e in enumerate(examples(8, 100, domains=("law",)))]
    found = fit(bank, ("law", "noise"), train, held, FitSettings(balance=0.0), pad_id=3)
    assert found.loads.kind == "collapsed"
    assert found.loads.entropy < 0.3
    assert "'law' has" in found.loads.sentence
    assert "use it alone" in found.loads.sentence


def test_the_terms_against_collapse():
    """0 where all are asked alike; entropy looks at every prompt, balance at all of them together."""
    settings = FitSettings(entropy=0.3, balance=0.5)
    one, other, both = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    for rows, expected in (([both, both], 0.0), ([one, one], 0.8), ([one, other], 0.3)):
        assert float(_spread(torch.tensor(rows), settings)) == pytest.approx(expected, abs=1e-5)
    assert float(_spread(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), settings)) == pytest.approx(0.8, abs=1e-5)
    assert float(_spread(torch.tensor([[0.3]]), settings)) == 0.0
    leaning = torch.tensor([[0.8, 0.2]], requires_grad=True)
    _spread(leaning, settings).backward()
    assert leaning.grad[0, 0] > 0 > leaning.grad[0, 1], "descent draws them together"


def test_prompts_are_remembered_by_digest_and_by_text_only_where_asked():
    train = examples(6, 0)
    bare, told = (fitted(FitSettings(epochs=0, keep_prompts=keep), train=train).gate for keep in (False, True))
    assert [known.text for known in bare.memory.prompts] == [""] * len(train)
    assert [known.text for known in told.memory.prompts] == [e.text for e in train]
    assert [known.digest for known in bare.memory.prompts] == [e.digest for e in train]
    x = features(tiny(), [train[3].item.prompt], told.spec.features)
    nearest = told.explain(x)[0]
    assert (nearest[0].index, nearest[0].known.domain) == (3, train[3].domain)
    assert nearest[0].similarity == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 0}, "groups is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"balance": float("inf")}, "balance is inf"),
        ({"top_k": 3}, "top_k is 3, and there are 2 adapters"),
        ({"layers": 7}, "7 layers were asked for; LlamaForCausalLM has 2"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown"),
        ({"activation": "sigmoid", "none": True}, "none belongs to softmax"),
        ({"activation": "linear", "temperature": 2.0}, "temperature belongs to"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"hidden": -1}, "hidden is -1"),
    ],
)
def test_settings_that_make_no_gate_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        fitted(FitSettings(**settings))


def test_examples_that_teach_nothing_are_refused():
    with pytest.raises(DataError, match="no examples to validate by"):
        fit(scene(), MEMBERS, examples(2, 0), [], FitSettings(), pad_id=3)
    nothing = dataclasses.replace(example("law", 0), item=Rendered((), (Branch((70, 71), (True, True)),)))
    with pytest.raises(DataError, match="'law' has no prompt"):
        fitted(train=[nothing])
    with pytest.raises(UserError, match="softmax over 'law' alone is always 1"):
        fit(scene(), ("law",), examples(2, 0), examples(2, 9), FitSettings(), pad_id=3)


def test_an_adapter_of_the_head_is_refused():
    """The head sees the positions of all rows in one, so it cannot have coefficients by row."""
    bank = scene()
    bank.load("head", random_adapter(bank.model, 1, only=("lm_head",)))
    with pytest.raises(AdapterError, match="'head' changes 'lm_head'"):
        fit(bank, ("law", "head"), examples(2, 0), examples(2, 9), FitSettings(), pad_id=3)
