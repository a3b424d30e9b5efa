"""Rows of a batch with factors of their own, against the float64 sum of each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank.factors import Group
from lorchestra.bank.kernel import Kernel
from lorchestra.bank.rows import RowBank
from lorchestra.base.native import compiler, library
from lorchestra.errors import AdapterError, UserError

# Sizes above, and no multiple of, what a kernel computes at once (lanes.h: PAIR).
GROUPS = (Group(("l.q", "l.k"), 45, (134, 6)), Group(("l.o",), 45, (64,)))
SHAPES = {"l.q": (134, 45), "l.k": (6, 45), "l.o": (64, 45)}


def adapter(seed: int, rank: int, paths=("l.q", "l.k", "l.o")) -> Adapter:
    noise = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=noise)

    return Adapter({p: LowRank(drawn(SHAPES[p][0], rank), drawn(rank, SHAPES[p][1])) for p in paths})


def expected(x, members, path):
    y = torch.zeros(*x.shape[:2], SHAPES[path][0], dtype=torch.float64)
    for member, c in members:
        if path in member.modules:
            y += c * (x.double() @ member.modules[path].dense().double().T)
    return y


def outputs_of(bank, acting, x):
    found = {}
    for g, group in enumerate(GROUPS):
        ys = torch.split(torch.zeros(*x.shape[:2], sum(group.outputs), dtype=x.dtype), list(group.outputs), dim=-1)
        bank.add(acting, g, x, ys)
        found.update(zip(group.paths, ys, strict=True))
    return found


MEMBER = st.tuples(st.integers(0, 9), st.integers(1, 20), st.sampled_from([-0.5, 0.0, 0.3, 1.0]))
STEP = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 4), st.lists(MEMBER, max_size=3)),
    st.tuples(st.just("clear"), st.integers(0, 4), st.none()),
)


def kernel() -> Kernel:
    if compiler() is None:
        pytest.skip("no C++ compiler is here")
    return Kernel()


# (dtype of factors and x, tolerance): float64 by torch, the others by the kernel where rows have one position.
BY = {"torch": (torch.float64, 1e-5), "float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 3e-2)}


@pytest.mark.parametrize("by", BY)
@settings(deadline=None, max_examples=40)
@given(st.lists(STEP, min_size=1, max_size=12), st.permutations(range(5)), st.integers(1, 5))
def test_every_row_is_changed_by_its_own_sum_whatever_came_before(by, steps, order, count):
    dtype, tolerance = BY[by]
    bank = RowBank(GROUPS, dtype=dtype, kernel=None if by == "torch" else kernel())
    rows: dict = {row: [] for row in range(5)}
    held = {row: bank.mixed("base", []) for row in range(5)}
    for what, row, more in steps:
        if what == "put":
            members = [(adapter(seed, rank), c) for seed, rank, c in more]
            held[row] = bank.mixed("a", [(bank.factors("a", member), c) for member, c in members])
            bank.put(row, held[row])
            rows[row] = members
        else:
            bank.clear(row)
            rows[row], held[row] = [], bank.mixed("base", [])
    noise = torch.Generator().manual_seed(3)
    acting = {
        "held": (order, bank.acting(order)),
        "beside": (order[:count], bank.beside([held[r] for r in order[:count]])),
    }
    for chosen, batch in acting.values():
        for length in (1, 4):
            x = torch.randn(len(chosen), length, 45, generator=noise).to(dtype)
            for path, y in outputs_of(bank, batch, x).items():
                for i, row in enumerate(chosen):
                    # Adapters are float32, and so is c·B: not even float64 sums are right to more than that.
                    wanted = expected(x[i : i + 1], rows[row], path)
                    atol = tolerance * max(1.0, float(wanted.abs().max()))
                    torch.testing.assert_close(y[i : i + 1].double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("by", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [5, 16, 20])
@pytest.mark.parametrize("count", [4, 9])
def test_rows_that_are_read_side_by_side(by, rank, count):
    """Whole fours and what is left of them, in another order than the batch's."""
    dtype, tolerance = BY[by]
    bank = RowBank(GROUPS, dtype=dtype, kernel=kernel())
    members = [adapter(row, rank) for row in range(count)]
    for row in reversed(range(count)):
        bank.put(row, bank.factors("a", members[row]))
    x = torch.randn(count, 1, 45, generator=torch.Generator().manual_seed(4)).to(dtype)
    for path, y in outputs_of(bank, bank.acting(range(count)), x).items():
        for row in range(count):
            wanted = expected(x[row : row + 1], [(members[row], 1.0)], path)
            atol = tolerance * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(y[row : row + 1].double(), wanted, rtol=0, atol=atol)


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    bank = RowBank(GROUPS, max_rank=16)
    good = bank.factors("good", adapter(0, 4))
    bank.put(0, good)
    foreign = Adapter({"l.other": LowRank(torch.ones(3, 1), torch.ones(1, 45))})
    wide = Adapter({"l.o": LowRank(torch.ones(64, 1), torch.ones(1, 11))})
    for bad, message in (
        (foreign, "does not have"),
        (wide, "shape"),
        (adapter(0, 17), "rank 17"),
    ):
        with pytest.raises(AdapterError, match=message):
            bank.factors("bad", bad)
    with pytest.raises(AdapterError, match="rank 24"):
        bank.mixed("bad", [(good, 0.5), (bank.factors("b", adapter(1, 9)), 0.5)])
    x = torch.randn(2, 1, 45, generator=torch.Generator().manual_seed(0))
    found = outputs_of(bank, bank.acting([0, 1]), x)["l.o"]
    torch.testing.assert_close(found[:1].double(), expected(x[:1], [(adapter(0, 4), 1.0)], "l.o"), rtol=1e-5, atol=1e-5)
    assert not found[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_takes_single_positions_and_keeps_what_is_no_number_in_its_row(dtype):
    bank = RowBank(GROUPS, dtype=dtype, kernel=kernel())
    for row in range(3):
        bank.put(row, bank.factors("a", adapter(row, 8)))
    x = torch.randn(3, 1, 45, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = outputs_of(bank, bank.acting([0, 1, 2]), x)
    assert bank._kernel is not None
    assert bank._kernel.takes(x, bank._stores[8].flat, tuple(clean.values()))
    assert not bank._kernel.takes(x.expand(3, 2, 45), bank._stores[8].flat, tuple(clean.values()))
    x[1] = float("nan")
    for path, y in outputs_of(bank, bank.acting([0, 1, 2]), x).items():
        assert y[1].isnan().all()
        torch.testing.assert_close(y[[0, 2]], clean[path][[0, 2]], rtol=0, atol=0)


def test_without_a_compiler_the_kernel_is_refused_with_a_way_on(monkeypatch, tmp_path):
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()  # what this process has compiled
    with pytest.raises(UserError, match="without --kernel"):
        Kernel()
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match="no such flag"):
        Kernel()
    assert not list(tmp_path.glob("kernels/*"))


PARTS = {"l.q": 0, "l.k": 1, "l.o": 1}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(1, 20),
            st.tuples(st.sampled_from([-0.5, 0.0, 0.3, 1.0]), st.sampled_from([-0.5, 0.0, 0.3, 1.0])),
        ),
        max_size=4,
    )
)
def test_every_part_of_the_modules_has_its_own_sum(drawn):
    bank = RowBank(GROUPS, dtype=torch.float64)
    members = [(adapter(seed, rank), c) for seed, rank, c in drawn]
    laid = [(bank.factors("a", member), c) for member, c in members]
    row = bank.mixed_by_layers("a", laid, PARTS)
    # A part is as wide as those that act in it; a row as its widest part, and not as all members together.
    widest = max(sum(one.rank for one, c in laid if c[part]) for part in range(2))
    assert row.rank == 0 if not widest else widest <= row.rank < 2 * widest
    x = torch.randn(1, 3, 45, generator=torch.Generator().manual_seed(3)).double()
    for path, y in outputs_of(bank, bank.beside([row]), x).items():
        wanted = expected(x, [(member, c[PARTS[path]]) for member, c in members], path)
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def test_a_module_without_a_part_is_nobodys_to_change():
    bank = RowBank(GROUPS, dtype=torch.float64)
    inside, outside = bank.factors("a", adapter(0, 4, ["l.q"])), bank.factors("b", adapter(1, 4, ["l.q", "l.o"]))
    assert bank.mixed_by_layers("a", [(inside, (0.5,))], {"l.q": 0}).rank == 8
    with pytest.raises(AdapterError, match=r"'b': .* changes module 'l.o', for which there is no coefficient"):
        bank.mixed_by_layers("b", [(outside, (0.5,))], {"l.q": 0})
    wide = [(bank.factors("a", adapter(seed, 250)), (0.5, 0.0)) for seed in range(2)]
    with pytest.raises(AdapterError, match="rank 512"):
        bank.mixed_by_layers("a", wide, PARTS)
    halves = [(bank.factors("a", adapter(0, 250)), (0.5, 0.0)), (bank.factors("b", adapter(1, 250)), (0.0, 0.5))]
    assert bank.mixed_by_layers("a", halves, PARTS).rank == 256
