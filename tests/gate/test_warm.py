"""The warm start on made-up features and losses, where it is known which member each prompt is for."""

from __future__ import annotations

import pytest
import torch
from tests.gate.scenes import examples, scene

from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import UserError
from lorchestra.gate.features import FeatureSpec
from lorchestra.gate.fit import fit
from lorchestra.gate.network import AdapterId, Gate, GateSpec
from lorchestra.gate.settings import FitSettings
from lorchestra.gate.warm import Scored, importance, soft_targets, warm_start

F, K = 40, 3


def world(count: int, seed: int, scale: tuple[float, ...] = (1.0, 1.0, 1.0), noise: float = 0.3) -> Scored:
    """Prompts of three domains, faintly apart; member k is better by ``scale[k]`` nats a token in domain k."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % K
    x = torch.randn(count, F, generator=draw) + 1.1 * torch.eye(K, F)[kind]
    losses = 5.0 + noise * torch.randn(count, K + 1, generator=draw).double()
    losses[torch.arange(count), kind + 1] -= torch.tensor(scale)[kind].double()
    return Scored(x, losses, [f"d{int(k)}" for k in kind], torch.full((count,), 1 / count / 5).double())


def gate(activation: str = "softmax", none: bool = False) -> Gate:
    members = tuple(AdapterId(f"m{k}", f"sha256:{k}") for k in range(K))
    spec = GateSpec("g", members, BaseId(), FeatureSpec(0, False), activation, (), None, none, 1.0, 0)
    return Gate(spec, torch.zeros(F), torch.ones(F), 0)


def right(made: Gate, new: Scored) -> float:
    """The share of prompts whose domain's member has the greatest coefficient."""
    with torch.no_grad():
        chosen = made.coefficients(new.x).argmax(dim=1)
    return float((chosen == torch.tensor([int(domain[1:]) for domain in new.domains])).double().mean())


def most(new: Scored) -> float:
    """What the best rule there is gets right: the three features that differ, one for each domain."""
    return float((new.x[:, :K].argmax(dim=1) == torch.tensor([int(d[1:]) for d in new.domains])).double().mean())


def test_prompts_that_nobody_scored_help():
    learn, held, new, more = world(45, 1), world(30, 2), world(900, 3), world(900, 4)
    alone = right(warm_start(gate(), learn, held), new)
    helped = right(warm_start(gate(), learn, held, more.x, more.domains), new)
    assert helped > alone + 0.03
    assert helped > most(new) - 0.06


@pytest.mark.parametrize("none", [False, True])
def test_one_name_for_everything_does_not_hide_what_examples_say(none):
    """All prompts of one domain: its means tell nothing, and single losses are gone by."""
    parts = [world(n, seed, noise=0.05) for n, seed in ((300, 1), (60, 2), (600, 4))]
    learn, held, more = (Scored(p.x, p.losses, ["all"] * len(p.x), p.weights) for p in parts)
    made = warm_start(gate(none=none), learn, held, more.x, more.domains)
    new = world(900, 3)
    assert right(made, new) > most(new) - 0.1


@pytest.mark.parametrize("activation", ["sigmoid", "linear"])
def test_other_activations_begin_somewhere_too(activation):
    learn, held, more = world(300, 1, noise=0.05), world(60, 2, noise=0.05), world(300, 4)
    new = world(900, 3)
    assert right(warm_start(gate(activation), learn, held, more.x, more.domains), new) > most(new) - 0.1


def test_targets_are_of_each_examples_own_scale():
    losses = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.1, 1.2], [4.0, 4.0, 4.0]]).double()
    found = soft_targets(losses)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3).double())
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], torch.full((3,), 1 / 3).double())
    assert found[0, 0] > 0.9
    assert importance(losses)[0] > 5 * importance(losses)[1] > 5 * importance(losses)[2]


def test_prompts_go_to_the_fit():
    train = examples(6, 0)
    more = [(e.domain, e.item.prompt) for e in (*train, *examples(12, 300))]
    settings, given = FitSettings(epochs=0), {"pad_id": 3}
    members, held = tuple(dict.fromkeys(e.domain for e in train)), examples(4, 100)
    without = fit(scene(), members, train, held, settings, **given)
    same = fit(scene(), members, train, held, settings, prompts=[*more[: len(train)], (members[0], ())], **given)
    helped = fit(scene(), members, train, held, settings, prompts=more, **given)
    assert same.gate.digest == without.gate.digest, "prompts that were scored already, and empty ones, say nothing new"
    assert helped.gate.digest != without.gate.digest
    with pytest.raises(UserError, match="prompts of 'poetry', and no examples"):
        fit(scene(), members, train, held, settings, prompts=[("poetry", (5, 6))], **given)
