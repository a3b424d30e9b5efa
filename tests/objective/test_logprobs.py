"""Log-probabilities of packed branches against one plain forward pass for every branch alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import DataError
from lorchestra.objective import logprobs
from lorchestra.objective.batch import batches, length, pack
from lorchestra.objective.logprobs import branch_logprobs, tree_is_exact

TOKEN = st.integers(4, 259)


@st.composite
def items(draw):
    prompt = tuple(draw(st.lists(TOKEN, min_size=1, max_size=9)))
    branches = []
    for _ in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(TOKEN, min_size=1, max_size=7))
        flags = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        branches.append(Branch(tuple(ids), tuple(flags)))
    return Rendered(prompt, tuple(branches), 0)


def alone(model, item, branch):
    """Σ log p of the branch's supervised tokens, from full logits of one unpadded sequence, in float64."""
    ids = torch.tensor([item.prompt + branch.ids])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    start = len(item.prompt)
    return sum(
        float(logprobs[start + j - 1, token])
        for j, (token, counts) in enumerate(zip(branch.ids, branch.supervised, strict=True))
        if counts
    )


@settings(max_examples=25, deadline=None)
@given(batch=st.lists(items(), min_size=1, max_size=4), tree=st.booleans())
def test_packed_equals_alone(batch, tree):
    from tests.conftest import make_tiny_model

    model = make_tiny_model()
    packed = pack(batch, pad_id=3, tree=tree)
    scores = branch_logprobs(model, packed)
    expected = [alone(model, item, branch) for item in batch for branch in item.branches]
    torch.testing.assert_close(scores.sums.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    assert scores.tokens.tolist() == [sum(b.supervised) for item in batch for b in item.branches]
    assert scores.item.tolist() == [i for i, item in enumerate(batch) for _ in item.branches]


def test_an_answer_without_prompt_counts_from_its_second_token(tiny_model):
    item = Rendered((), (Branch((10, 11, 12), (True, True, True)),), 0)
    packed = pack([item], pad_id=3)
    assert packed.supervised == 2
    ids = torch.tensor([[10, 11, 12]])
    with torch.no_grad():
        logprobs = tiny_model(input_ids=ids).logits[0].log_softmax(-1)
    expected = logprobs[0, 11] + logprobs[1, 12]
    torch.testing.assert_close(branch_logprobs(tiny_model, packed).sums[0], expected)


def test_gradients_equal_those_of_the_full_logits(tiny_model):
    item = Rendered((5, 6, 7), (Branch((8, 9), (True, True)), Branch((10, 11, 12), (True, True, True))), 0)
    weight = tiny_model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    branch_logprobs(tiny_model, pack([item], pad_id=3)).sums.sum().backward()
    found, weight.grad = weight.grad, None
    for branch in item.branches:
        ids = torch.tensor([item.prompt + branch.ids])
        logprobs = tiny_model(input_ids=ids).logits[0].log_softmax(-1)
        sum(logprobs[2 + j, token] for j, token in enumerate(branch.ids)).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-5)


def test_soft_capped_logits_are_kept():
    """A model that changes its logits after the output embedding is scored with that change."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.0, attn_logit_softcapping=None,
        sliding_window=4, initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    item = Rendered((5, 6, 7, 8, 9, 10), (Branch((8, 9), (True, True)), Branch((10, 11), (True, True))), 0)
    assert not tree_is_exact(model), "a sliding window makes shared prompts inexact"
    scores = branch_logprobs(model, pack([item], pad_id=0, tree=tree_is_exact(model)))
    for found, branch in zip(scores.sums, item.branches, strict=True):
        assert float(found.detach()) == pytest.approx(alone(model, item, branch), abs=1e-4)


def test_tree_is_exact_on_llama(tiny_model):
    assert tree_is_exact(tiny_model)


@given(st.lists(items(), min_size=1, max_size=12), st.integers(5, 60), st.booleans())
def test_batches_cover_every_item_once_within_the_budget(all_items, budget, tree):
    groups = batches(all_items, budget, tree)
    assert sorted(i for group in groups for i in group) == list(range(len(all_items)))
    for group in groups:
        rows = len(group) if tree else sum(len(all_items[i].branches) for i in group)
        assert len(group) == 1 or rows * max(length(all_items[i], tree) for i in group) <= budget


def test_empty_input():
    with pytest.raises(DataError, match="needs items"):
        pack([], pad_id=0)
    with pytest.raises(DataError, match="at least one branch"):
        pack([Rendered((1,), (), 0)], pad_id=0)


@pytest.mark.parametrize("chunk", [1, 2 * 11, 1 << 22])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_logprobs_and_gradients_of_chunks_against_float64(chunk, dtype, tolerance, monkeypatch):
    """A token that is nearly certain included: its gradient is a small difference, not a rounded one."""
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    torch.manual_seed(0)
    logits = (3 * torch.randn(5, 11)).to(dtype)
    target = torch.tensor([0, 10, 3, 3, 7])
    logits[2, 3] = 12.0
    weight = torch.randn(5)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = logprobs._logprobs(ours, target)
    expected = exact.log_softmax(1)[torch.arange(5), target]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    (found * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(ours.grad, exact.grad.to(dtype), rtol=tolerance, atol=1e-6)


def test_a_batch_in_which_nothing_is_supervised():
    found = logprobs._logprobs(torch.randn(0, 11, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0,)
    found.sum().backward()
