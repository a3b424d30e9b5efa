"""Features: transformers' own states, whatever else is in the batch or on the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import make_tiny_model
from tests.gate.scenes import random_adapter

from lorchestra.bank import Bank
from lorchestra.errors import UserError
from lorchestra.gate import features as module
from lorchestra.gate.features import FeatureSpec, feature_size, features

PROMPTS = [[5, 6, 7], [9], [4, 200, 17, 33, 250, 12, 8]]


def expected(model, prompt, spec):
    """The mean of transformers' ``hidden_states[l]`` of the prompt alone."""
    with torch.no_grad():
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[spec.layers][0].float()
    mean = states.mean(dim=0)
    return torch.cat([mean, states[-1]]) if spec.last else mean


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_they_are_hidden_states_of_transformers(layers, last):
    model, spec = make_tiny_model(num_hidden_layers=3), FeatureSpec(layers, last)
    found = features(model, PROMPTS, spec)
    assert found.dtype == torch.float32
    assert found.shape == (3, feature_size(model, spec)) == (3, 64 if last else 32)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.stack([expected(model, p, spec) for p in PROMPTS]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_they_are_found_in_a_model_that_calls_its_layers_otherwise(layers):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    found = features(model, PROMPTS, FeatureSpec(layers))
    if layers:  # of 0 layers GPT-2's own has positions added; here it is the tokens' embeddings alone
        spec = FeatureSpec(layers)
        torch.testing.assert_close(found, torch.stack([expected(model, p, spec) for p in PROMPTS]))
    else:
        torch.testing.assert_close(found[0], model.transformer.wte.weight[PROMPTS[0]].mean(dim=0))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=20), min_size=1, max_size=6),
    layers=st.integers(0, 2),
    last=st.booleans(),
)
def test_they_do_not_depend_on_the_batch_or_its_padding(prompts, layers, last):
    model, spec = make_tiny_model(), FeatureSpec(layers, last)
    together = features(model, prompts, spec)
    alone = torch.cat([features(model, [prompt], spec) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(model, prompts[::-1], spec), together.flip(0), rtol=1e-4, atol=1e-5)


def test_many_prompts_are_read_a_few_at_a_time(monkeypatch):
    model, spec = make_tiny_model(), FeatureSpec(1)
    prompts = [[1 + i % 250] * (1 + i % 9) for i in range(40)]
    whole = features(model, prompts, spec)
    monkeypatch.setattr("lorchestra.gate.features.POSITIONS", 16)
    assert max(len(rows) for rows in module._batches(prompts)) <= 16
    torch.testing.assert_close(features(model, prompts, spec), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_no_adapter_acts_on_them(layers):
    """Bit for bit the same with a bank, under any selection of it; which is there again afterwards."""
    model, spec = make_tiny_model(), FeatureSpec(layers, last=True)
    bare = features(model, PROMPTS, spec)
    bank = Bank(model)
    bank.load("a", random_adapter(model, 1, scale=1.0))
    ids = torch.tensor([[5, 6, 7]])
    with bank.using({"a": 1.0}):
        before = model(ids).logits
        assert torch.equal(features(model, PROMPTS, spec), bare)
        assert torch.equal(model(ids).logits, before)
    with bank.using_rows([{"a": 2.0}]):  # for a batch of one, and features are of three
        assert torch.equal(features(model, PROMPTS, spec), bare)


def test_only_the_first_layers_are_computed():
    model = make_tiny_model(num_hidden_layers=4)
    seen = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
    model.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    features(model, PROMPTS, FeatureSpec(2))
    assert seen == [0, 1]
    features(model, PROMPTS, FeatureSpec(0))
    assert seen == [0, 1]
    features(model, PROMPTS, FeatureSpec(4))
    assert seen == [0, 1, 0, 1, 2, 3]
    hooks = [layer._forward_pre_hooks for layer in model.model.layers]
    assert not any(hooks)


def test_a_failure_inside_leaves_no_hook():
    model = make_tiny_model()

    def fail(*_):
        raise RuntimeError("broken layer")

    handle = model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        features(model, PROMPTS, FeatureSpec(1))
    handle.remove()
    assert not model.model.layers[1]._forward_pre_hooks


@pytest.mark.parametrize(
    ("prompts", "spec", "message"),
    [
        ([[5], []], FeatureSpec(), "prompt 2 of 2 is empty"),
        ([[5, 260]], FeatureSpec(), r"prompt 1 of 1 has a token id outside 0 … 259"),
        ([[-1]], FeatureSpec(1), "token id outside"),
        ([[5]], FeatureSpec(3), "features of 3 layers were asked for; LlamaForCausalLM has 2"),
    ],
)
def test_what_has_no_features_is_refused(tiny_model, prompts, spec, message):
    with pytest.raises(UserError, match=message):
        features(tiny_model, prompts, spec)


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(UserError, match="got -1"):
        FeatureSpec(-1)


def test_no_prompts_have_no_features(tiny_model):
    assert features(tiny_model, [], FeatureSpec(1)).shape == (0, 32)
