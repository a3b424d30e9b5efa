"""The bank's law: a row's outputs are those of the base with that row's adapters merged in."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank import Bank, TrainableMember
from lorchestra.errors import AdapterError


def random_adapter(model, rank, seed, scale=0.3, only=None, base=None):
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    modules = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and (only is None or path.endswith(only)):
            m, n = module.weight.shape
            B = torch.randn(m, rank, generator=generator) * scale
            modules[path] = LowRank(B, torch.randn(rank, n, generator=generator) * scale)
    return Adapter(modules, base or BaseId())


def merged(model, adapters, weights):
    """The oracle: dense float64 sums added to a copy of the weights."""
    model = copy.deepcopy(model)
    for name, weight in weights.items():
        for path, update in adapters[name].modules.items():
            parameter = model.get_submodule(path).weight
            parameter.data = (parameter.data.double() + weight * update.dense(torch.float64)).float()
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


IDS = torch.randint(4, 260, (3, 7), generator=torch.Generator().manual_seed(0))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    rows=st.lists(st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3), min_size=3, max_size=3),
)
def test_rows_equal_merged_weights(ranks, rows):
    from tests.conftest import make_tiny_model

    model = make_tiny_model()
    adapters = {f"a{i}": random_adapter(model, r, i) for i, r in enumerate(ranks)}
    adapters["a0"] = random_adapter(model, ranks[0], 7, only=("q_proj", "down_proj"))
    bank = Bank(model)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    coefficients = [dict(zip(adapters, row, strict=False)) for row in rows]
    with bank.using_rows(coefficients):
        found = logits(model, IDS)
    bank.unmount()
    for b, weights in enumerate(coefficients):
        expected = logits(merged(model, adapters, weights), IDS[b : b + 1])
        torch.testing.assert_close(found[b : b + 1], expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rows=st.integers(1, 5),
    data=st.data(),
)
def test_rows_and_their_gradients_on_one_module(m, n, ranks, rows, data):
    """Outputs and ∂/∂c against dense float64: y_b = x_b (W + Σ c ΔW)ᵀ, ∂⟨G, y⟩/∂c = ⟨G_b, x_b ΔWᵢᵀ⟩."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    linear = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False)).double()
    linear[0].weight.data = draw(m, n)
    bank = Bank(linear)
    names = [f"a{i}" for i in range(len(ranks))]
    dense = {}
    for name, rank in zip(names, ranks, strict=True):
        update = LowRank(draw(m, rank), draw(rank, n))
        dense[name] = update.dense()
        bank.load(name, Adapter({"0": update}))
    x, G = draw(rows, 3, n), draw(rows, 3, m)
    # The bank's coefficients are float32.
    c = [[draw(1).float()[0].requires_grad_() for _ in names] for _ in range(rows)]
    with bank.using_rows([dict(zip(names, row, strict=True)) for row in c]):
        found = linear(x)
    for b in range(rows):
        W = linear[0].weight.detach() + sum(
            w.detach().double() * dense[name] for name, w in zip(names, c[b], strict=True)
        )
        torch.testing.assert_close(found[b].detach(), x[b] @ W.T, rtol=1e-9, atol=1e-9)
    (G * found).sum().backward()
    for b in range(rows):
        for name, weight in zip(names, c[b], strict=True):
            expected = float((G[b] * (x[b] @ dense[name].T)).sum())
            size = float(G[b].norm() * x[b].norm() * dense[name].norm())
            assert float(weight.grad) == pytest.approx(expected, rel=1e-5, abs=1e-5 * size)


def test_a_row_of_zeros_is_the_base_beside_rows_that_are_not(tiny_model):
    base = logits(tiny_model, IDS)
    bank = Bank(tiny_model)
    bank.load("a", random_adapter(tiny_model, 3, 1))
    bank.load("b", random_adapter(tiny_model, 5, 2, only=("v_proj", "up_proj")))
    for nothing in ({}, {"a": 0.0, "b": 0.0}):
        with bank.using_rows([{"a": 1.0}, nothing, {"b": -0.5}]):
            found = logits(tiny_model, IDS)
        assert torch.equal(found[1], base[1])
        assert not torch.isclose(found[0], base[0]).all()
        assert not torch.isclose(found[2], base[2]).all()


def test_shared_coefficients_equal_merged_weights(tiny_model):
    adapters = {"a": random_adapter(tiny_model, 3, 1), "b": random_adapter(tiny_model, 5, 2)}
    bank = Bank(tiny_model)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    expected = logits(merged(tiny_model, adapters, {"a": 0.7, "b": -0.4}), IDS)
    base = logits(tiny_model, IDS)
    with bank.using({"a": 0.7, "b": -0.4}):
        found = logits(tiny_model, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).norm() > 0.1 * base.norm(), "the adapters must matter, or the law is vacuous"


def test_without_selection_it_is_the_base_bit_for_bit(tiny_model):
    expected = logits(tiny_model, IDS)
    bank = Bank(tiny_model)
    bank.load("a", random_adapter(tiny_model, 3, 1))
    assert torch.equal(logits(tiny_model, IDS), expected)
    with bank.using({}):
        assert torch.equal(logits(tiny_model, IDS), expected)
    with bank.using({"a": 1.0}):
        with bank.using({"a": 0.0}):
            assert torch.equal(logits(tiny_model, IDS), expected)
        assert not torch.equal(logits(tiny_model, IDS), expected)
    assert torch.equal(logits(tiny_model, IDS), expected)
    bank.unmount()
    assert torch.equal(logits(tiny_model, IDS), expected)


