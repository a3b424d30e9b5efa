"""Mixtures scored together: each as if it had been scored alone."""

from __future__ import annotations

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank import Bank
from lorchestra.data.render import Branch, Rendered
from lorchestra.evaluate.mixtures import score_mixtures
from lorchestra.evaluate.score import Domain, score

MIXTURES = [{"a": 0.5, "b": -0.25}, {}, {"a": 1.0, "b": 1.0}, {"b": -0.5}]


def adapter(model, rank, seed, only):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in model.named_modules():
        if path.endswith(only):
            m, n = module.weight.shape
            A = torch.randn(rank, n, generator=generator) * 0.2
            modules[path] = LowRank(torch.randn(m, rank, generator=generator) * 0.2, A)
    return Adapter(modules)


def ids(seed, length):
    return tuple(torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def branch(seed, length):
    return Branch(ids(seed, length), (True,) * length)


ANSWERS = tuple(Rendered(ids(i, 5 + 3 * i), (branch(50 + i, 3 + i % 3),), 0) for i in range(5))
CHOICE = Rendered(ids(9, 6), (branch(60, 3), branch(61, 4), branch(62, 2)), 0)
PAIRS = tuple(Rendered(ids(20 + i, 4 + i), (branch(70 + i, 4), branch(80 + i, 3)), 0) for i in range(3))
DOMAINS = {
    "answers": Domain("answers", "sft", (*ANSWERS, CHOICE), (0,) * 5 + (1,), tuple("uvwxyz")),
    "pairs": Domain("pairs", "dpo", PAIRS, (0, 0, 0), tuple("pqr")),
}


@pytest.mark.parametrize("positions", [24, 4096])
@pytest.mark.parametrize("name", DOMAINS)
def test_together_equals_one_after_the_other(tiny_model, name, positions):
    domain, bank = DOMAINS[name], Bank(tiny_model)
    bank.load("a", adapter(tiny_model, 2, 1, ("q_proj", "down_proj")))
    bank.load("b", adapter(tiny_model, 3, 2, ("v_proj", "up_proj")))
    together = score_mixtures(bank, domain, MIXTURES, 3, positions)
    assert len(together) == len(MIXTURES)
    for mixture, found in zip(MIXTURES, together, strict=True):
        with bank.using(mixture):
            alone = score(tiny_model, domain, 3)
        assert (found.kind, found.tokens, found.gold, found.groups) == (
            alone.kind, alone.tokens, alone.gold, alone.groups,
        )  # fmt: skip
        for ours, theirs in zip(found.sums, alone.sums, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    assert together[0].sums[0] != pytest.approx(together[1].sums[0], rel=1e-3), "the mixtures must differ"
