"""What adapters would do on given text: against dense float64 algebra on the recorded inputs of every module."""

from __future__ import annotations

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import AdapterError
from lorchestra.evaluate.activation import activation_norms

ENDS = ("q_proj", "down_proj", "lm_head")


def make(model, seed, rank, ends=ENDS):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            path: LowRank(
                torch.randn(module.weight.shape[0], rank, generator=generator),
                torch.randn(rank, module.weight.shape[1], generator=generator),
            )
            for path, module in model.named_modules()
            if path.endswith(ends)
        }
    )


ITEMS = (
    Rendered((1, 40, 41, 42), (Branch((50, 51, 2), (True, True, True)),)),
    Rendered((1, 60), (Branch((70, 71, 72, 73, 74, 2), (True, True, False, False, True, True)),)),
    Rendered((1, 9, 8, 7, 6, 5, 4), (Branch((33, 2), (True, True)),)),
)


def recorded(module):
    """A hook on ``module`` and the list that its inputs go to."""
    inputs = []
    return module.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0])), inputs


@torch.no_grad()
def inputs_of(model, paths):
    """Module path → its inputs at the positions that predict supervised tokens, ``[tokens, n]`` float64."""
    double = model.double()
    found = {path: [] for path in paths}
    for item in ITEMS:
        (branch,) = item.branches
        seen = {path: recorded(double.get_submodule(path)) for path in paths}
        double(input_ids=torch.tensor([[*item.prompt, *branch.ids]]))
        for handle, _ in seen.values():
            handle.remove()
        for j, counts in enumerate(branch.supervised):
            if counts:
                for path in paths:
                    found[path].append(seen[path][1][0][len(item.prompt) + j - 1])
    return {path: torch.stack(rows) for path, rows in found.items()}


def test_against_dense_algebra(tiny_model):
    adapters = {"a": make(tiny_model, 0, 2), "b": make(tiny_model, 1, 3, ("q_proj",))}
    done = []
    found, tokens = activation_norms(tiny_model, adapters, ITEMS, 3, done.append)
    assert tokens == 9
    assert sum(done) == len(ITEMS)
    expected = inputs_of(tiny_model, list(adapters["a"].modules))
    assert set(found) == set(expected)
    for path, x in expected.items():
        assert set(found[path]) == {name for name, adapter in adapters.items() if path in adapter.modules}
        for name, norm in found[path].items():
            effects = x @ adapters[name].modules[path].dense(torch.float64).T
            assert norm == pytest.approx(float(effects.square().sum(1).mean().sqrt()), rel=1e-4)


def test_an_embedding_is_handed_tokens(tiny_model):
    path = "model.embed_tokens"
    tokens, width = tiny_model.get_submodule(path).weight.shape
    update = LowRank(torch.randn(width, 2), torch.randn(2, tokens))
    adapter = Adapter({path: update}, embeddings=frozenset({path}))
    found, _ = activation_norms(tiny_model, {"a": adapter}, ITEMS, 3)
    ids = [
        [*item.prompt, *branch.ids][len(item.prompt) + j - 1]
        for item in ITEMS
        for branch in item.branches
        for j, counts in enumerate(branch.supervised)
        if counts
    ]
    expected = update.dense(torch.float64)[:, ids].square().sum(0).mean().sqrt()
    assert found[path]["a"] == pytest.approx(float(expected), rel=1e-5)


def test_the_model_is_left_as_it_was(tiny_model):
    ids = torch.tensor([[1, 5, 6]])
    before = tiny_model(input_ids=ids).logits
    activation_norms(tiny_model, {"a": make(tiny_model, 0, 2)}, ITEMS, 3)
    assert all(not module._forward_pre_hooks for module in tiny_model.modules())
    assert torch.equal(tiny_model(input_ids=ids).logits, before)


def test_adapters_of_another_model(tiny_model):
    missing = Adapter({"model.layers.9.q_proj": LowRank(torch.ones(3, 1), torch.ones(1, 3))})
    with pytest.raises(
        AdapterError, match=r"'x' changes 'model.layers.9.q_proj', which LlamaForCausalLM does not have"
    ):
        activation_norms(tiny_model, {"x": missing}, ITEMS, 3)
    shape = Adapter({"model.layers.0.self_attn.q_proj": LowRank(torch.ones(3, 1), torch.ones(1, 3))})
    with pytest.raises(AdapterError, match=r"'x' has an update of shape \(3, 3\)"):
        activation_norms(tiny_model, {"x": shape}, ITEMS, 3)
    assert all(not module._forward_pre_hooks for module in tiny_model.modules())
