"""A linear module multiplies few rows by tiles where the machine has them, and is right whatever it has."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.serve.embedded.test_models import adapter_on, tiny
from tests.serve.embedded.test_single import LENGTH, answers
from tests.serve.embedded.worlds import merged
from torch import nn

from lorchestra.bank.kernel import Kernel
from lorchestra.bank.rows import RowBank
from lorchestra.base.native import compiler
from lorchestra.serve.embedded.decoder import LlamaDecoder
from lorchestra.serve.embedded.linear import Linear
from lorchestra.serve.embedded.tiles import ROWS, Tiles


def usable() -> bool:
    """Whether this machine has tiles."""
    return Tiles.take(torch.zeros(32, 32, dtype=torch.bfloat16))


@pytest.fixture(autouse=True)
def _compiler():
    if compiler() is None:
        pytest.skip("no C++ compiler is here")


def modules(n, sizes, dtype=torch.bfloat16, bias=False):
    noise = torch.Generator().manual_seed(n)
    found = []
    for m in sizes:
        module = nn.Linear(n, m, bias=bias)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=noise))
        found.append(module.to(dtype).requires_grad_(False))
    return found


def expected(held, x):
    return torch.cat([nn.functional.linear(x.double(), m.weight.double(), _double(m.bias)) for m in held], dim=-1)


def _double(bias):
    return None if bias is None else bias.double()


# Widths of one panel, of several, and of a panel and a piece; one pair of tiles; sides that are no multiple of a tile.
SHAPES = [(576, (576, 192, 192)), (64, (32,)), (32, (96, 32)), (1536, (576,)), (33, (64,)), (64, (40,))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "sizes"), SHAPES)
def test_few_rows_and_many_are_the_module_s_own_outputs(n, sizes, bias):
    held = modules(n, sizes, bias=bias)
    product = Linear.of(*held, tiles=True)
    for rows in (1, 15, 16, 17, 32, 33, 57, ROWS, ROWS + 1):
        x = torch.randn(rows, 1, n, generator=torch.Generator().manual_seed(rows)).bfloat16()
        y, right = product(x), expected(held, x)
        assert y.shape == right.shape
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), right, rtol=2**-8, atol=2**-8)  # rounded once
    whole = not n % 32 and not sum(sizes) % 32
    assert (product._tiles is not None) == (whole and usable())


def test_rows_do_not_see_what_others_left():
    held = modules(64, (64,))
    product = Linear.of(*held, tiles=True)
    product(torch.full((ROWS - 1, 1, 64), torch.nan).bfloat16())
    x = torch.ones(3, 1, 64).bfloat16()
    torch.testing.assert_close(product(x).double(), expected(held, x), rtol=2**-8, atol=2**-8)
    x[1] = torch.nan
    y = product(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_rows_that_lie_apart_and_those_of_two_sequences():
    held = modules(64, (96,))
    product = Linear.of(*held, tiles=True)
    x = torch.randn(4, 10, 128, generator=torch.Generator().manual_seed(0)).bfloat16()[..., ::2]
    torch.testing.assert_close(product(x).double(), expected(held, x), rtol=2**-8, atol=2**-8)


def test_only_bfloat16_of_whole_tiles_is_taken():
    assert not Tiles.take(torch.zeros(64, 64))
    assert not Tiles.take(torch.zeros(48, 64, dtype=torch.bfloat16))
    assert not Tiles.take(torch.zeros(64, 48, dtype=torch.bfloat16))
    x = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    held = modules(64, (64,), dtype=torch.float32)
    torch.testing.assert_close(Linear.of(*held, tiles=True)(x).double(), expected(held, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_prompts_and_steps_of_a_whole_model_are_as_near_to_the_merged_one_as_without_kernels(name):
    """Rows of other adapters and ranks beside it, that leave one by one."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sides = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}
    model = tiny(name, {**heads, **sides}).model
    ids = torch.randint(0, 90, (LENGTH,), generator=torch.Generator().manual_seed(4))
    plain = LlamaDecoder(copy.deepcopy(model), 64)
    adapters = [adapter_on(plain, model, seed, rank) for seed, rank in ((0, 12), (1, 4))]
    with torch.inference_mode():
        exact = merged(model, (adapters[0], 1.0))(ids[None]).logits[0]
    errors = []
    for kernel in (None, Kernel()):
        decoder = LlamaDecoder(copy.deepcopy(model).to(torch.bfloat16), 64, kernel=kernel is not None)
        bank = RowBank(decoder.groups, dtype=torch.bfloat16, kernel=kernel)
        first, other = (bank.factors("a", adapter) for adapter in adapters)
        if kernel is not None:
            assert bool(bank.beside([first]).loose) == kernel.tiles == (decoder.layers[0].up._tiles is not None)
        found = answers(decoder, bank, ids, first, [other, bank.mixed("base", [])]).float()
        errors.append((found - exact).norm() / exact.norm())
    assert errors[0] < 0.1
    assert errors[1] < 1.5 * errors[0] + 1e-3
