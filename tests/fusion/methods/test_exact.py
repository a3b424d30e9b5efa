"""The laws of the exact sum, against dense float64 matrices."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from tests.conftest import make_tiny_model
from tests.fusion.oracle import dense_sum

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, UserError
from lorchestra.fusion.methods import average, compress, fuse, linear, subtract

laws = settings(max_examples=40, deadline=None, derandomize=True)
weights = st.just(0.0) | st.floats(0.01, 3) | st.floats(-3, -0.01)
SHAPES = {"model.a": (7, 5), "model.b": (4, 9), "model.c": (6, 6)}


def make(ranks, seed, dtype=torch.float64, name="", base=None):
    """An adapter with a module for every path of ``ranks``."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, rank in ranks.items():
        m, n = SHAPES[path]
        B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
        modules[path] = LowRank(B.to(dtype), torch.randn(rank, n, generator=generator, dtype=torch.float64).to(dtype))
    return Adapter(modules, base or BaseId(), Lineage(name=name))


module_ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 8), min_size=1)
adapters = st.builds(make, module_ranks, st.integers(0, 2**31))
members = st.lists(adapters, min_size=1, max_size=4)


@st.composite
def sums(draw):
    """Members and a weight for each, at least one of which acts."""
    found = draw(members)
    given = draw(st.lists(weights, min_size=len(found), max_size=len(found)))
    if not any(given):
        given[0] = 1.0
    return found, given


def assert_is(adapter, expected, tolerance=1e-9):
    """``adapter`` is the dense sum; a path that it lacks is zero there."""
    for path, matrix in expected.items():
        found = adapter.modules[path].dense(torch.float64) if path in adapter.modules else torch.zeros_like(matrix)
        torch.testing.assert_close(found, matrix, rtol=tolerance, atol=tolerance)
    assert set(adapter.modules) <= set(expected)


@laws
@given(sums())
def test_a_sum_of_factors_is_the_sum_of_dense_updates(case):
    found, given = case
    fused = fuse(found, given)
    assert_is(fused, dense_sum(found, given))
    for path, update in fused.modules.items():
        acting = [a for a, weight in zip(found, given, strict=True) if weight and path in a.modules]
        assert update.rank == sum(a.modules[path].rank for a in acting), "zero members take no place"


@laws
@given(st.builds(make, module_ranks, st.integers(0, 2**31), st.just(torch.float32)))
def test_one_adapter_at_weight_one_is_itself_bit_for_bit(adapter):
    assert fuse([adapter], [1.0]).digest == adapter.digest
    assert linear({"a": adapter, "b": adapter * 5}, {"a": 1.0, "b": 0.0}).digest == adapter.digest


