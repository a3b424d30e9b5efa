"""Adapters of embeddings on a bank, against plain PEFT and against the dense sum."""

from __future__ import annotations

import peft
import pytest
import torch
from tests.conftest import make_tiny_model

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank import Bank
from lorchestra.errors import AdapterError

IDS = torch.randint(4, 250, (3, 7), generator=torch.Generator().manual_seed(0))


def make_gemma():
    """Its embedding multiplies what it looks up by the root of the width."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).float().eval().requires_grad_(False)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("make", [make_tiny_model, lambda: make_tiny_model(tie_word_embeddings=False), make_gemma])
def test_what_plain_peft_answers(make, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(make(), config)
    noise = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=noise) * 0.2
    theirs.save_pretrained(tmp_path / "a")
    model = make()
    base = logits(model)
    bank = Bank(model)
    adapter = bank.load("a", tmp_path / "a")
    assert adapter.embeddings == {"model.embed_tokens"}
    with bank.using({"a": 1.0}):
        found = logits(model)
    expected = logits(theirs.eval())
    assert (expected - base).norm() > 0.05 * base.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), base)


def test_a_weight_for_every_row():
    model = make_tiny_model(tie_word_embeddings=False).double()
    noise = torch.Generator().manual_seed(2)
    path = "model.embed_tokens"
    members = {
        name: Adapter(
            {path: LowRank(torch.randn(32, 2, generator=noise) * 0.3, torch.randn(2, 260, generator=noise) * 0.3)},
            embeddings=frozenset({path}),
        )
        for name in "ab"
    }
    bank = Bank(model)
    for name, adapter in members.items():
        bank.load(name, adapter)
    rows = [{"a": 0.5, "b": -1.0}, {"a": 2.0}, {}]
    with bank.using_rows(rows):
        found = logits(model)
    weight = model.model.embed_tokens.weight.data.clone()
    for row, coefficients in enumerate(rows):
        moved = sum(
            (c * members[name].modules[path].dense(torch.float64).T for name, c in coefficients.items()), weight
        )
        model.model.embed_tokens.weight.data = moved
        torch.testing.assert_close(found[row], logits(model)[row], rtol=1e-5, atol=1e-6)
        model.model.embed_tokens.weight.data = weight.clone()


def test_what_is_no_embedding_of_that_shape():
    def adapter(path, shape, embeddings=()):
        return Adapter(
            {path: LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]))}, embeddings=frozenset(embeddings)
        )

    bank = Bank(make_tiny_model())
    for path, shape, flags in [
        ("model.embed_tokens", (32, 100), {"model.embed_tokens"}),  # another vocabulary
        ("model.embed_tokens", (32, 260), ()),
        ("model.layers.0.self_attn.q_proj", (32, 32), {"model.layers.0.self_attn.q_proj"}),
    ]:
        with pytest.raises(AdapterError, match=r"has an update of shape .* It belongs to another base"):
            bank.load("a", adapter(path, shape, flags))
    assert bank.names == ()
