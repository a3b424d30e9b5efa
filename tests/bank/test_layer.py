"""The layer's cached stack: it is what the forward pass multiplies by, so it is what must not change."""

from __future__ import annotations

import pytest
import torch
from tests.bank.test_mount import IDS, logits, random_adapter
from tests.conftest import make_tiny_model

from lorchestra.bank import Bank, TrainableMember
from lorchestra.bank.layer import _updated
from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import AdapterError, TrainingError
from lorchestra.events import Silent
from lorchestra.train.settings import ContextMember, LoraSettings, Objective, TrainSettings
from lorchestra.train.stage import StageInputs, train_stage

PATH = "model.layers.0.mlp.up_proj"
PARTS = ["A", "B", "column"]


def corrupt(bank, part):
    """Change one entry of what the forward pass multiplies by at one module, the adapters staying as they are."""
    tensor = getattr(bank.layers()[PATH]._stack, part)
    tensor.view(-1)[0] += 1


def mounted(model, *names):
    bank = Bank(model)
    for seed, name in enumerate(names):
        bank.load(name, random_adapter(model, 2, seed))
    return bank


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_stack_is_found(part, dtype):
    bank = mounted(make_tiny_model().to(dtype), "a", "b")
    bank.check()
    with bank.using_rows([{"a": 1.0}, {"b": 0.5}, {}]):
        before = logits(bank.model, IDS)
        bank.check()
        corrupt(bank, part)
        assert not torch.equal(logits(bank.model, IDS), before), "the stack is what acts"
        with pytest.raises(TrainingError, match=f"at {PATH} the forward pass used other factors"):
            bank.check()


def test_nan_is_equal_to_itself():
    """A member that is broken from the start is not one that was changed."""
    bank = mounted(make_tiny_model(), "a")
    bank.layers()[PATH].frozen["a"].A.fill_(torch.nan)
    with bank.using({"a": 1.0}):
        logits(bank.model, IDS)
    bank.check()


@pytest.mark.parametrize("then", ["another selection", "evict"])
def test_while_a_member_trains_a_changed_stack_cannot_slip_away(then):
    """A curriculum ends at other members than it trained with: the stack of the training is gone before its end."""
    model = make_tiny_model()
    bank = mounted(model, "a", "b")
    bank.mount_trainable("new", TrainableMember({PATH: (torch.zeros(48, 2), torch.randn(2, 32))}, 1.0))
    with bank.using({"a": 1.0, "b": 1.0, "new": 1.0}):
        logits(model, IDS)
    corrupt(bank, "B")

    def go_on():
        if then == "evict":
            bank.evict("a")
        with bank.using({"b": 1.0}):
            logits(model, IDS)

    with pytest.raises(TrainingError, match="changed its frozen context"):
        go_on()
    bank.evict("new")
    go_on()  # where nothing trains, a new selection costs no comparison


class Meddler(Silent):
    """Corrupts the stack after the first step: as a stage with a wrong in-place operation would."""

    def __init__(self, model, part):
        self.model, self.part = model, part

    def event(self, kind, /, **fields):
        if kind == "train_step" and fields["step"] == 1:
            (layer,) = self.model.get_submodule(PATH)._forward_hooks.values()
            getattr(layer._stack, self.part).view(-1)[0] += 1


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fading", [False, True])
def test_a_stage_whose_stack_was_changed_is_not_kept(tmp_path, part, fading):
    model = make_tiny_model()
    schedule = ContextMember(schedule="linear", to=0.0) if fading else ContextMember()
    item = Rendered(tuple(range(4, 12)), (Branch((20, 21, 2), (True,) * 3),), 0)
    inputs = StageInputs(
        "new",
        Objective(),
        LoraSettings(rank=2),
        TrainSettings(max_steps=4, batch_size=2),
        [item] * 4,
        [item],
        {name: (random_adapter(model, 2, seed), schedule) for seed, name in enumerate(("a", "b"))},
    )
    with pytest.raises(TrainingError, match="changed its frozen context"):
        train_stage(model, random_adapter(model, 1, 0).base, 3, inputs, tmp_path / "bad", reporter=Meddler(model, part))
    assert train_stage(model, random_adapter(model, 1, 0).base, 3, inputs, tmp_path / "good").steps == 4


