"""Attention by whole matrices: against float64, against what transformers does elsewhere, and put back afterwards."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import make_tiny_model

from lorchestra.data.render import Branch, Rendered
from lorchestra.objective import attention
from lorchestra.objective.attention import NAME, attend, quick_attention
from lorchestra.objective.batch import pack
from lorchestra.objective.logprobs import branch_logprobs


def dense(q, k, v, mask, scale):
    """Attention as it is written, in float64: heads repeated, weights in one piece."""
    q, k, v = q.double(), k.double(), v.double()
    g = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(g, 1).transpose(-1, -2)
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v.repeat_interleave(g, 1)


def masks(kind, b, L):
    """A mask for each row of the batch in which every position sees itself."""
    if kind == "causal":
        return None
    seen = (torch.rand(b, 1, L, L) < 0.5).tril() | torch.eye(L, dtype=torch.bool)
    if kind == "one for all rows":
        seen = seen[:1]
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min) if kind == "added" else seen


@pytest.mark.parametrize("kind", ["causal", "one for all rows", "a row each", "added"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("cached", [1, 1 << 20])
@pytest.mark.parametrize("kept", [0, 7])
def test_values_and_gradients_against_float64(kind, dtype, tolerance, cached, kept, monkeypatch):
    monkeypatch.setattr(attention, "CACHED", cached)  # a row at a time, and all at once
    monkeypatch.setattr(attention, "KEPT", kept)  # weights computed anew, and kept
    torch.manual_seed(0)
    b, h, g, L, d = 3, 2, 3, 7, 8
    q, k, v = (torch.randn(b, heads, L, d).to(dtype).requires_grad_() for heads in (h * g, h, h))
    mask, gradient = masks(kind, b, L), torch.randn(b, h * g, L, d).to(dtype)
    ours = attend(q, k, v, mask if mask is None or mask.dtype == torch.bool else mask.to(dtype), 0.3)
    oracle = dense(q, k, v, mask, 0.3)
    assert ours.dtype == dtype
    found = (ours, *torch.autograd.grad(ours, (q, k, v), gradient))
    expected = (oracle, *torch.autograd.grad(oracle, (q, k, v), gradient.double()))
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_inputs_as_transformers_lays_them_out():
    """Heads behind positions in memory, and a gradient that comes back so."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 5, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    gradient = torch.randn(2, 5, 4, 8).transpose(1, 2)
    found = torch.autograd.grad(attend(q, k, v, None, 0.5), (q, k, v), gradient)
    expected = torch.autograd.grad(dense(q, k, v, None, 0.5), (q, k, v), gradient.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-6)


ITEM = Rendered(tuple(range(10, 20)), (Branch((5, 6, 7), (True,) * 3), Branch((8, 9), (True,) * 2)), 0)


def implementations(model):
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_model_computes_the_same(kind, tree):
    model = {"llama": make_tiny_model, "qwen3": make_qwen3, "gpt2": make_gpt2}[kind]()
    batch = pack([ITEM, ITEM], 0, tree=tree)
    exact = branch_logprobs(model, batch).sums
    half = model.to(torch.bfloat16)
    before = branch_logprobs(half, batch).sums
    with quick_attention(half):
        assert NAME in implementations(half)
        ours = branch_logprobs(half, batch).sums
    assert implementations(half) == {"sdpa"}
    torch.testing.assert_close(branch_logprobs(half, batch).sums, before, rtol=0, atol=0)
    # No further from float32 than what it stands in for, up to the luck of a rounding.
    assert (ours - exact).norm() <= 2 * (before - exact).norm() + 1e-2 * exact.norm()


def test_in_float32_it_is_sdpa_bit_for_bit():
    model, batch = make_tiny_model(), pack([ITEM, ITEM], 0)
    before = branch_logprobs(model, batch).sums
    with quick_attention(model):
        assert NAME in implementations(model)
        assert torch.equal(branch_logprobs(model, batch).sums, before)


def test_a_model_that_attends_otherwise_is_left_alone():
    model = make_tiny_model(attn_implementation="eager").to(torch.bfloat16)
    with quick_attention(model):
        assert implementations(model) == {"eager"}


def test_it_is_put_back_after_an_error():
    model = make_tiny_model().to(torch.bfloat16)
    with pytest.raises(ZeroDivisionError), quick_attention(model):
        1 / 0  # noqa: B018
    assert implementations(model) == {"sdpa"}


def test_what_it_does_not_do_is_done_as_before():
    """A decoding step, one position that sees many, goes to ``sdpa``; logits are those of the whole at once."""
    model = make_tiny_model().to(torch.bfloat16)
    ids = torch.arange(10, 22)[None]
    with quick_attention(model), torch.no_grad():
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=0.05, atol=0.05)


def make_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.15,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def make_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.15)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)
