"""RMSNorm in fewer passes: against float64, as transformers rounds it, and only where it is the same function."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import make_tiny_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorchestra.objective.norm import quick_norms, rms_norm


def llama_norm(n, dtype=torch.bfloat16):
    module = LlamaRMSNorm(n, eps=1e-5).to(dtype)
    module.weight.data.uniform_(-2, 2)
    return module.requires_grad_(False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_values_and_gradients_against_float64(dtype, tolerance, size):
    """Small rows too, in which ε counts."""
    torch.manual_seed(0)
    x = (size * torch.randn(2, 5, 24)).to(dtype).requires_grad_()
    w, gradient = torch.randn(24).to(dtype), torch.randn(2, 5, 24).to(dtype)
    found = rms_norm(x, w, 1e-5)
    exact = x.detach().double().requires_grad_()
    expected = w.double() * exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert found.dtype == dtype
    found.backward(gradient)
    expected.backward(gradient.double())
    for one, other in ((found, expected), (x.grad, exact.grad)):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_it_rounds_as_transformers_does():
    torch.manual_seed(0)
    module, x = llama_norm(64), torch.randn(50, 64).bfloat16()
    before = module(x)
    with quick_norms(module):
        differ = module(x) != before
    assert differ.double().mean() < 0.01, "float32 sums in another order, seldom across a rounding"


class Twice(nn.Module):
    """Two norms, so that one may be refused and the other not."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second


def test_norms_of_another_form_or_that_train_or_in_float32_are_left_alone():
    gemma = GemmaRMSNorm(16).bfloat16().requires_grad_(False)
    gemma.weight.data.uniform_(-0.5, 0.5)
    trained = llama_norm(16).requires_grad_(True)
    for other in (gemma, trained, llama_norm(16, torch.float32), nn.LayerNorm(16).bfloat16().requires_grad_(False)):
        model = Twice(llama_norm(16), other)
        with quick_norms(model):
            assert "forward" in vars(model.first)
            assert "forward" not in vars(model.second)
        assert "forward" not in vars(model.first)


def test_a_model_computes_the_same_and_is_as_before_afterwards():
    ids = torch.arange(10, 22)[None]
    exact = make_tiny_model()(ids).logits
    model = make_tiny_model().bfloat16()
    before = model(ids).logits
    with quick_norms(model):
        ours = model(ids).logits
    assert (ours - exact).norm() <= 1.5 * (before - exact).norm() + 1e-3 * exact.norm()
    assert torch.equal(model(ids).logits, before)


def test_it_is_put_back_after_an_error():
    module = llama_norm(16)
    with pytest.raises(ZeroDivisionError), quick_norms(module):
        1 / 0  # noqa: B018
    assert "forward" not in vars(module)