def test_one_row_of_coefficients_is_for_a_batch_of_one():
    """It is not meant for all: in a server, a request's adapter would answer its neighbours."""
    bank = mounted(make_tiny_model(), "a")
    with bank.using_rows([{"a": 1.0}]):
        alone = logits(bank.model, IDS[:1])
        with pytest.raises(AdapterError, match="coefficients for 1 rows, but the input is"):
            logits(bank.model, IDS)
    with bank.using({"a": 1.0}):
        torch.testing.assert_close(logits(bank.model, IDS[:1]), alone)
        assert logits(bank.model, IDS).shape[0] == len(IDS), "shared coefficients are for any batch"


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_an_update_against_float64(dtype, tolerance, scale):
    """y + (c · x Aᵀ) Bᵀ with the gradients of all four, the factors float32 whatever x is."""
    torch.manual_seed(0)
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    y, x = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    A, B = torch.randn(2, 4, dtype=factors), torch.randn(5, 2, dtype=factors)
    gradient = torch.randn(2, 3, 5, dtype=dtype)
    ours = [t.clone().requires_grad_() for t in (y, x, A, B)]
    exact = [t.double().requires_grad_() for t in (y, x, A, B)]
    found = _updated(None, *ours, scale)
    expected = exact[0] + scale * exact[1] @ exact[2].T @ exact[3].T
    found.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(found, expected), *((one.grad, other.grad) for one, other in zip(ours, exact, strict=True))]
    assert [one.grad.dtype for one in ours] == [dtype, dtype, factors, factors]
    for one, other in pairs:
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_module_and_its_update_against_float64(dtype, tolerance, bias, reached, frozen):
    """x Wᵀ + b + (c · x Aᵀ) Bᵀ with the gradients of x (if it has one), A and B; W has one unless it is frozen."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 5, bias=bias).to(dtype).requires_grad_(not frozen)
    x = torch.randn(2, 3, 4, dtype=dtype).requires_grad_(reached)
    A, B = torch.randn(2, 4).requires_grad_(), torch.randn(5, 2).requires_grad_()
    gradient = torch.randn(2, 3, 5, dtype=dtype)
    inputs = [t for t in (x, A, B, module.weight) if t.requires_grad]
    found = _updated(module, module(x), x, A, B, 2.5)
    result = (found, *torch.autograd.grad(found, inputs, gradient))
    b = module.bias.double() if bias else 0.0
    expected = x.double() @ module.weight.double().T + b + 2.5 * x.double() @ A.double().T @ B.double().T
    exact = (expected, *torch.autograd.grad(expected, inputs, gradient.double()))
    for one, other, like in zip(result, exact, [found, *inputs], strict=True):
        assert one.dtype == like.dtype
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("frozen", [(), ("a",), ("a", "b")])
def test_numbers_and_tensors_as_coefficients_are_the_same(frozen):
    """Plain numbers take the quick way while a member trains, tensors the general one: values and gradients agree."""
    model = make_tiny_model()
    bank = mounted(model, *frozen)
    member = TrainableMember({PATH: (torch.randn(48, 2), torch.randn(2, 32))}, 1.5)
    bank.mount_trainable("new", member)
    found = []
    for weight in (0.7, torch.tensor(0.7, requires_grad=True)):
        with bank.using({**dict.fromkeys(frozen, 0.4), "new": weight}):
            out = model(IDS).logits
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), (member.A[0], member.B[0]))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_rounds_the_same_with_and_without_a_member_that_trains(dtype):
    """Else the reference of a preference is not what its policy starts at, and the stage would be stopped."""
    model = make_tiny_model(hidden_size=128).to(dtype)
    bank = mounted(model, "a", "b")
    factors = {path: (torch.zeros(layer.frozen["a"].shape[0], 2), torch.randn(2, layer.frozen["a"].shape[1]))
               for path, layer in bank.layers().items()}  # fmt: skip
    bank.mount_trainable("new", TrainableMember(factors, 1.0))
    ids = torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(0))
    with bank.using({"a": 0.7, "b": 0.4}):
        without = logits(model, ids)
    with bank.using({"a": 0.7, "b": 0.4, "new": 1.0}):
        beside = logits(model, ids)
    assert torch.equal(without, beside)
