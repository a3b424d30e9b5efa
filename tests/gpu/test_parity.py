"""On the card as in dense float64 on the CPU: adapters, their sums in every row, a merged model, all that scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import make_tiny_model
from tests.train.conftest import adapter_for, pairs, sft_items

from lorchestra.adapter.lineage import BaseId
from lorchestra.bank import Bank
from lorchestra.data.render import Branch, Rendered
from lorchestra.evaluate.activation import activation_norms
from lorchestra.evaluate.answer import Sampling, answers
from lorchestra.evaluate.mixtures import score_mixtures
from lorchestra.evaluate.parity import Parity, logits_of, merged_parity
from lorchestra.evaluate.score import Domain, score
from lorchestra.evaluate.slope import slope
from lorchestra.fusion.stream import merge

PROMPTS = [(5, 60, 7, 100, 21), (44, 9), tuple(range(10, 90))]
MIXTURES = [{"a": 1.0}, {"a": 0.3, "b": -0.7}, {}, {"b": 1.5}]
PAD = 3


def adapters():
    return {"a": adapter_for(make_tiny_model(), 1, scale=0.2), "b": adapter_for(make_tiny_model(), 2, scale=0.2)}


def mounted(device):
    bank = Bank(make_tiny_model().to(device))
    for name, adapter in adapters().items():
        bank.load(name, adapter)
    return bank


def dense(weights):
    """The model with Σλᵢ·ΔWᵢ in its weights, in float64 on the CPU."""
    model, named = make_tiny_model().double(), adapters()
    for name, weight in weights.items():
        for path, update in named[name].modules.items():
            model.get_submodule(path).weight += weight * update.dense(torch.float64)
    return model


def exact(model):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in PROMPTS]


@pytest.mark.parametrize("weights", [m for m in MIXTURES if m], ids=str)
def test_the_answers_are_those_of_the_dense_sum(device, weights, figure):
    bank = mounted(device)
    with bank.using(weights):
        found = logits_of(bank.model, PROMPTS)
    parity = Parity.of(exact(dense({})), exact(dense(weights)), found)
    assert parity.ratio < 1e-4
    figure(f"parity {weights} on {device}, float32, against float64: {parity.ratio:.1e} of the adapters' effect")


def test_every_row_has_its_own_mixture(device):
    bank = mounted(device)
    ids = torch.tensor([PROMPTS[0]] * len(MIXTURES), device=device)
    with torch.no_grad(), bank.using_rows(MIXTURES):
        rows = bank.model(input_ids=ids).logits.cpu()
    base = exact(dense({}))[0]
    for row, weights in zip(rows, MIXTURES, strict=True):
        expected = exact(dense(weights))[0]
        assert (row - expected).norm() <= 1e-4 * ((expected - base).norm() or expected.norm())


def test_a_merged_model_answers_as_base_and_adapter(device, tiny_dir, tmp_path, figure):
    adapter = replace(adapters()["a"], base=BaseId())
    merge(tiny_dir, adapter, tmp_path / "merged", dtype="float32")
    stored, plain = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", tiny_dir))
    for path, update in adapter.modules.items():
        expected = plain[f"{path}.weight"].double() + update.dense(torch.float64)
        torch.testing.assert_close(stored[f"{path}.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    found = merged_parity(tiny_dir, tmp_path / "merged", {"a": adapter}, {"a": 1.0}, PROMPTS, str(device))
    assert found.ratio < 1e-3
    figure(f"parity of the merged model on {device}, float32: {found.ratio:.1e} (the law allows 5e-2)")


def domain():
    choices = [
        Rendered(item.prompt, (item.branches[0], Branch((150, 151, 2), (True,) * 3)), 0) for item in sft_items(9)
    ]
    return Domain("d", "sft", tuple(choices), (0,) * 9, tuple(map(str, range(9))))


def preferences():
    return Domain("p", "dpo", tuple(pairs(7)), (0,) * 7, tuple(map(str, range(7))))


def close(found, expected):
    for ours, theirs in zip(found.sums, expected.sums, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-3)


def test_scores_are_those_of_the_cpu(device):
    here, there = mounted(torch.device("cpu")), mounted(device)
    for weights in MIXTURES:
        with here.using(weights), there.using(weights):
            close(score(there.model, domain(), PAD), score(here.model, domain(), PAD))
    for ours, theirs in zip(
        score_mixtures(there, domain(), MIXTURES, PAD), score_mixtures(here, domain(), MIXTURES, PAD), strict=True
    ):
        close(ours, theirs)


def test_slopes_are_those_of_the_cpu(device):
    domains = {"d": domain(), "p": preferences()}
    found = []
    for bank in (mounted(torch.device("cpu")), mounted(device)):
        reference = {name: score(bank.model, given, PAD) for name, given in domains.items()}
        found.append(slope(bank, domains, {"a": 0.4, "b": 0.2}, reference, {"p": 0.1}, PAD))
    for name in domains:
        assert found[1].ratios[name] == pytest.approx(found[0].ratios[name], rel=1e-4)
        assert found[1].jacobian[name] == pytest.approx(found[0].jacobian[name], rel=1e-3, abs=1e-5)


def test_effects_on_text_are_those_of_the_cpu(device):
    expected, tokens = activation_norms(make_tiny_model(), adapters(), sft_items(6), PAD)
    found, counted = activation_norms(make_tiny_model().to(device), adapters(), sft_items(6), PAD)
    assert counted == tokens
    for path, of_module in expected.items():
        assert found[path] == pytest.approx(of_module, rel=1e-4)


def test_greedy_answers_are_those_of_the_cpu(device, tiny_tokenizer):
    said = []
    for bank in (mounted(torch.device("cpu")), mounted(device)):
        with bank.using({"a": 1.0}):
            said.append(answers(bank.model, tiny_tokenizer, PROMPTS, Sampling(max_new_tokens=6)))
    assert said[0] == said[1]