def test_linear_in_coefficients_on_one_module():
    linear = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False)).double()
    update = LowRank(torch.randn(4, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64))
    bank = Bank(linear)
    bank.load("a", Adapter({"0": update}))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    plain = linear(x)
    with bank.using({"a": 1.0}):
        once = linear(x) - plain
    with bank.using({"a": -2.5}):
        torch.testing.assert_close(linear(x) - plain, -2.5 * once)
    torch.testing.assert_close(once, x @ update.dense().T)


def test_gradients_reach_the_coefficients(tiny_model):
    bank = Bank(tiny_model)
    adapters = {"a": random_adapter(tiny_model, 3, 1, scale=0.1), "b": random_adapter(tiny_model, 2, 2, scale=0.1)}
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    weight = torch.tensor(0.5, requires_grad=True)

    def loss(value):
        with bank.using({"a": value, "b": 0.3}):
            return tiny_model(input_ids=IDS, labels=IDS).loss

    loss(weight).backward()
    step = 1e-2
    slope = (loss(torch.tensor(0.5 + step)) - loss(torch.tensor(0.5 - step))) / (2 * step)
    torch.testing.assert_close(weight.grad, slope.detach(), rtol=2e-2, atol=1e-4)


def test_trainable_member_acts_and_folds(tiny_model):
    source = random_adapter(tiny_model, 3, 4)
    member = TrainableMember({p: (u.B / 2.5, u.A) for p, u in source.modules.items()}, scale=2.5)
    bank = Bank(tiny_model)
    bank.load("context", random_adapter(tiny_model, 2, 5))
    bank.mount_trainable("new", member)
    assert bank.names == ("context", "new")
    with bank.using({"context": 0.5, "new": 1.0}):
        found = logits(tiny_model, IDS)
    adapters = {"context": bank.member("context"), "new": bank.member("new")}
    torch.testing.assert_close(
        found, logits(merged(tiny_model, adapters, {"context": 0.5, "new": 1.0}), IDS), rtol=1e-4, atol=1e-4
    )
    with bank.using({"new": 1.0}):
        tiny_model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in member.parameters())
    assert all(p.grad is None for p in tiny_model.parameters())


def test_conv1d_modules(tiny_model):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    module = model.transformer.h[0].attn.c_attn
    n, m = module.weight.shape
    update = LowRank(torch.randn(m, 2), torch.randn(2, n))
    bank = Bank(model)
    bank.load("a", Adapter({"transformer.h.0.attn.c_attn": update}))
    ids = torch.arange(6)[None]
    with bank.using({"a": 1.0}):
        found = logits(model, ids)
    bank.unmount()
    module.weight.data += update.dense().T
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-4)


class TestBadInput:
    def test_names(self, tiny_model):
        bank = Bank(tiny_model)
        adapter = random_adapter(tiny_model, 2, 1)
        bank.load("clinic", adapter)
        with pytest.raises(AdapterError, match="mounted already"):
            bank.load("clinic", adapter)
        with pytest.raises(AdapterError, match="did you mean 'clinic'"), bank.using({"clinc": 1.0}):
            pass
        with pytest.raises(AdapterError, match="no adapter 'x'"):
            bank.evict("x")

    def test_nothing_is_mounted_when_a_module_does_not_fit(self, tiny_model):
        expected = logits(tiny_model, IDS)
        fits = random_adapter(tiny_model, 2, 1)
        path = next(iter(fits.modules))
        foreign = Adapter({**fits.modules, "model.layers.9.self_attn.q_proj": fits.modules[path]})
        bank = Bank(tiny_model)
        with pytest.raises(AdapterError, match=r"nearest module is 'model\.layers\.[01]\.self_attn\.q_proj'"):
            bank.load("foreign", foreign)
        wrong = Adapter({**fits.modules, path: LowRank(torch.ones(3, 2), torch.ones(2, 5))})
        with pytest.raises(AdapterError, match=r"shape \(3, 5\)"):
            bank.load("wrong", wrong)
        assert bank.names == ()
        assert torch.equal(logits(tiny_model, IDS), expected)

    def test_other_base(self, tiny_model):
        bank = Bank(tiny_model, BaseId(name="one", weights="sha256:1"))
        with pytest.raises(AdapterError, match="trained on base 'two'"):
            bank.load("a", random_adapter(tiny_model, 2, 1, base=BaseId(name="two", weights="sha256:2")))
        bank.load("unverified", random_adapter(tiny_model, 2, 1))

    def test_rows_must_match_the_batch(self, tiny_model):
        bank = Bank(tiny_model)
        bank.load("a", random_adapter(tiny_model, 2, 1))
        with pytest.raises(AdapterError, match="2 rows"), bank.using_rows([{"a": 1.0}, {}]):
            logits(tiny_model, IDS)

    def test_evict_in_use(self, tiny_model):
        bank = Bank(tiny_model)
        bank.load("a", random_adapter(tiny_model, 2, 1))
        with bank.using({"a": 1.0}), pytest.raises(AdapterError, match="in use"):
            bank.evict("a")
        bank.evict("a")
        assert bank.names == ()

    def test_one_trainable_member(self, tiny_model):
        source = random_adapter(tiny_model, 2, 1)
        bank = Bank(tiny_model)
        factors = {p: (u.B, u.A) for p, u in source.modules.items()}
        bank.mount_trainable("one", TrainableMember(factors, 1.0))
        with pytest.raises(AdapterError, match="one member trains at a time"):
            bank.mount_trainable("two", TrainableMember(factors, 1.0))
