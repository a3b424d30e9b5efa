"""Tiny models of every family that is written as GGUF, with tokenizers that llama.cpp knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, untied": ("LlamaConfig", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama, wide heads": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama, scaled": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": 128, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 128}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 4, "sliding_window": 32},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "sliding_window": 16},
    ),
}


def byte_tokenizer():
    """Byte-level BPE with a few merges, splitting as GPT-2 does; ids 0 to 3 are special."""
    from tests.conftest import CHAT_TEMPLATE, make_tiny_tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = make_tiny_tokenizer()
    value = json.loads(plain.backend_tokenizer.to_str())
    vocab = value["model"]["vocab"]
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("e", "r"), ("f", "e"), ("fe", "v"), ("fev", "er")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    value["model"]["merges"] = [list(pair) for pair in merges]
    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(value)), **plain.special_tokens_map)
    found.chat_template = CHAT_TEMPLATE
    return found


def make_family(name: str, seed: int = 0):
    """The model of :data:`FAMILIES`, with norms and biases that are not at their initial values."""
    import transformers

    kind, more = FAMILIES[name]
    config = getattr(transformers, kind)(**(SIZES | more))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """``family(name)`` → the directory of that tiny model, with its tokenizer."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("family")
            make_family(name).save_pretrained(made[name])
            byte_tokenizer().save_pretrained(made[name])
        return made[name]

    return of
