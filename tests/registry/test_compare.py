"""Two versions side by side; distances against dense float64 matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError
from lorchestra.registry.compare import compare, compare_held, distance, flat
from lorchestra.registry.manifest import Metric
from lorchestra.registry.mistakes import UnknownReferenceError


def drawn(seed: int, rank: int, size: float = 1.0, paths=("a.q", "a.v", "b.q")) -> Adapter:
    noise = torch.Generator().manual_seed(seed)
    return Adapter(
        {p: LowRank(torch.randn(7, rank, generator=noise) * size, torch.randn(rank, 5, generator=noise)) for p in paths}
    )


def dense(adapter: Adapter, paths) -> torch.Tensor:
    zero = torch.zeros(7, 5, dtype=torch.float64)
    found = adapter.modules
    return torch.stack([found[p].dense(torch.float64) if p in found else zero for p in paths])


@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_distances_are_those_of_the_dense_matrices(one, two, rank_one, rank_two, size):
    first, second = drawn(one, rank_one), drawn(two, rank_two, size, ("b.q", "a.q", "c.o"))
    found = distance(first, second)
    paths = ["a.q", "a.v", "b.q", "c.o"]
    W, V = dense(first, paths), dense(second, paths)
    assert found.relative == pytest.approx(float((W - V).norm() / W.norm()), rel=1e-9, abs=1e-12)
    assert found.cosine == pytest.approx(float((W * V).sum() / (W.norm() * V.norm())), abs=1e-12)
    assert found.only == (("a.v",), ("c.o",))
    for row in found.modules:
        W, V = dense(first, [row.path])[0], dense(second, [row.path])[0]
        assert row.relative == pytest.approx(float((W - V).norm() / W.norm()), rel=1e-9, abs=1e-12)
        assert row.cosine == pytest.approx(float((W * V).sum() / (W.norm() * V.norm())), abs=1e-12)
        assert row.norms == pytest.approx((float(W.norm()), float(V.norm())))
    assert [row.difference for row in found.modules] == sorted((row.difference for row in found.modules), reverse=True)


def test_versions_that_are_nearly_equal_are_told_apart():
    """Where ‖a‖² + ‖b‖² − 2⟨a, b⟩ has lost all its digits."""
    first = drawn(1, 3)
    moved = {}
    for path, update in first.modules.items():
        B = update.B.clone().double()
        B[0, 0] += 1e-9
        moved[path] = LowRank(B, update.A.double())
    second = Adapter(moved)
    W, V = dense(first, first.modules), dense(second, first.modules)
    exact = float((W - V).norm() / W.norm())
    assert exact < 1e-8
    assert distance(first, second).relative == pytest.approx(exact, rel=1e-5)


def test_gauge_invariance_and_self():
    first = drawn(1, 3)
    M = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 4.0]], dtype=torch.float64)
    turned = Adapter(
        {p: LowRank(u.B.double() @ M, torch.linalg.inv(M) @ u.A.double()) for p, u in first.modules.items()}
    )
    found = distance(first, turned)
    assert found.relative == pytest.approx(0, abs=1e-12)
    assert found.cosine == pytest.approx(1)


def test_zero_has_no_direction():
    first = drawn(1, 2)
    zero = first * 0.0
    assert (distance(zero, first).relative, distance(zero, first).cosine) == (None, None)
    assert distance(first, zero).relative == pytest.approx(1)
    assert distance(first, zero).modules[0].cosine is None


def test_other_shapes_have_no_distance():
    other = Adapter({"a.q": LowRank(torch.ones(4, 1), torch.ones(1, 5))})
    with pytest.raises(AdapterError, match=r"'a\.q' has an update of shape \(7, 5\) in the first and \(4, 5\)"):
        distance(drawn(1, 2), other)


def test_flat():
    value = {"a": {"b": [1, {"c": None}], "d": {}}, "e": []}
    assert dict(flat(value)) == {"a.b.0": 1, "a.b.1.c": "null", "a.d": {}, "e": []}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (Metric(value=1.3, low=1.2, high=1.4), Metric(value=1.0, low=0.9, high=1.1), "better"),
        (Metric(value=1.3, low=1.2, high=1.4), Metric(value=1.6, low=1.5, high=1.7), "worse"),
        (Metric(value=1.3, low=1.2, high=1.4), Metric(value=1.2, low=1.1, high=1.3), "unclear"),
        (Metric(value=1.3), Metric(value=1.0, low=0.9, high=1.1), "unclear"),
        (
            Metric(value=0.3, low=0.2, high=0.4, better="higher"),
            Metric(value=0.6, low=0.5, high=0.7, better="higher"),
            "better",
        ),
        (
            Metric(value=1.3, low=1.2, high=1.4, sealed="x"),
            Metric(value=1, low=0.9, high=1.1, sealed="y"),
            "other test",
        ),
        (Metric(value=1.3), None, "one only"),
        (None, Metric(value=1.3), "one only"),
    ],
)
def test_metrics(local, make, before, after, verdict):
    one = local.push(make(1), "a", metrics={"loss": before} if before else {})
    two = local.push(make(2), "a", metrics={"loss": after} if after else {})
    found = compare_held(local, one.reference, two.reference)
    (pair,) = [pair for pair in found.metrics if pair.key == "loss"]
    assert pair.verdict == verdict
    assert pair.change == (after.value - before.value if before and after else None)


def test_everything_that_differs_and_nothing_else(registry, make):
    one = registry.push(make(1, settings={"lora": {"rank": 2, "alpha": 4}, "x": True}, data={"a": "1", "b": "2"}), "c")
    parent = one.manifest
    two = registry.push(
        make(
            1, rank=3, settings={"lora": {"rank": 3, "alpha": 4}, "x": 1}, data={"a": "1", "b": "3"}, parents=[parent]
        ),
        "c",
    )
    found = compare_held(registry, "c@v1", "c@v2")
    assert {(c.key, c.before, c.after) for c in found.settings} == {
        ("parameters", 44, 66), ("ranks", 2, 3), ("settings.lora.rank", 2, 3), ("settings.x", True, 1)
    }  # fmt: skip
    assert [(c.key, c.before, c.after) for c in found.data] == [("b", "2", "3")]
    assert [(c.key, c.before, c.after) for c in found.lineage] == [(f"parents.c ({parent.digest[7:19]})", None, 0.5)]
    assert (found.base, found.serving, found.same) == ((), (), False)
    same = compare_held(registry, "c@v1", "c@v1")
    assert same.same
    assert same.distance.relative == pytest.approx(0, abs=1e-9)
    assert not any((same.base, same.settings, same.data, same.lineage, same.serving, same.tools))
    assert found.as_dict()["after"] == two.reference
    assert math.isfinite(found.as_dict()["distance"]["relative"])


def test_a_revoked_version_can_be_looked_at(local, make):
    local.push(make(1), "c")
    local.push(make(2), "c")
    local.revoke("c@v1", "wrong")
    assert compare_held(local, "c@v1", "c@v2").distance.relative > 0
    with pytest.raises(UnknownReferenceError):
        compare_held(local, "c@v1", "c@v9")


def test_compare_takes_values(local, make):
    version = local.push(make(1), "c")
    adapter = Adapter.load(make(1))
    other = replace(version, manifest=version.manifest.model_copy(update={"base": version.manifest.base.model_copy(
        update={"weights": "sha256:" + "f" * 64})}))  # fmt: skip
    found = compare(version, other, (adapter, adapter))
    assert [change.key for change in found.base] == ["weights"]
