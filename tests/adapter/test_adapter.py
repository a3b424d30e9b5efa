"""The adapter value and its digest."""

from __future__ import annotations

import math

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import adapter_digest, json_digest
from lorchestra.adapter.lineage import BaseId, Lineage
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError


def update(m=4, n=3, r=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator))


def test_modules_are_sorted_and_frozen():
    adapter = Adapter({"b": update(), "a": update(seed=1)})
    assert list(adapter.modules) == ["a", "b"]
    with pytest.raises(TypeError):
        adapter.modules["c"] = update()


def test_norm_and_parameters_against_dense():
    adapter = Adapter({"a": update(), "b": update(5, 6, 3, seed=1)})
    dense = [u.dense(torch.float64) for u in adapter.modules.values()]
    assert adapter.norm() == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in dense)))
    assert adapter.parameters == 2 * (4 + 3) + 3 * (5 + 6)
    torch.testing.assert_close((adapter * -2.5).modules["a"].dense(), -2.5 * adapter.modules["a"].dense())
    assert torch.equal((-2.5 * adapter).modules["b"].B, (adapter * -2.5).modules["b"].B)


def test_equal_content_equal_digest_whatever_the_order_and_layout():
    a, b = update(), update(5, 6, 3, seed=1)
    strided = LowRank(a.B.T.contiguous().T, a.A.T.contiguous().T)
    assert not strided.B.is_contiguous()
    assert Adapter({"x": a, "y": b}).digest == Adapter({"y": b, "x": strided}).digest
    assert Adapter({"x": a}).digest.startswith("sha256:")


def test_every_change_changes_the_digest():
    a = update(4, 4, 2)
    zeros = LowRank(torch.zeros(4, 2), torch.zeros(2, 4))
    flipped = a.B.clone().view(torch.int32)
    flipped[3, 1] ^= 1  # the last bit of one number
    changed = {
        "path": {"y": a},
        "one bit": {"x": LowRank(flipped.view(torch.float32), a.A)},
        "dtype": {"x": a.to(torch.float64)},
        "factors exchanged": {"x": LowRank(a.A.T, a.B.T)},
        "one module more": {"x": a, "y": a},
        "gauge": {"x": LowRank(a.B * 2, a.A / 2)},
        "zeros": {"x": zeros},
        "zeros of another shape": {"x": LowRank(torch.zeros(2, 2), torch.zeros(2, 6))},
    }
    digests = {name: adapter_digest(modules) for name, modules in changed.items()}
    assert len({*digests.values(), adapter_digest({"x": a})}) == len(changed) + 1


def test_json_digest_is_of_the_value_not_of_its_spelling():
    assert json_digest({"b": 1, "a": [1.5, None]}) == json_digest({"a": [1.5, None], "b": 1})
    assert json_digest({"a": 1}) != json_digest({"a": 1.0})
    assert json_digest({"a": "é"}) != json_digest({"a": "e"})


class TestBadInput:
    def test_nothing(self):
        with pytest.raises(AdapterError, match="at least one module"):
            Adapter({})

    def test_numbers_too_large_to_be_summed_are_finite_all_the_same(self):
        huge = torch.full((4, 2), 3e38)
        assert torch.isinf(huge.sum())
        assert torch.equal(Adapter({"q": LowRank(huge, huge.T)}).modules["q"].B, huge)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("factor", ["B", "A"])
    def test_not_finite(self, bad, factor):
        good = update()
        factors = {"B": good.B.clone(), "A": good.A.clone()}
        factors[factor][0, 0] = bad
        with pytest.raises(AdapterError, match=r"'model\.q' holds NaN or infinity"):
            Adapter({"model.q": LowRank(**factors)})


def test_printed_it_is_one_line():
    modules = {"a": update(), "b": update(5, 6, 3, seed=1)}
    assert repr(Adapter(modules)) == "<Adapter foreign: 2 modules, rank 2–3, base unnamed>"
    named = Adapter({"a": update()}, BaseId(name="tiny"), Lineage(made_by="stage", name="notes"))
    assert repr(named) == "<Adapter notes: 1 module, rank 2, base tiny>"
