"""A batch as one row: its layout, position by position, and the log-probabilities and gradients of branches alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import make_tiny_model
from tests.objective.test_attention import make_gpt2, make_qwen3
from tests.objective.test_logprobs import TOKEN, alone, items
from torch.nn.utils import parameters_to_vector

from lorchestra.data.render import Branch, Rendered
from lorchestra.objective.attention import quick_attention
from lorchestra.objective.batch import pack
from lorchestra.objective.flat import Flat, rounded
from lorchestra.objective.logprobs import branch_logprobs, flat_is_exact

PAD = 3


def sft(prompt, answer):
    return Rendered(tuple(prompt), (Branch(tuple(answer), (True,) * len(answer)),), 0)


SHORT, LONG = sft([5, 6, 7, 8], [9]), sft([5, 6, 10], [11, 12, 13])


@st.composite
def shared(draw):
    """Items whose prompts begin alike."""
    prefix = tuple(draw(st.lists(TOKEN, max_size=6)))
    found = draw(st.lists(items(), min_size=1, max_size=4))
    return [Rendered(prefix + item.prompt, item.branches, 0) for item in found]


def test_the_prefix_once_then_each_row_without_padding():
    flat = pack([SHORT, LONG], PAD, flat=True).flat
    assert flat.prefix == 2
    assert flat.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert flat.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert flat.place.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 5, 6, 7, 8]]
    assert flat.rest.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(flat.mask, torch.ones(6, 6).tril().bool()[None, None, 2:])


@given(batch=shared(), tree=st.booleans())
def test_every_position_is_where_it_says(batch, tree):
    packed = pack(batch, PAD, tree=tree, flat=True)
    flat = packed.flat
    rows = [
        len(i.prompt) + sum(len(b.ids) for b in g) for i in batch for g in ([i.branches] if tree else zip(i.branches))
    ]
    width = packed.input_ids.shape[1]
    if flat is None:
        assert len(batch) == len(rows) == 1 or all(n == width for n in rows)
        return
    there = torch.arange(width) < torch.tensor(rows)[:, None]
    assert flat.place.shape[1] == flat.prefix + rounded(width - flat.prefix)
    assert not flat.place[:, width:].any()
    assert torch.equal(flat.input_ids[0][flat.place[:, :width]][there], packed.input_ids[there])
    positions = (
        packed.position_ids if tree and packed.position_ids is not None else torch.arange(width).expand(len(rows), -1)
    )
    assert torch.equal(flat.position_ids[0][flat.place[:, :width]][there], positions[there])
    tokens = sum(rows) - (len(rows) - 1) * flat.prefix
    assert flat.prefix + flat.rest.numel() == tokens
    assert flat.input_ids.shape[1] == rounded(tokens, 16) < len(rows) * width


def test_a_batch_that_would_not_be_shorter_stays_as_it_is():
    assert pack([SHORT], PAD, flat=True).flat is None
    assert pack([SHORT, LONG], PAD).flat is None


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tree", [True, False])
def test_log_probabilities_are_those_of_each_branch_alone(kind, tree):
    model = {"llama": make_tiny_model, "qwen3": make_qwen3, "gpt2": make_gpt2}[kind]()

    @settings(max_examples=12, deadline=None)
    @given(batch=shared())
    def holds(batch):
        found = branch_logprobs(model, pack(batch, PAD, tree=tree, flat=True)).sums.detach()
        expected = [alone(model, item, branch) for item in batch for branch in item.branches]
        torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)

    with quick_attention(model):
        assert flat_is_exact(model)
        holds()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_rows(checkpointing):
    model = make_tiny_model().requires_grad_(True)
    batch = [SHORT, LONG, sft([5, 6, 7], [8, 8])]
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    found = []
    with quick_attention(model):
        for flat in (True, False):
            packed = pack(batch, PAD, flat=flat)
            assert (packed.flat is not None) == flat
            model.zero_grad()
            (branch_logprobs(model, packed).sums * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
            found.append(parameters_to_vector(p.grad for p in model.parameters()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@given(st.integers(1, 1 << 20), st.sampled_from([8, 16]))
def test_few_sizes_and_little_more_than_was_asked_for(count, steps):
    found = rounded(count, steps)
    assert count <= found < count * (1 + 1 / steps) + 1
    assert rounded(found, steps) == found
    assert len({rounded(n, steps) for n in range(1025, 2049)}) == steps


def long_ones():
    """Four items of 20 to 60 tokens that begin alike, so that every size is rounded up."""
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, 60, (n,), generator=draw).tolist() for n in (17, 29, 38, 46)]
    answers = [torch.randint(4, 60, (n,), generator=draw).tolist() for n in (3, 8, 5, 9)]
    return [sft([5, 6, 7, *prompt], answer) for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("tree", [True, False])
def test_padding_changes_neither_log_probabilities_nor_gradients(tree):
    model, batch = make_tiny_model().requires_grad_(True), long_ones()
    if tree:
        branch = Branch((9, 8, 7), (True,) * 3)
        batch = [Rendered(item.prompt, (*item.branches, branch), 0) for item in batch]
    found = []
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with quick_attention(model):
        for flat in (True, False):
            packed = pack(batch, PAD, tree=tree, flat=flat)
            model.zero_grad()
            scores = branch_logprobs(model, packed).sums
            (scores * torch.linspace(-1, 2, len(scores))).sum().backward()
            found.append((scores.detach(), parameters_to_vector(p.grad for p in model.parameters())))
    padded = pack(batch, PAD, tree=tree, flat=True)
    assert padded.flat is not None
    assert padded.flat.input_ids.shape[1] > padded.flat.prefix + padded.flat.rest.numel()
    assert padded.flat.place.shape[1] > padded.input_ids.shape[1]
    assert seen[0] > padded.supervised == seen[1]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision_is_as_near_as_rows_are():
    model, batch = make_tiny_model(), [SHORT, LONG]
    exact = branch_logprobs(model, pack(batch, PAD)).sums
    half = model.to(torch.bfloat16)
    with quick_attention(half):
        rows, flat = (branch_logprobs(half, pack(batch, PAD, flat=value)).sums for value in (False, True))
    assert (flat - exact).norm() <= 2 * (rows - exact).norm() + 1e-2 * exact.norm()


@pytest.mark.parametrize("first", [0, 2])
def test_gradients_of_spreading_and_collecting(first):
    """By finite differences in float64; what stands at padding counts for nothing."""
    flat = pack([SHORT, LONG], PAD, flat=True).flat
    there = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6], dtype=torch.bool)[:, None, first:, None]
    x = torch.randn(1, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: flat.spread(x, first) * there, x)
    rest = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flat.collect, rest)


def test_collecting_what_was_spread():
    flat = pack([SHORT, LONG], PAD, flat=True).flat
    x = torch.randn(1, 3, 9, 4)
    assert torch.equal(flat.collect(flat.spread(x, flat.prefix)), x.transpose(1, 2)[:, flat.prefix :])


def test_the_last_mlp_sees_what_is_read_alone():
    model = make_tiny_model()
    seen = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    with quick_attention(model):
        branch_logprobs(model, pack([SHORT, LONG], PAD, flat=True))
    assert seen[0] == 9
    assert seen[-1] == 4
    seen.clear()
    branch_logprobs(model, pack([LONG], PAD))
    assert seen[-1] == 6, "the hooks are gone"


def test_it_is_refused_where_it_would_be_inexact():
    model = make_tiny_model()
    assert not flat_is_exact(model), "torch's own attention cannot read it"
    with quick_attention(model):
        assert flat_is_exact(model)


def test_a_model_that_does_not_hand_on_what_it_is_given():
    model = make_tiny_model()
    forward = model.forward
    model.forward = lambda flat=None, **kwargs: forward(**kwargs)
    with quick_attention(model):
        assert not flat_is_exact(model)


def test_a_sliding_window():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=4,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with quick_attention(model):
        assert not flat_is_exact(model)


def test_rows_that_end_with_the_prefix():
    """A prompt that is all prefix; its last position predicts first answer tokens of two rows."""
    model, batch = make_tiny_model(), [sft([5, 6], [7, 8]), sft([5, 6], [9])]
    packed = pack(batch, PAD, flat=True)
    assert isinstance(packed.flat, Flat)
    assert packed.flat.prefix == 2
    with quick_attention(model):
        found = branch_logprobs(model, packed).sums.detach().double()
    expected = torch.tensor([alone(model, item, item.branches[0]) for item in batch], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
