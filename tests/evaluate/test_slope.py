"""Derivatives by λ against finite differences of an independent float64 forward pass with merged weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank import Bank
from lorchestra.data.render import Branch, Rendered
from lorchestra.evaluate.score import Domain, score
from lorchestra.evaluate.slope import slope

WEIGHTS = {"a": 0.5, "b": -0.25, "c": 0.0}


def adapter(model, rank, seed, only=("c_attn", "mlp.c_fc"), scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in model.named_modules():
        if path.endswith(only):
            n, m = module.weight.shape  # Conv1D
            B = torch.randn(m, rank, generator=generator) * scale
            modules[path] = LowRank(B, torch.randn(rank, n, generator=generator) * scale)
    return Adapter(modules)


@pytest.fixture
def model():
    """GPT-2 computes in float64 throughout; Llama's norm would round to float32 on the way."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.15)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture
def adapters(model):
    return {
        "a": adapter(model, 2, 1),
        "b": adapter(model, 3, 2, ("attn.c_proj", "mlp.c_proj")),
        "c": adapter(model, 1, 3, ("mlp.c_fc",)),
    }


def ids(seed, length):
    return tuple(torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def branch(seed, length):
    return Branch(ids(seed, length), (True,) * length)


@pytest.fixture
def domains():
    answers = tuple(Rendered(ids(i, 5 + i), (branch(50 + i, 3 + i % 3),), 0) for i in range(5))
    choice = Rendered(ids(9, 6), (branch(60, 3), branch(61, 4), branch(62, 2)), 0)
    pairs = tuple(Rendered(ids(20 + i, 4 + i), (branch(70 + i, 4), branch(80 + i, 3)), 0) for i in range(3))
    return {
        "notes": Domain("notes", "sft", (*answers, choice), (0,) * 5 + (1,), tuple("uvwxyz")),
        "pairs": Domain("pairs", "dpo", pairs, (0, 0, 0), ("p", "q", "r")),
    }


def mounted(model, adapters):
    bank = Bank(model)
    for name, each in adapters.items():
        bank.load(name, each)
    return bank


@torch.no_grad()
def dense_ratios(model, adapters, weights, domains, beta):
    """The oracle: domain → loss / base loss, every ΔW formed densely, all in float64, one sequence at a time."""

    def branch_sums(mixture):
        merged = copy.deepcopy(model).double()
        for name, weight in mixture.items():
            for path, update in adapters[name].modules.items():
                merged.get_submodule(path).weight += weight * update.dense(torch.float64).T
        found = {}
        for name, domain in domains.items():
            rows = []
            for item in domain.items:
                sums = []
                for each in item.branches:
                    logits = merged(input_ids=torch.tensor([item.prompt + each.ids])).logits[0].log_softmax(-1)
                    start = len(item.prompt) - 1
                    sums.append(float(sum(logits[start + k, token] for k, token in enumerate(each.ids))))
                rows.append(sums)
            found[name] = rows
        return found

    ours, base = branch_sums(weights), branch_sums({})
    nll = {
        key: sum(-row[gold] for row, gold in zip(found["notes"], domains["notes"].gold, strict=True))
        for key, found in (("ours", ours), ("base", base))
    }
    margins = [(row[0] - row[1]) - (zero[0] - zero[1]) for row, zero in zip(ours["pairs"], base["pairs"], strict=True)]
    dpo = float(np.mean(np.logaddexp(0, -beta * np.array(margins)))) / np.log(2)
    return {"notes": nll["ours"] / nll["base"], "pairs": dpo}


class TestSlope:
    @pytest.mark.parametrize("positions", [16, 4096])
    def test_equals_finite_differences_of_dense_float64(self, model, adapters, domains, positions):
        """Also by a λ at zero, through preference pairs and a multiple-choice item, whatever the size of the passes."""
        beta, step = 0.3, 2.0**-12
        model.double()
        bank = mounted(model, adapters)
        reference = {name: score(model, domain, 3) for name, domain in domains.items()}
        found = slope(bank, domains, WEIGHTS, reference, {"pairs": beta}, 3, positions=positions)
        bank.unmount()
        assert found.ratios == pytest.approx(dense_ratios(model, adapters, WEIGHTS, domains, beta), rel=1e-6)
        for k, name in enumerate(WEIGHTS):
            up, down = (
                dense_ratios(model, adapters, {**WEIGHTS, name: WEIGHTS[name] + sign * step}, domains, beta)
                for sign in (1, -1)
            )
            for domain in domains:
                expected = (up[domain] - down[domain]) / (2 * step)
                assert found.jacobian[domain][k] == pytest.approx(expected, rel=1e-4, abs=1e-6)
                assert abs(expected) > 1e-4, "the derivative must not vanish, or the law is vacuous"

    def test_ratios_are_those_of_scores(self, model, adapters, domains):
        bank = mounted(model, adapters)
        reference = {name: score(model, domain, 3) for name, domain in domains.items()}
        found = slope(bank, domains, WEIGHTS, reference, {"pairs": 0.3}, 3)
        with bank.using(WEIGHTS):
            for name, domain in domains.items():
                top, bottom = score(model, domain, 3).loss(reference[name], 0.3)
                assert found.ratios[name] == pytest.approx(top.sum() / bottom.sum(), rel=1e-5)

    def test_no_weight_gets_a_gradient_and_nothing_is_left_behind(self, model, adapters, domains):
        bank = mounted(model, adapters)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        reference = {name: score(model, domain, 3) for name, domain in domains.items()}
        items = []
        with torch.no_grad():
            slope(bank, domains, WEIGHTS, reference, {}, 3, on_batch=items.append)
        assert sum(items) == 9
        assert all(not p.requires_grad and p.grad is None for p in model.parameters())
        for layer in bank.layers().values():
            assert all(not u.A.requires_grad and not u.B.requires_grad for u in layer.frozen.values())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
