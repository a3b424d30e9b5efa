"""Prompts of many positions, each changed by its own adapters, by whatever this machine has for them."""

from __future__ import annotations

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank.factors import Group
from lorchestra.bank.kernel import Kernel
from lorchestra.bank.rows import RowBank
from lorchestra.base.native import compiler

GROUPS = (Group(("q", "k"), 96, (160, 32)), Group(("o",), 32, (64,)))
SHAPES = {"q": (160, 96), "k": (32, 96), "o": (64, 32)}


@pytest.fixture(scope="module")
def kernel():
    if compiler() is None:
        pytest.skip("no C++ compiler is here")
    return Kernel()


def adapter(rank, seed):
    noise = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=noise).bfloat16().float()

    return Adapter({path: LowRank(drawn(m, rank), drawn(rank, n)) for path, (m, n) in SHAPES.items()})


def added(bank, acting, x_of, dtype):
    """Outputs of all modules, those of a group side by side, added to what was there."""
    found = {}
    for g, group in enumerate(GROUPS):
        x = x_of[group.inputs]
        whole = torch.ones(*x.shape[:2], sum(group.outputs), dtype=dtype)
        ys = torch.split(whole, list(group.outputs), dim=-1)
        bank.add(acting, g, x, ys)
        found.update(zip(group.paths, ys, strict=True))
    return found


def inputs(count, length, dtype=torch.bfloat16):
    noise = torch.Generator().manual_seed(length)
    return {n: torch.randn(count, length, n, generator=noise).to(torch.bfloat16).to(dtype) for n in (96, 32)}


def check(found, members, x_of, row, tolerance=2**-7):
    for path, (_, n) in SHAPES.items():
        x = x_of[n][row].double()
        right = 1 + sum((x @ held.modules[path].dense().double().T for held in members), torch.zeros(()).double())
        gap = (found[path][row].double() - right).abs().max()
        assert gap <= tolerance * (1 + right.abs().max()), (path, row)


@pytest.mark.parametrize("ranks", [(8, 8, 8), (5, 16, 20), (33, 64, 8)])
@pytest.mark.parametrize("length", [1, 8, 16, 17, 48, 65, 530])
def test_every_prompt_is_changed_by_its_own_adapter(kernel, ranks, length):
    bank = RowBank(GROUPS, dtype=torch.bfloat16, kernel=kernel)
    held = [adapter(rank, seed) for seed, rank in enumerate(ranks)]
    base = bank.mixed("base", [])
    factors = [bank.factors(str(i), one) for i, one in enumerate(held)]
    order = [factors[2], base, factors[0], factors[1], factors[0]]
    x = inputs(len(order), length)
    acting = bank.beside(order)
    assert bool(acting.loose) == kernel.tiles  # where there are tiles, nothing is copied
    found = added(bank, acting, x, torch.bfloat16)
    for row, members in enumerate(([held[2]], [], [held[0]], [held[1]], [held[0]])):
        check(found, members, x, row)
    for path in SHAPES:
        assert (found[path][1] == 1).all()  # the base is the base, to the last bit


def test_inputs_of_another_dtype_than_the_factors(kernel):
    bank = RowBank(GROUPS, dtype=torch.bfloat16, kernel=kernel)
    held = [adapter(8, 1), adapter(16, 2)]
    x = inputs(2, 24, torch.float32)
    acting = bank.beside([bank.factors(str(i), one) for i, one in enumerate(held)])
    found = added(bank, acting, x, torch.float32)
    for row, one in enumerate(held):
        check(found, [one], x, row)


def test_positions_that_lie_apart_and_what_is_no_number(kernel):
    bank = RowBank(GROUPS, dtype=torch.bfloat16, kernel=kernel)
    held = [adapter(8, 1), adapter(8, 2), adapter(8, 3)]
    wide = inputs(3, 40)
    x = {n: value[:, ::2] for n, value in wide.items()}
    for value in x.values():
        value[1, 3] = torch.nan
    acting = bank.beside([bank.factors(str(i), one) for i, one in enumerate(held)])
    assert acting
    found = added(bank, acting, x, torch.bfloat16)
    for row in (0, 2):
        check(found, [held[row]], x, row)
    for path in SHAPES:
        assert found[path][1, 3].isnan().all()
        assert found[path][1, :3].isfinite().all()
        assert found[path][1, 4:].isfinite().all()


def test_nobody_is_changed_where_all_are_the_base(kernel):
    bank = RowBank(GROUPS, dtype=torch.bfloat16, kernel=kernel)
    assert not bank.beside([bank.mixed("base", [])] * 3)
