"""Order of rows and rotary factors against transformers' own; what llama.cpp would leave out is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.export.conftest import FAMILIES, LLAMA3, SIZES
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorchestra.errors import UserError
from lorchestra.export.architectures import architecture_of, interleave, reorder, rope_factors, tensor_name


def config_of(name, **more):
    kind, settings = FAMILIES[name]
    return getattr(transformers, kind)(**(SIZES | settings | more))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_transformers_puts_the_rows_back(heads, half, n):
    rows = torch.randn(heads * half * 2, n)
    back = LlamaTensorProcessor()._reverse_permute_weights(interleave(rows, heads).numpy(), heads, heads)
    assert torch.equal(torch.from_numpy(back), rows)
    assert torch.equal(interleave(rows[:, 0], heads), interleave(rows, heads)[:, 0])


def test_which_rows_are_reordered():
    llama, qwen = config_of("llama"), config_of("qwen2")
    moved = {p: reorder(f"model.layers.0.self_attn.{p}", llama, architecture_of(llama)) for p in ("q_proj", "k_proj")}
    rows = torch.arange(32.0)[:, None]
    assert torch.equal(moved["q_proj"](rows), interleave(rows, 4))
    assert torch.equal(moved["k_proj"](rows), interleave(rows, 2))
    assert reorder("model.layers.0.self_attn.v_proj", llama, architecture_of(llama)) is None
    assert reorder("model.layers.0.self_attn.q_proj", qwen, architecture_of(qwen)) is None


@pytest.mark.parametrize(("theta", "trained"), [(10000.0, 64), (500000.0, 8192)])
def test_rotary_factors_give_transformers_frequencies(theta, trained):
    rope = LLAMA3 | {"rope_theta": theta, "original_max_position_embeddings": trained}
    config = config_of("llama, scaled", rope_parameters=rope, head_dim=64)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / theta ** (torch.arange(0, 64, 2) / 64)
    factors = rope_factors(config)
    torch.testing.assert_close(plain / factors, expected, rtol=1e-5, atol=0)
    assert len(set(factors.tolist())) > 3, "low, high and between"
    assert rope_factors(config_of("llama")) is None


def test_names():
    config = config_of("gemma3")
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.6.self_attn.q_norm.weight": "blk.6.attn_q_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.post_attention_norm.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for name, expected in names.items():
        assert tensor_name(name, config, architecture_of(config)) == expected
    with pytest.raises(UserError, match=r"'model.layers.0.vision.weight', which has no place"):
        tensor_name("model.layers.0.vision.weight", config, architecture_of(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.GPT2Config(), "type 'gpt2' cannot be written as GGUF here, only llama"),
        (config_of("qwen2", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
        (config_of("qwen2", rope_parameters=LLAMA3), "'llama3'"),
        (config_of("gemma3", layer_types=["full_attention"] * 7), "alternate its windows every 6"),
        (config_of("gemma2", query_pre_attn_scalar=16), "scales attention by 1/√16"),
        (config_of("llama", hidden_act="relu"), "activation 'relu'"),
    ],
)
def test_refusals_name_the_reason_and_the_way_out(config, message):
    with pytest.raises(UserError, match=message) as refused:
        architecture_of(config)
    assert "convert_hf_to_gguf.py" in str(refused.value)
