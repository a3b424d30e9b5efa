"""Coefficients as a tensor: by row, by group of layers, and differentiable, against merged weights in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.bank.test_mount import IDS, logits, merged, random_adapter
from tests.conftest import make_tiny_model

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank import Bank, TrainableMember, adapter_free
from lorchestra.errors import AdapterError

ROWS = torch.tensor([[0.7, 0.3], [-0.5, 1.5], [0.0, 0.0]])


def two_layers(path):
    return int(path.split(".")[2])


@pytest.fixture
def bank(tiny_model):
    bank = Bank(tiny_model)
    bank.load("a", random_adapter(tiny_model, 2, 1))
    bank.load("b", random_adapter(tiny_model, 3, 2, only=("q_proj", "down_proj")))
    return bank


@pytest.fixture
def groups(bank):
    return {path: two_layers(path) for path in bank.layers()}


def test_rows_of_a_tensor_equal_merged_weights(bank):
    model = bank.model
    adapters = {name: bank.member(name) for name in ("a", "b")}
    with bank.using_tensor(("a", "b"), ROWS):
        ours = logits(model, IDS)
    for row, (a, b) in enumerate(ROWS.tolist()):
        with adapter_free(model):
            expected = logits(merged(model, adapters, {"a": a, "b": b}), IDS[row : row + 1])
        torch.testing.assert_close(ours[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[0], ours[1], atol=1e-2)
    with bank.using_rows([{"a": a, "b": b} for a, b in ROWS.tolist()]):
        torch.testing.assert_close(ours, logits(model, IDS), rtol=1e-5, atol=1e-5)


def test_every_group_of_layers_has_coefficients_of_its_own(bank, groups):
    model = bank.model
    by_group = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(4))
    with bank.using_tensor(("b", "a"), by_group, groups):
        ours = logits(model, IDS)
    for row in range(3):
        other = copy.deepcopy(model)
        for k, name in enumerate(("b", "a")):
            for path, update in bank.member(name).modules.items():
                weight = other.get_submodule(path).weight
                c = float(by_group[row, groups[path], k])
                weight.data = (weight.data.double() + c * update.dense(torch.float64)).float()
        with adapter_free(other):
            expected = logits(other, IDS[row : row + 1])
        torch.testing.assert_close(ours[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_are_those_of_finite_differences(grouped):
    """In float64 throughout, which GPT-2 computes in and Llama's norm does not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.15)
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    bank = Bank(model)
    generator = torch.Generator().manual_seed(2)
    for name in ("a", "b"):
        modules = {
            path: LowRank(
                torch.randn(module.weight.shape[1], 2, generator=generator) * 0.2,
                torch.randn(2, module.weight.shape[0], generator=generator) * 0.2,
            )
            for path, module in model.named_modules()
            if path.endswith(("c_attn", "c_fc"))
        }
        bank.load(name, Adapter(modules))
    groups = {path: two_layers(path) for path in bank.layers()} if grouped else None
    point = torch.randn(2, *([2] if grouped else []), 2, generator=generator, dtype=torch.float64)
    ids = IDS[:2]

    def loss(coefficients):
        with bank.using_tensor(("a", "b"), coefficients, groups):
            return torch.log_softmax(model(input_ids=ids).logits, dim=-1)[..., 7].sum()

    assert torch.autograd.gradcheck(loss, point.clone().requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_a_trainable_member_takes_its_column(tiny_model):
    bank = Bank(tiny_model)
    update = random_adapter(tiny_model, 2, 3, only=("q_proj",))
    bank.load("frozen", random_adapter(tiny_model, 2, 1))
    bank.mount_trainable("new", TrainableMember({p: (u.B, u.A) for p, u in update.modules.items()}, 2.0))
    with torch.no_grad(), bank.using_tensor(("new", "frozen"), ROWS):
        ours = logits(tiny_model, IDS)
    with torch.no_grad(), bank.using_rows([{"new": a, "frozen": b} for a, b in ROWS.tolist()]):
        torch.testing.assert_close(ours, logits(tiny_model, IDS), rtol=1e-5, atol=1e-5)


def test_no_member_is_the_base_and_what_was_before_returns(bank):
    base = logits(bank.model, IDS)
    with bank.using({"a": 1.0}):
        before = logits(bank.model, IDS)
        with bank.using_tensor((), torch.zeros(3, 0)):
            torch.testing.assert_close(logits(bank.model, IDS), base)
        assert torch.equal(logits(bank.model, IDS), before)


def test_adapter_free_is_the_base_whatever_is_chosen_and_however_many_banks_there_are(tiny_model):
    base = logits(tiny_model, IDS)
    first, second = Bank(tiny_model), Bank(tiny_model)
    first.load("a", random_adapter(tiny_model, 2, 1))
    second.load("b", random_adapter(tiny_model, 2, 2))
    with first.using({"a": 1.0}), second.using_tensor(("b",), torch.ones(3, 1)):
        both = logits(tiny_model, IDS)
        with adapter_free(tiny_model):
            assert torch.equal(logits(tiny_model, IDS), base)
        assert torch.equal(logits(tiny_model, IDS), both)
    assert not torch.allclose(both, base, atol=1e-2)
    with adapter_free(make_tiny_model()):
        pass


@pytest.mark.parametrize(
    ("members", "coefficients", "message"),
    [
        (("a", "c"), torch.ones(3, 2), "no adapter 'c' is mounted"),
        (("a", "a"), torch.ones(3, 2), "name a member twice: a, a"),
        (("a", "b"), torch.ones(3, 3), r"are \(3, 3\) torch.float32; expected \[b, K\]"),
        (("a", "b"), torch.ones(3, 1, 2), r"are \(3, 1, 2\)"),
        (("a", "b"), torch.ones(3, 2, dtype=torch.int64), "expected .* in floating point"),
    ],
)
def test_what_does_not_fit_is_refused(bank, members, coefficients, message):
    with pytest.raises(AdapterError, match=message), bank.using_tensor(members, coefficients):
        pytest.fail("it went on")
    with bank.using({"a": 1.0}):
        logits(bank.model, IDS)  # nothing is left of it


def test_groups_are_checked_against_the_modules_of_the_members(bank, groups):
    with pytest.raises(AdapterError, match=r"expected \[b, G, K\]"), bank.using_tensor(("a", "b"), ROWS, groups):
        pytest.fail("it went on")
    few = {path: g for path, g in groups.items() if path.endswith(("q_proj", "down_proj"))}
    with bank.using_tensor(("b",), torch.ones(3, 2, 1), few):  # modules of others do not matter
        logits(bank.model, IDS)
    with pytest.raises(AdapterError, match="is in no group"), bank.using_tensor(("a",), torch.ones(3, 2, 1), few):
        pytest.fail("it went on")
    with pytest.raises(AdapterError, match="is in no group"), bank.using_tensor(("a",), torch.ones(3, 1, 1), groups):
        pytest.fail("it went on")


def test_a_batch_of_another_number_of_rows_is_refused(bank):
    with pytest.raises(AdapterError, match="coefficients for 2 rows"), bank.using_tensor(("a", "b"), ROWS[:2]):
        logits(bank.model, IDS)
