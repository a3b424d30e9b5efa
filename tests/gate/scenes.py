"""Two domains that a glance tells apart, with an adapter for each; GPT-2 for float64."""

from __future__ import annotations

from functools import cache

import torch
from tests.conftest import make_tiny_model

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank import Bank, TrainableMember, linear_shape
from lorchestra.data.render import Branch, Rendered
from lorchestra.gate.features import FeatureSpec
from lorchestra.gate.measure import GateExample
from lorchestra.gate.network import AdapterId, Gate, GateSpec
from lorchestra.objective.batch import pack
from lorchestra.objective.logprobs import branch_logprobs
from lorchestra.objective.losses import sft_loss

BASE = BaseId("tiny", "sha256:weights", "sha256:tokenizer", "sha256:template")
ALPHABETS = {"law": range(20, 30), "medicine": range(120, 130)}
ANSWERS = {"law": (70, 71, 72, 2), "medicine": (170, 171, 172, 2)}


def example(domain, seed, kind="sft", text=""):
    """A prompt of 4 to 11 letters of the domain's alphabet, and the domain's answer."""
    generator = torch.Generator().manual_seed(seed)
    letters = ALPHABETS[domain]
    length = int(torch.randint(4, 12, (1,), generator=generator))
    prompt = tuple(letters[i] for i in torch.randint(0, len(letters), (length,), generator=generator).tolist())
    names = [domain, *(other for other in ANSWERS if other != domain)] if kind == "dpo" else [domain]
    branches = tuple(Branch(ANSWERS[name], (True,) * 4) for name in names)
    return GateExample(Rendered(prompt, branches), domain, kind, 0, text or f"{domain} {seed}")


def examples(count, first, kind="sft", domains=tuple(ALPHABETS)):
    return [example(domain, first + i, kind) for i in range(count) for domain in domains]


def random_adapter(model, seed, rank=2, scale=0.2, only=("q_proj", "down_proj", "c_attn", "c_fc")):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape and path.endswith(only):
            B = torch.randn(shape[0], rank, generator=generator) * scale
            modules[path] = LowRank(B, torch.randn(rank, shape[1], generator=generator) * scale)
    return Adapter(modules, BASE)


def tiny():
    """The tiny model, surer of itself: as it is, no hidden state makes any token likely."""
    model = make_tiny_model()
    model.model.norm.weight.mul_(4)
    return model


@cache
def trained(domain):
    """An adapter that answers the prompts of ``domain``, whatever it is asked."""
    model = tiny()
    start = random_adapter(model, 5, rank=8, only=("v_proj", "o_proj", "down_proj"))
    member = TrainableMember({path: (0 * update.B, update.A) for path, update in start.modules.items()}, 1.0)
    bank = Bank(model, BASE)
    bank.mount_trainable("new", member)
    optimiser = torch.optim.Adam(member.parameters(), lr=0.03)
    batch = pack([e.scored for e in examples(12, 1000, domains=(domain,))], 3)
    for _ in range(400):
        optimiser.zero_grad()
        with bank.using({"new": 1.0}):
            loss = sft_loss(branch_logprobs(model, batch), batch.supervised)
        if loss.item() < 0.1:
            return Adapter(member.folded(), BASE)
        loss.backward()
        optimiser.step()
    raise AssertionError(f"the adapter of {domain} did not learn: loss {loss.item():.2f}")


def scene():
    """The tiny model with both adapters on it."""
    bank = Bank(tiny(), BASE)
    for domain in ALPHABETS:
        bank.load(domain, trained(domain))
    return bank


def make_gate(n=8, members=("a", "b", "c"), weights=True, **settings):
    """A gate with weights that make prompts differ."""
    ids = tuple(AdapterId(name, f"sha256:{name}") for name in members)
    spec = GateSpec("chooser", ids, BASE, settings.pop("features", FeatureSpec()), **settings)
    generator = torch.Generator().manual_seed(0)
    gate = Gate(spec, torch.randn(n, generator=generator), torch.rand(n, generator=generator) + 0.5)
    if weights:
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gate


def prompts_of(count, n=8, seed=1):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed))
