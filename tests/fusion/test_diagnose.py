"""A diagnosis is of ΔW: against dense float64 algebra, whatever the factors are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, UserError
from lorchestra.fusion.diagnose import by_kind, by_layer, diagnose, natural, place

laws = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = {"model.layers.0.q": (9, 7), "model.layers.1.q": (9, 7), "model.layers.1.o": (6, 11), "head": (8, 8)}
ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 5), min_size=1)
seeds = st.integers(0, 2**31)


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(ranks, seed, dtype=torch.float64):
    return Adapter(
        {
            path: LowRank(
                noise(SHAPES[path][0], r, seed=seed + k).to(dtype),
                noise(r, SHAPES[path][1], seed=seed - k - 1).to(dtype),
            )
            for k, (path, r) in enumerate(sorted(ranks.items()))
        }
    )


adapters = st.builds(make, ranks, seeds)


def dense(adapter, paths):
    """ΔW of ``paths`` one after the other, as one long vector; 0 where the adapter changes nothing."""
    return np.concatenate(
        [
            adapter.modules[p].dense(torch.float64).numpy().ravel()
            if p in adapter.modules
            else np.zeros(math.prod(SHAPES[p]))
            for p in paths
        ]
    )


@laws
@given(adapters, adapters)
def test_norms_and_cosines_of_modules_layers_kinds_and_all(a, b):
    found = diagnose({"a": a, "b": b})
    (pair,) = found.pairs
    assert set(pair.modules) == set(found.paths) == {*a.modules, *b.modules}
    groups = [[path] for path in found.paths] + list(by_layer(found.paths).values())
    groups += [*by_kind(found.paths).values(), list(found.paths)]
    for paths in groups:
        x, y = dense(a, paths), dense(b, paths)
        assert found.norm("a", paths) == pytest.approx(np.linalg.norm(x), rel=1e-9)
        met = pair.whole(paths)
        assert met.inner == pytest.approx(x @ y, abs=1e-9 * (1 + np.linalg.norm(x) * np.linalg.norm(y)))
        if x.any() and y.any():
            assert met.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-9)
        else:
            assert met.cosine is None


@laws
@given(adapters, adapters)
def test_angles_are_scipys_and_overlaps_their_cosines(a, b):
    found = diagnose({"a": a, "b": b})
    (pair,) = found.pairs
    for path, met in pair.modules.items():
        if path not in a.modules or path not in b.modules:
            assert met.dimensions == 0
            assert met.row_overlap is met.column_overlap is met.signs is None
            continue
        x, y = (adapter.modules[path].dense(torch.float64).numpy() for adapter in (a, b))
        m, n = x.shape
        p, q = np.linalg.matrix_rank(x), np.linalg.matrix_rank(y)
        for angles, overlap, chance, space, size in (
            (met.column_angles, met.column_overlap, met.column_chance, scipy.linalg.orth, m),
            (met.row_angles, met.row_overlap, met.row_chance, lambda w: scipy.linalg.orth(w.T), n),
        ):
            expected = np.sort(scipy.linalg.subspace_angles(space(x), space(y)))
            np.testing.assert_allclose(np.deg2rad(angles), expected, atol=1e-6)
            assert overlap == pytest.approx(float((np.cos(expected) ** 2).sum()) / min(p, q), abs=1e-9)
            assert chance == pytest.approx(max(p, q) / size)


@laws
@given(adapters, adapters, seeds)
def test_the_gauge_does_not_matter(a, b, seed):
    """(B M, M⁻¹ A) is the same adapter; so is one with more columns than it needs."""

    def regauged(adapter):
        out = {}
        for k, (path, u) in enumerate(adapter.modules.items()):
            M = noise(u.rank, u.rank, seed=seed + k).double() + 3 * torch.eye(u.rank)
            B, A = u.B @ M, torch.linalg.solve(M, u.A)
            out[path] = LowRank(torch.cat([B, B], 1) / 2, torch.cat([A, A], 0))
        return Adapter(out)

    plain, other = diagnose({"a": a, "b": b}), diagnose({"a": regauged(a), "b": regauged(b)})
    for name in "ab":
        for path, spectrum in plain.spectra[name].items():
            twin = other.spectra[name][path]
            assert twin.values == pytest.approx(spectrum.values, rel=1e-6)
            assert twin.effective_rank == pytest.approx(spectrum.effective_rank, rel=1e-6)
    for path, met in plain.pairs[0].modules.items():
        twin = other.pairs[0].modules[path]
        assert twin.inner == pytest.approx(met.inner, rel=1e-6, abs=1e-8)
        assert twin.row_angles == pytest.approx(met.row_angles, abs=1e-4)
        assert twin.column_angles == pytest.approx(met.column_angles, abs=1e-4)
        if met.signs:
            assert twin.signs.opposed == met.signs.opposed
            assert twin.signs.product == pytest.approx(met.signs.product, rel=1e-5)


@laws
@given(adapters, st.floats(0.01, 100))
def test_with_itself_one_with_its_negative_minus_one(a, scale):
    found = diagnose({"a": a, "same": a * scale, "negative": a * -scale})
    of = {(pair.a, pair.b): pair for pair in found.pairs}
    for other, cosine, conflict in (("same", 1.0, 0.0), ("negative", -1.0, 1.0)):
        for met in (*of["a", other].modules.values(), of["a", other].whole()):
            assert met.cosine == pytest.approx(cosine, abs=1e-9)
            assert met.row_overlap == pytest.approx(1.0)
            assert met.column_overlap == pytest.approx(1.0)
            assert met.signs.conflict == conflict
            assert met.signs.weighted == pytest.approx(conflict, abs=1e-6)
    assert list(of) == [("a", "same"), ("a", "negative"), ("same", "negative")]


@laws
@given(adapters)
def test_energy_at_a_rank_is_that_of_the_singular_values(a):
    found = diagnose({"a": a})
    assert found.pairs == ()
    power = {p: np.linalg.svd(u.dense(torch.float64).numpy(), compute_uv=False) ** 2 for p, u in a.modules.items()}
    whole = sum(float(s.sum()) for s in power.values())
    shares = [sum(float(s[:r].sum()) for s in power.values()) / whole for r in range(1, 9)]
    for r, share in enumerate(shares, 1):
        assert found.kept("a", r) == pytest.approx(share, abs=1e-9)
    for wanted in (0.5, 0.9, 0.99):
        assert found.rank_keeping("a", wanted) == next(r for r, share in enumerate(shares, 1) if share >= wanted - 1e-9)
    for path, spectrum in found.spectra["a"].items():
        s = np.sqrt(power[path][: len(spectrum.values)])
        p = s / s.sum()
        assert spectrum.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
        assert 1 <= spectrum.effective_rank <= spectrum.rank + 1e-9


def test_relative_norms_are_over_the_modules_that_are_changed():
    a = make({"head": 2, "model.layers.1.o": 1}, 3)
    found = diagnose({"a": a}, weights={"head": 3.0, "model.layers.1.o": 4.0, "elsewhere": 100.0})
    assert found.relative("a") == pytest.approx(a.norm() / 5.0)
    assert found.relative("a", ["head"]) == pytest.approx(a.modules["head"].norm() / 3.0)
    assert diagnose({"a": a}).relative("a") is None


def test_what_is_zero_has_no_direction():
    zero = Adapter({"head": LowRank(torch.zeros(8, 2), noise(2, 8, seed=1))})
    found = diagnose({"zero": zero, "a": make({"head": 2}, 0)})
    met = found.pairs[0].whole()
    assert (met.cosine, met.row_overlap, met.dimensions) == (None, None, 0)
    assert found.spectra["zero"]["head"].values == ()
    assert found.spectra["zero"]["head"].effective_rank == 0.0
    assert found.kept("zero", 1) == 1.0
    assert met.signs.conflict == 0.0
    assert met.signs.weighted is None


def test_effects_on_data_add_up_over_modules_as_squares():
    activation = {"a": {"head": {"a": 3.0, "b": 1.0}, "model.layers.1.o": {"b": 2.0}, "model.layers.0.q": {"a": 4.0}}}
    a, b = make({"head": 1, "model.layers.0.q": 1}, 0), make({"head": 1, "model.layers.1.o": 1}, 9)
    found = diagnose({"a": a, "b": b}, activation=activation, tokens={"a": 7})
    assert found.cross("a", "b") == pytest.approx(math.sqrt(5) / 5)
    assert found.cross("a", "b", ["head"]) == pytest.approx(1 / 3)
    assert found.cross("a", "b", ["model.layers.1.o"]) is None  # a does nothing there
    assert found.cross("b", "a") is None  # no data of b


def test_where_a_module_stands():
    assert place("model.layers.12.mlp.down_proj") == (12, "mlp.down_proj")
    assert place("model.layers.3.mlp.experts.17.w1") == (3, "mlp.experts.*.w1")
    assert place("lm_head") == (None, "lm_head")
    paths = ["model.layers.10.q", "model.layers.2.q", "lm_head"]
    assert sorted(paths, key=natural) == ["lm_head", "model.layers.2.q", "model.layers.10.q"]
    assert by_layer(paths) == {2: ["model.layers.2.q"], 10: ["model.layers.10.q"]}
    assert by_kind(paths) == {"q": ["model.layers.10.q", "model.layers.2.q"], "lm_head": ["lm_head"]}


def test_no_dense_matrix_is_made():
    """ΔW of this module would take 3.6 TB."""
    m, n = 1_000_000, 900_000
    a, b = (Adapter({"wide": LowRank(noise(m, 2, seed=s), noise(2, n, seed=s + 9))}) for s in (0, 1))
    found = diagnose({"a": a, "b": b}, entries=1 << 17)
    met = found.pairs[0].modules["wide"]
    assert met.cosine == pytest.approx(a.modules["wide"].inner(b.modules["wide"]) / a.norm() / b.norm(), abs=1e-9)
    assert max(met.row_overlap, met.column_overlap) < 1e-4
    assert met.signs.conflict == pytest.approx(0.5, abs=0.1)
    assert not found.tiles["wide"].complete


class TestBadInput:
    def test_shapes_are_named(self):
        a = Adapter({"x": LowRank(torch.ones(2, 1), torch.ones(1, 3))})
        b = Adapter({"x": LowRank(torch.ones(3, 1), torch.ones(1, 2))})
        with pytest.raises(AdapterError, match=r"'x'.*\(2, 3\) in 'a' and \(3, 2\) in 'b'"):
            diagnose({"a": a, "b": b})

    def test_bases_are_named(self):
        update = {"x": LowRank(torch.ones(2, 1), torch.ones(1, 3))}
        with pytest.raises(AdapterError, match=r"different bases.*a: one; b: two"):
            diagnose({"a": Adapter(update, BaseId("one", "sha256:1")), "b": Adapter(update, BaseId("two", "sha256:2"))})

    def test_nothing(self):
        with pytest.raises(UserError, match="at least one adapter"):
            diagnose({})
