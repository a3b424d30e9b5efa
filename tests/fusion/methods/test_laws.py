"""The table's claims, method by method: a declared law must hold; one that does not always hold is not declared.

Every method also against an independent dense implementation (``dense.py``).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.fusion.methods import dense
from tests.fusion.oracle import random_adapter

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.fusion.bounds import Bounds
from lorchestra.fusion.methods import METHODS, apply
from lorchestra.fusion.methods.table import LAWS

laws = settings(max_examples=12, deadline=None, derandomize=True)
SHAPES = {"model.a": (7, 5), "model.b": (4, 6)}
FULL = Bounds(rank=9)  # above min(m, n): factors lose nothing, and laws of the method itself can be seen
ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 4), min_size=1)
weight = st.floats(0.1, 2) | st.floats(-2, -0.1)
NAMES = ("first", "second", "third")


def make(ranks, seed):
    return random_adapter(SHAPES, ranks, seed)


@st.composite
def mixtures(draw):
    members = draw(st.lists(st.builds(make, ranks, st.integers(0, 2**31)), min_size=2, max_size=3))
    named = dict(zip(NAMES, members, strict=False))
    weights = {name: draw(weight) for name in named}
    assume(abs(sum(weights.values())) > 0.1)  # an average needs it
    return named, weights


def fused(method, members, weights, **options):
    """Path → dense result, a path that is absent being zero."""
    if method == "svd" or METHODS[method].home == "elementwise":
        options.setdefault("bounds", FULL)
    adapter = apply(method, members, weights, dtype=torch.float64, **options).adapter
    zeros = {path: torch.zeros(shape, dtype=torch.float64) for path, shape in SHAPES.items()}
    return zeros | {path: update.dense(torch.float64) for path, update in adapter.modules.items()}


def assert_equal(found, expected, tolerance=2e-5):
    for path in SHAPES:
        torch.testing.assert_close(found[path], expected[path], rtol=tolerance, atol=tolerance)


def who(law):
    return [name for name, row in METHODS.items() if law in row.laws]


def test_every_law_is_known_and_every_method_has_some():
    assert all(row.laws and row.laws <= set(LAWS) for row in METHODS.values())
    assert all(who(law) for law in LAWS)


@pytest.mark.parametrize("method", who("gauge"))
@laws
@given(mixtures(), st.integers(0, 2**31))
def test_gauge(method, mixture, seed):
    members, weights = mixture
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, adapter in members.items():
        modules = {}
        for path, update in adapter.modules.items():
            Q, _ = torch.linalg.qr(torch.randn(update.rank, update.rank, generator=generator, dtype=torch.float64))
            stretch = torch.linspace(0.25, 4, update.rank, dtype=torch.float64)
            modules[path] = LowRank(update.B.double() @ (Q * stretch), (Q / stretch).T @ update.A.double())
        changed[name] = Adapter(modules)
    assert_equal(fused(method, changed, weights), fused(method, members, weights))


@pytest.mark.parametrize("method", who("order"))
@laws
@given(mixtures(), st.randoms(use_true_random=False))
def test_order(method, mixture, chance):
    members, weights = mixture
    names = list(members)
    chance.shuffle(names)
    again = {name: members[name] for name in names}
    assert_equal(fused(method, again, weights), fused(method, members, weights))


@pytest.mark.parametrize("method", who("identity"))
@laws
@given(st.builds(make, ranks, st.integers(0, 2**31)))
def test_identity(method, adapter):
    options = {} if METHODS[method].density is None else {"density": 1.0}
    expected = {path: torch.zeros(shape, dtype=torch.float64) for path, shape in SHAPES.items()}
    expected |= {path: update.dense(torch.float64) for path, update in adapter.modules.items()}
    assert_equal(fused(method, {"a": adapter}, {"a": 1.0}, **options), expected)


@pytest.mark.parametrize("method", who("zero"))
@laws
@given(mixtures(), st.builds(make, ranks, st.integers(0, 2**31)))
def test_zero(method, mixture, other):
    members, weights = mixture
    found = fused(method, {**members, "none": other}, {**weights, "none": 0.0})
    assert_equal(found, fused(method, members, weights), 1e-12)


@pytest.mark.parametrize("method", who("negation"))
@laws
@given(mixtures())
def test_negation(method, mixture):
    members, weights = mixture
    found = fused(method, members, {name: -weight for name, weight in weights.items()})
    assert_equal(found, {path: -matrix for path, matrix in fused(method, members, weights).items()})


@pytest.mark.parametrize("method", who("linear"))
@laws
@given(mixtures(), st.data())
def test_linear(method, mixture, data):
    members, left = mixture
    right, factor = {name: data.draw(weight) for name in members}, data.draw(st.floats(0.2, 2))
    both = {name: left[name] + factor * right[name] for name in members}
    assume(all(abs(weight) > 1e-3 for weight in both.values()))
    one, two = fused(method, members, left), fused(method, members, right)
    assert_equal(fused(method, members, both), {path: one[path] + factor * two[path] for path in SHAPES})


@pytest.mark.parametrize("method", [name for name in who("unbiased") if METHODS[name].seeded])
def test_unbiased(method):
    """Over 400 seeds the mean comes as near to Σλ·ΔW as its own standard error allows, entry by entry."""
    members, weights = {"a": make({"model.a": 2}, 0), "b": make({"model.a": 3}, 1)}, {"a": 0.7, "b": -0.4}
    draws = torch.stack([fused(method, members, weights, seed=seed)["model.a"] for seed in range(400)])
    expected = fused("linear", members, weights)["model.a"]
    error = draws.std(dim=0) / 20
    assert float(error.min()) > 0, "chance is in it"
    z = (draws.mean(dim=0) - expected) / error
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.6)
    biased = (draws.mean(dim=0) * 0.9 - expected) / error
    assert float(biased.square().mean()) > 3, "a bias of a tenth would be seen"


DENSE = ["linear", "average", "subtract", "magnitude", "ties", "knots"]


@pytest.mark.parametrize("method", DENSE)
@laws
@given(mixtures(), st.sampled_from([0.1, 0.35, 0.8, 1.0]))
def test_against_a_plain_dense_implementation(method, mixture, density):
    members, weights = mixture
    options = {} if METHODS[method].density is None else {"density": density}
    found = fused(method, members, weights, **options)
    for path, shape in SHAPES.items():
        here = [name for name in members if path in members[name].modules]
        deltas = [members[name].modules[path].dense(torch.float64) for name in here]
        if method in ("average", "subtract"):  # where a member has no such module its ΔW is zero
            deltas = [
                members[name].modules[path].dense(torch.float64) if name in here else torch.zeros(shape).double()
                for name in members
            ]
            here = list(members)
        expected = torch.zeros(shape, dtype=torch.float64)
        if deltas:
            expected = getattr(dense, method)(deltas, [weights[name] for name in here], density)
        torch.testing.assert_close(found[path], expected, rtol=2e-5, atol=2e-5)


def test_laws_that_are_not_declared_do_fail_somewhere():
    """The table is not needlessly modest: for each of these there is a counterexample."""
    a, b = make({"model.a": 3}, 0), make({"model.a": 3}, 1)
    both, ones = {"a": a, "b": b}, {"a": 1.0, "b": 1.0}

    def differs(x, y):
        return float((x["model.a"] - y["model.a"]).norm()) > 0.05 * float(y["model.a"].norm())

    single = {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}
    for method in ("ties", "dare_ties", "knots", "average"):
        parts = [fused(method, both, weights)["model.a"] for weights in single]
        assert differs(fused(method, both, ones), {"model.a": parts[0] + parts[1]}), f"{method} is not linear"
    one_rank = [fused("svd", both, weights, bounds=Bounds(rank=1))["model.a"] for weights in single]
    assert differs(fused("svd", both, ones, bounds=Bounds(rank=1)), {"model.a": one_rank[0] + one_rank[1]})
    negated = {path: -matrix for path, matrix in fused("average", both, {"a": -1.0, "b": -1.0}).items()}
    assert differs(negated, fused("average", both, ones))
    assert differs(fused("subtract", {"b": b, "a": a}, ones), fused("subtract", both, ones))
