"""Training through the bank is training through PEFT: the same gradients, the same factors after AdamW."""

from __future__ import annotations

import random

import peft
import pytest
import torch
from tests.conftest import make_tiny_model

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.bank import Bank
from lorchestra.data.render import Branch, Rendered
from lorchestra.objective.batch import pack
from lorchestra.objective.logprobs import branch_logprobs
from lorchestra.objective.losses import sft_loss
from lorchestra.train.lora import new_member
from lorchestra.train.settings import ContextMember, LoraSettings, TrainSettings
from lorchestra.train.settings import Objective as ObjectiveSettings
from lorchestra.train.stage import StageInputs, train_stage

BASE = BaseId(name="tiny", weights="sha256:tiny")
PAD = 3


def items(n=6, seed=0):
    """Prompts and answers of different lengths; some tokens of an answer do not count."""
    chance = random.Random(seed)
    out = []
    for _ in range(n):
        prompt = tuple(chance.randrange(4, 260) for _ in range(chance.randrange(2, 9)))
        answer = tuple(chance.randrange(4, 260) for _ in range(chance.randrange(3, 7)))
        counts = (*(chance.random() < 0.7 for _ in answer[1:]), True)
        out.append(Rendered(prompt, (Branch(answer, counts),), 0))
    return out


def peft_batch(rendered):
    """The same items as transformers takes them: padded ids, an attention mask, labels with −100."""
    rows = [(*item.prompt, *item.branches[0].ids) for item in rendered]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for b, (row, item) in enumerate(zip(rows, rendered, strict=True)):
        ids[b, : len(row)], mask[b, : len(row)] = torch.tensor(row), 1
        for j, (token, counts) in enumerate(zip(item.branches[0].ids, item.branches[0].supervised, strict=True)):
            if counts:
                labels[b, len(item.prompt) + j] = token
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def peft_model(lora, member, context=None):
    """Plain PEFT with the factors of ``member`` as adapter ``new``, and ``context`` as a second active one."""

    def config(settings):
        return peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, use_rslora=settings.scaling == "rslora", lora_dropout=0.0,
            target_modules="all-linear" if settings.target_modules == "all-linear" else list(settings.target_modules),
            task_type="CAUSAL_LM",
        )  # fmt: skip

    model = peft.get_peft_model(make_tiny_model(), config(lora), "new")
    put(model, "new", member)
    if context is not None:
        settings, factors, weight = context
        model.add_adapter("context", config(settings))
        put(model, "context", factors)
        model.base_model.set_adapter(["context", "new"])
        for layer in lora_layers(model).values():
            if "context" in layer.scaling:
                layer.scaling["context"] *= weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".new." in name)
    return model


def lora_layers(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in layers.items()}


def put(model, name, member):
    layers = lora_layers(model)
    with torch.no_grad():
        for path, B, A in zip(member.paths, member.B, member.A, strict=True):
            layers[path].lora_B[name].weight.copy_(B)
            layers[path].lora_A[name].weight.copy_(A)


def random_member(settings, seed):
    """Factors as if trained: B is not zero."""
    member = new_member(make_tiny_model(), settings, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in member.B:
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    return member


CONTEXT = LoraSettings(rank=3, alpha=5, scaling="rslora", target_modules=("q_proj", "down_proj"))
SETTINGS = {
    "lora": LoraSettings(rank=4, alpha=6, scaling="lora"),
    "rslora": LoraSettings(rank=4, alpha=3, scaling="rslora", init="gaussian"),
    "two targets": LoraSettings(rank=2, alpha=4, scaling="rslora", target_modules=("v_proj", "down_proj")),
}


def context_of(weight):
    """The same context for both: PEFT's settings and factors, and our adapter."""
    member = random_member(CONTEXT, seed=7)
    return (CONTEXT, member, weight), Adapter(member.folded(), BASE)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("weight", [None, 1.0, 0.4])
def test_the_same_loss_and_gradients(case, weight):
    settings, rendered = SETTINGS[case], items()
    member = random_member(settings, seed=1)
    bank = Bank(make_tiny_model(), BASE)
    coefficients, context = {"new": 1.0}, None
    if weight is not None:
        context, adapter = context_of(weight)
        bank.load("context", adapter)
        coefficients["context"] = weight
    bank.mount_trainable("new", member)
    packed = pack(rendered, PAD)
    with bank.using(coefficients):
        ours = sft_loss(branch_logprobs(bank.model, packed), packed.supervised)
    ours.backward()

    model = peft_model(settings, member, context)
    theirs = model(**peft_batch(rendered)).loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    layers = lora_layers(model)
    assert set(member.paths) == {path for path, layer in layers.items() if "new" in layer.lora_A}
    for path, B, A in zip(member.paths, member.B, member.A, strict=True):
        for found, expected in [(B.grad, layers[path].lora_B["new"]), (A.grad, layers[path].lora_A["new"])]:
            assert expected.weight.grad.norm() > 1e-4, "the gradients must be there, or the law is vacuous"
            torch.testing.assert_close(found, expected.weight.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if ".new." not in n)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("weight", [None, 1.0, 0.4])
def test_the_same_factors_after_adamw(case, weight, steps, tmp_path):
    """A whole stage of ours against a training loop of a few lines on plain PEFT."""
    settings, rendered = SETTINGS[case], items()
    context, adapter = (None, None) if weight is None else context_of(weight)
    train = TrainSettings(
        max_steps=steps, batch_size=len(rendered), learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0,
        scheduler="constant", max_grad_norm=0,
    )  # fmt: skip
    stage = StageInputs(
        name="new", objective=ObjectiveSettings(), lora=settings, train=train, items=rendered, validation=[],
        context={} if adapter is None else {"context": (adapter, ContextMember(weight=weight))}, init_seed=5,
    )  # fmt: skip
    ours = train_stage(make_tiny_model(), BASE, PAD, stage, tmp_path / "work").adapter

    start = new_member(make_tiny_model(), settings, seed=5, name="new")
    model = peft_model(settings, start, context)
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(**peft_batch(rendered)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = lora_layers(model)
    assert set(ours.modules) == set(start.paths)
    for path, update in ours.modules.items():
        B, A = layers[path].lora_B["new"].weight, layers[path].lora_A["new"].weight
        # AdamW divides by the gradient's size: where that is near nothing, so is what the rounding leaves of it.
        torch.testing.assert_close(update.B / settings.scale, B.detach(), rtol=1e-3, atol=1e-4 * steps)
        torch.testing.assert_close(update.A, A.detach(), rtol=1e-3, atol=1e-4 * steps)
        assert B.abs().max() > 5e-3, "a step moves B by about the learning rate"
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_context_changes_what_is_learned():
    """Else the stacked cases above would prove nothing."""
    settings, packed = SETTINGS["lora"], pack(items(), PAD)
    member = random_member(settings, seed=1)
    bank = Bank(make_tiny_model(), BASE)
    bank.load("context", context_of(1.0)[1])
    bank.mount_trainable("new", member)
    gradients = []
    for weights in ({"new": 1.0}, {"new": 1.0, "context": 1.0}):
        with bank.using(weights):
            sft_loss(branch_logprobs(bank.model, packed), packed.supervised).backward()
        gradients.append(torch.cat([B.grad.flatten() for B in member.B]))
        member.zero_grad()
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()
