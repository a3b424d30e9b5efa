"""Every architecture against transformers' own forward pass, with an adapter in each row."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from tests.serve.embedded.worlds import merged

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank.kernel import Kernel
from lorchestra.bank.rows import RowBank
from lorchestra.base.load import Base
from lorchestra.base.native import compiler
from lorchestra.errors import AdapterError, UserError
from lorchestra.serve.embedded.attention import Attention
from lorchestra.serve.embedded.decoder import LlamaDecoder
from lorchestra.serve.embedded.generic import GenericDecoder
from lorchestra.serve.embedded.models import decoder_for
from lorchestra.serve.embedded.slots import Slots

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 1e4}  # fmt: skip
PLAIN = {
    "Llama": {},
    "Llama with llama3 rotations": {"rope_parameters": LLAMA3},
    "Llama with biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": None, "head_dim": 12},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
}
GENERIC = {
    "Mistral with a window": {"sliding_window": 5},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0},
    "GPTNeoX": {"num_key_value_heads": None},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Cohere": {"logit_scale": 0.25, "pad_token_id": 0},
    "Granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4},
}


def tiny(name: str, options) -> Base:
    kind = name.split(" ")[0]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for path, value in model.named_parameters():  # norms and biases that do something
        if value.dim() == 1:
            value.data += 0.2 * torch.randn(value.shape)
        assert path
    return Base(Path(), BaseId(), model, None, torch.device("cpu"), torch.float32)


def adapter_on(decoder, model, seed: int, rank: int) -> Adapter:
    """On every module that may be changed."""
    noise = torch.Generator().manual_seed(seed)
    modules = {}
    for group in decoder.groups:
        for path, m in zip(group.paths, group.outputs, strict=True):
            assert model.get_submodule(path) is not None
            B, A = torch.randn(m, rank, generator=noise), torch.randn(rank, group.inputs, generator=noise)
            modules[path] = LowRank(0.1 * B, A)
    return Adapter(modules)


def transposed(model, adapter: Adapter, c: float):
    """GPT-2 keeps its weights the other way round."""
    model = copy.deepcopy(model)
    for path, update in adapter.modules.items():
        model.get_submodule(path).weight.data += c * update.dense().T
    return model


@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, False) for name in (*PLAIN, *GENERIC)), *((name, True) for name in PLAIN)]
)
def test_each_row_answers_as_its_merged_model(name, kernel):
    if kernel and compiler() is None:
        pytest.skip("no C++ compiler is here")
    base = tiny(name, {**PLAIN, **GENERIC}[name])
    model = copy.deepcopy(base.model)
    decoder = decoder_for(base, 64, kernel)
    assert isinstance(decoder, LlamaDecoder if name in PLAIN else GenericDecoder)
    bank = RowBank(decoder.groups, kernel=Kernel() if kernel else None)
    slots = Slots(decoder.shape, 1 << 30, 64, torch.float32, "cpu", Attention() if kernel else None)
    adapters = [adapter_on(decoder, model, seed, rank) for seed, rank in ((0, 3), (1, 12))]
    rows = [bank.mixed("base", []), *(bank.factors("a", adapter) for adapter in adapters)]
    merge = transposed if name == "GPT2" else lambda model, adapter, c: merged(model, (adapter, c))
    models = [model, *(merge(model, adapter, 1.0) for adapter in adapters)]
    ids = torch.randint(0, 90, (3, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = [one(ids[i : i + 1]).logits[0] for i, one in enumerate(models)]
    lengths = (20, 7, 13)
    for row, length in enumerate(lengths):
        slots.take(row, length, 30)
    found = [[], [], []]
    # Prompts in two chunks, the second beginning at another place in each row.
    for starts, counts in (((0, 0, 0), (9, 3, 6)), ((9, 3, 6), (11, 4, 7))):
        L = max(counts)
        batch = torch.zeros(3, L, dtype=torch.int64)
        for i in range(3):
            batch[i, : counts[i]] = ids[i, starts[i] : starts[i] + counts[i]]
        step = slots.reading((0, 1, 2), starts, counts)
        logits = decoder.logits(decoder.hidden_states(batch, step, bank, bank.beside(rows)))
        step.keep()
        for i in range(3):
            found[i].append(logits[i, : counts[i]])
    for row in range(3):
        slots.begin(row)
        bank.put(row, rows[row])
    order = slots.order()
    for more in range(10):
        batch = torch.stack([ids[row, lengths[row] + more] for row in order])[:, None]
        logits = decoder.logits(decoder.hidden_states(batch, slots.decoding(), bank, bank.acting(order)))
        for i, row in enumerate(order):
            found[row].append(logits[i])
    for row, length in enumerate(lengths):
        torch.testing.assert_close(torch.cat(found[row]), expected[row][: length + 10], rtol=1e-3, atol=1e-3)


def test_other_formulas_are_found_before_anything_is_served(monkeypatch):
    base = tiny("Qwen3", {"head_dim": 16})
    whole = LlamaDecoder.__init__

    def forgetful(self, model, max_length, kernel):
        whole(self, model, max_length, kernel)
        self.norm = 2 * self.norm[torch.randperm(len(self.norm))]

    monkeypatch.setattr(LlamaDecoder, "__init__", forgetful)
    with pytest.raises(UserError, match="other logits"):
        decoder_for(base, 64)


@pytest.mark.parametrize("name", ["Gemma2", "Bloom", "Mamba"])
def test_what_cannot_be_served_is_said_with_a_way_on(name):
    options = {"Gemma2": {"head_dim": 16}, "Bloom": {"n_layer": 2, "n_head": 4}, "Mamba": {"state_size": 4}}[name]
    with pytest.raises(UserError, match="use --engine vllm"):
        decoder_for(tiny(name, options), 64)


def test_experts_see_other_rows_than_the_batchs_and_are_not_changed():
    base = tiny("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None})
    decoder = decoder_for(base, 64)
    paths = {path for group in decoder.groups for path in group.paths}
    assert paths
    assert not any("experts" in path or "gate" in path for path in paths)
    bank = RowBank(decoder.groups)
    foreign = Adapter({"model.layers.0.mlp.gate": LowRank(torch.ones(2, 1), torch.ones(1, 32))})
    with pytest.raises(AdapterError, match="not as a linear module"):
        bank.factors("a", foreign)