@laws
@given(sums(), st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(case, chance):
    found, given = case
    order = list(range(len(found)))
    chance.shuffle(order)
    fused = fuse([found[i] for i in order], [given[i] for i in order])
    assert_is(fused, dense_sum(found, given))


@laws
@given(members, st.data())
def test_linear_in_the_weights(found, data):
    vector = st.lists(st.floats(0.1, 3), min_size=len(found), max_size=len(found))
    a, b, c = data.draw(vector), data.draw(vector), data.draw(st.floats(0.1, 2))
    left = fuse(found, [x + c * y for x, y in zip(a, b, strict=True)])
    right = fuse([fuse(found, a), fuse(found, b)], [1.0, c])
    assert_is(left, {path: update.dense() for path, update in right.modules.items()})


@laws
@given(sums())
def test_negative_weights_subtract(case):
    found, given = case
    fused = fuse(found, given)
    nothing = fuse([fused, *found], [-1.0, *given])
    assert_is(nothing, {path: torch.zeros(SHAPES[path], dtype=torch.float64) for path in nothing.modules})


@laws
@given(sums(), st.integers(0, 2**31))
def test_another_gauge_of_a_member_is_the_same_member(case, seed):
    found, given = case
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for adapter in found:
        modules = {}
        for path, update in adapter.modules.items():
            Q, _ = torch.linalg.qr(torch.randn(update.rank, update.rank, generator=generator, dtype=torch.float64))
            modules[path] = LowRank(update.B @ Q * 3, Q.T @ update.A / 3)
        changed.append(Adapter(modules))
    assert_is(fuse(changed, given), dense_sum(found, given))
    if any(given):
        rank = 2
        one, kept_one = compress(fuse(found, given), rank)
        two, kept_two = compress(fuse(changed, given), rank)
        assert kept_one == pytest.approx(kept_two, rel=1e-4)
        assert one.norm() == pytest.approx(two.norm(), rel=1e-4)


def test_where_peft_is_wrong_for_rslora():
    """Fusing one rsLoRA adapter at weight 1 is the identity. PEFT's add_weighted_adapter makes it √r too strong."""
    r = 9
    config = peft.LoraConfig(r=r, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    model = peft.get_peft_model(make_tiny_model(), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(32, r, generator=generator), torch.randn(r, 32, generator=generator)
    layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data = B, A
    oracle = 6 / math.sqrt(r) * B.double() @ A.double()

    ours = fuse([Adapter({"q": LowRank(B * (6 / math.sqrt(r)), A)})], [1.0]).modules["q"].dense(torch.float64)
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)

    if Version(peft.__version__) <= Version("0.21.2"):
        model.add_weighted_adapter(["default"], [1.0], "fused", combination_type="cat")
        theirs = layer.get_delta_weight("fused").double()
        torch.testing.assert_close(theirs, math.sqrt(r) * oracle, rtol=1e-4, atol=1e-4)


def test_where_peft_linear_is_wrong():
    """Adding A's and B's separately makes cross terms; the sum of updates has none."""
    found = [make({"model.a": 3}, seed) for seed in (0, 1)]
    summed = {path: torch.zeros(SHAPES[path], dtype=torch.float64) for path in ("model.a",)}
    B = sum(0.5**0.5 * adapter.modules["model.a"].B for adapter in found)
    A = sum(0.5**0.5 * adapter.modules["model.a"].A for adapter in found)
    summed["model.a"] = B @ A
    oracle = dense_sum(found, [0.5, 0.5])
    assert_is(fuse(found, [0.5, 0.5]), oracle)
    assert (summed["model.a"] - oracle["model.a"]).norm() > 0.5 * oracle["model.a"].norm()


@laws
@given(sums())
def test_average_is_the_sum_over_the_sum_of_weights(case):
    found, given = case
    total = sum(given)
    named = {f"m{i}": adapter for i, adapter in enumerate(found)}
    weighted = dict(zip(named, given, strict=True))
    if abs(total) < 0.05:
        return
    mean = average(named, weighted)
    assert_is(mean, {path: matrix / total for path, matrix in dense_sum(found, given).items()}, 1e-8 / abs(total))
    assert sum(parent.coefficient for parent in mean.lineage.parents) == pytest.approx(1.0)


@laws
@given(sums())
def test_subtract_takes_the_others_from_the_first(case):
    found, given = case
    if len(found) < 2:
        return
    named = {f"m{i}": adapter for i, adapter in enumerate(found)}
    signed = [given[0], *(-weight for weight in given[1:])]
    made = subtract(named, dict(zip(named, given, strict=True)))
    assert_is(made, dense_sum(found, signed))
    assert all(parent.coefficient == signed[int(parent.name[1:])] for parent in made.lineage.parents), (
        "the lineage has the coefficients of the sum"
    )


class TestLineage:
    def test_parents_with_coefficients(self):
        base = BaseId("tiny", "sha256:1")
        a, b, c = (make({"model.a": 1}, seed, base=base) for seed in range(3))
        fused = linear({"a": a, "b": b, "c": c}, {"a": 0.3, "b": 0.0, "c": -0.2}, name="mixture")
        assert fused.lineage.parents == (Parent("a", a.digest, 0.3), Parent("c", c.digest, -0.2))
        assert (fused.lineage.made_by, fused.lineage.name, fused.base) == ("fusion", "mixture", base)

    def test_lists_take_the_names_that_adapters_have(self):
        one, two, other = (make({"model.a": 1}, i, name=n) for i, n in enumerate(["x", "x", ""]))
        assert [p.name for p in fuse([one, two, other], [1, 1, 1]).lineage.parents] == ["x#0", "x#1", "adapter2"]

    def test_unverified_members_take_the_base_of_the_verified(self):
        known = BaseId("tiny", "sha256:1")
        fused = fuse([make({"model.a": 1}, 0), make({"model.a": 1}, 1, base=known)], [1, 1])
        assert fused.base == known

    def test_transposed_modules_stay_so(self):
        a = Adapter({"x": LowRank(torch.ones(2, 1), torch.ones(1, 3))}, transposed=frozenset({"x"}))
        b = Adapter({"y": LowRank(torch.ones(2, 1), torch.ones(1, 3))})
        assert fuse([a, b], [1, 1]).transposed == {"x"}
        assert compress(a, 1)[0].transposed == {"x"}

    def test_compression_keeps_the_lineage_and_says_what_was_kept(self):
        fused = fuse([make({"model.a": 4}, 0, torch.float32), make({"model.a": 4}, 1, torch.float32)], [1, 1])
        small, kept = compress(fused, rank=2)
        assert small.lineage.parents == fused.lineage.parents
        assert small.lineage.settings == {"rank": 2, "energy": None, "retained": kept}
        assert 0 < kept < 1


class TestBadInput:
    def test_names(self):
        with pytest.raises(UserError, match="weight for 'b', which is no member; members: a"):
            linear({"a": make({"model.a": 1}, 0)}, {"a": 1.0, "b": 1.0})

    def test_counts(self):
        with pytest.raises(UserError, match="1 adapters need as many weights; got 2"):
            fuse([make({"model.a": 1}, 0)], [1.0, 2.0])

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_no_numbers(self, bad):
        with pytest.raises(UserError, match=r"the weight of 'a' is (nan|inf); give a finite number"):
            linear({"a": make({"model.a": 1}, 0)}, {"a": bad})

    @pytest.mark.parametrize("given", [{}, {"a": 0.0}, {"a": -0.0}])
    def test_nothing_to_write(self, given):
        with pytest.raises(UserError, match="the sum is the base itself"):
            linear({"a": make({"model.a": 1}, 0)}, given)

    def test_averages_and_differences_of_nothing(self):
        a, b = make({"model.a": 1}, 0), make({"model.a": 1}, 1)
        with pytest.raises(UserError, match="sum to zero, so there is no average; use linear"):
            average({"a": a, "b": b}, {"a": 0.5, "b": -0.5})
        with pytest.raises(UserError, match="needs two or more; to negate one, use linear with a negative weight"):
            subtract({"a": a}, {"a": 1.0})

    def test_other_bases(self):
        a = make({"model.a": 1}, 0, base=BaseId("one", "sha256:1"))
        b = make({"model.a": 1}, 1, base=BaseId("two", "sha256:2"))
        with pytest.raises(AdapterError, match=r"different bases and cannot be summed .*a: one; b: two"):
            linear({"a": a, "b": b}, {"a": 1.0, "b": 1.0})

    def test_other_shapes(self):
        a = Adapter({"x": LowRank(torch.ones(2, 1), torch.ones(1, 3))})
        b = Adapter({"x": LowRank(torch.ones(3, 1), torch.ones(1, 2))})
        with pytest.raises(
            AdapterError, match=r"module 'x': adapter0 changes .*\(2, 3\), adapter1 one of \(3, 2\); .*bases"
        ):
            fuse([a, b], [1, 1])
