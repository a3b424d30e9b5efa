"""Coefficients: sums, top-k, the base as a member, permissions; against plain float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gate.scenes import BASE, make_gate, prompts_of

from lorchestra.errors import AdapterError, UserError
from lorchestra.gate.loads import loads
from lorchestra.gate.network import AdapterId, Gate, GateSpec, Known
from lorchestra.gate.warm import set_static

X = prompts_of(6)


def logits(gate, x):
    """The network in float64, by hand."""
    z = (x.double() - gate.mean.double()) / gate.std.double()
    if gate.first is not None:
        z = z @ gate.first.weight.double().T + gate.first.bias.double()
        z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    z = z @ gate.last.weight.double().T + gate.last.bias.double()
    return z.view(len(x), max(1, len(gate.spec.groups)), -1) / gate.spec.temperature


def oracle(gate, x, allowed=None):
    """Row by row, in plain Python."""
    spec, K = gate.spec, len(gate.members)
    out = []
    for b, row in enumerate(logits(gate, x).tolist()):
        groups = []
        for values in row:
            names = [k for k in range(K) if allowed is None or allowed[b][k]]
            names += [K] * spec.none
            size = abs if spec.activation == "linear" else float
            if spec.top_k is not None:
                names = sorted(names, key=lambda k: -size(values[k]))[: spec.top_k]
            if spec.activation == "softmax":
                total = sum(math.exp(values[k]) for k in names)
                found = {k: math.exp(values[k]) / total for k in names}
            elif spec.activation == "sigmoid":
                found = {k: 1 / (1 + math.exp(-values[k])) for k in names}
            else:
                found = {k: values[k] for k in names}
            groups.append([found.get(k, 0.0) for k in range(K)])
        out.append(groups)
    found = torch.tensor(out)
    return found if spec.groups else found[:, 0]


KINDS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(["softmax", "sigmoid", "linear"]),
        "groups": st.sampled_from([(), ("layers.0", "layers.1")]),
        "top_k": st.sampled_from([None, 1, 2, 3]),
        "none": st.booleans(),
        "temperature": st.sampled_from([1.0, 0.5, 3.0]),
        "hidden": st.sampled_from([0, 5]),
    }
).map(
    lambda kind: kind | {"none": kind["none"] and kind["activation"] == "softmax"}
    | ({"temperature": 1.0} if kind["activation"] == "linear" else {})
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=KINDS, allowed=st.none() | st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=6, max_size=6)
)
def test_coefficients_are_those_of_plain_formulas(kind, allowed):
    gate = make_gate(**kind)
    mask = None if allowed is None else torch.tensor(allowed)
    with torch.no_grad():
        found = gate.coefficients(X, mask)
    torch.testing.assert_close(found, oracle(gate, X, allowed), rtol=1e-4, atol=1e-5)
    assert found.isfinite().all()
    if mask is not None:
        closed = ~mask if found.ndim == 2 else ~mask[:, None].expand_as(found)
        assert (found[closed] == 0).all(), "what is not allowed does not act at all"
    if kind["top_k"]:
        assert ((found != 0).sum(dim=-1) <= kind["top_k"]).all()
    if kind["activation"] == "softmax":
        sums = found.sum(dim=-1)
        assert (sums < 1 + 1e-5).all()
        if not kind["none"] and mask is None:
            torch.testing.assert_close(sums, torch.ones_like(sums))


def test_without_top_k_they_are_those_of_all_members():
    gate = make_gate(top_k=1)
    assert ((gate.coefficients(X) != 0).sum(dim=1) == 1).all()
    assert (gate.coefficients(X, top_k=False) > 0).all()


def test_where_the_base_is_first_nobody_acts():
    gate = make_gate(top_k=1, none=True)
    with torch.no_grad():
        gate.last.bias[-1] = 100.0
    assert (gate.coefficients(X) == 0).all()
    assert gate.named_coefficients(X) == [{}] * len(X)


def test_of_equal_members_the_first_acts():
    gate = make_gate(weights=False, top_k=2)
    assert gate.coefficients(X).tolist() == [[0.5, 0.5, 0.0]] * len(X)


def test_a_new_gate_gives_all_members_the_same():
    for activation, each in (("softmax", 1 / 3), ("sigmoid", 0.5), ("linear", 1 / 3)):
        gate = make_gate(weights=False, activation=activation, hidden=4)
        torch.testing.assert_close(gate.coefficients(X), torch.full((6, 3), each))


def test_permissions_of_one_key_hold_for_all_rows():
    gate = make_gate()
    allowed = torch.tensor([True, False, True])
    found = gate.coefficients(X, allowed)
    assert (found[:, 1] == 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))
    assert (gate.coefficients(X, torch.zeros(3, dtype=torch.bool)) == 0).all(), "none is left: the base"


@pytest.mark.parametrize("kind", [{}, {"none": True, "top_k": 2}, {"activation": "sigmoid", "hidden": 3}], ids=str)
def test_gradients_by_weights_are_those_of_finite_differences(kind):
    gate = make_gate(**kind).double()
    gate.mean, gate.std = gate.mean.double(), gate.std.double()
    weight, x = gate.last.weight.detach().clone().requires_grad_(), X.double()

    def found(w):
        return torch.func.functional_call(gate, {"last.weight": w}, (x,))

    assert torch.autograd.gradcheck(found, weight)
    allowed = torch.tensor([True, True, False])
    total = gate.coefficients(x, allowed)[:, 0].sum()
    total.backward()
    assert gate.last.weight.grad.isfinite().all()
    assert gate.last.weight.grad.abs().sum() > 0


def test_masked_rows_without_any_member_have_finite_gradients():
    gate = make_gate()
    gate.coefficients(X, torch.zeros(3, dtype=torch.bool)).sum().backward()
    assert gate.last.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("activation", "none", "weights", "expected"),
    [
        ("softmax", False, [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        ("softmax", False, [1.0, 0.6, 0.4], [0.5, 0.3, 0.2]),
        ("softmax", True, [0.4, 0.3, 0.1], [0.4, 0.3, 0.1]),
        ("sigmoid", False, [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]),
        ("linear", False, [1.5, 0.0, -0.5], [1.5, 0.0, -0.5]),
    ],
)
@pytest.mark.parametrize("groups", [(), ("layers.0", "layers.1")])
def test_static_weights_as_a_gate(activation, none, weights, expected, groups):
    gate = set_static(make_gate(activation=activation, none=none, groups=groups), torch.tensor(weights))
    wanted = torch.tensor(expected).expand(gate.coefficients(X).shape)
    torch.testing.assert_close(gate.coefficients(X), wanted, rtol=1e-4, atol=1e-5)


def test_explanations_are_the_likest_training_prompts():
    gate = make_gate()
    seen = prompts_of(40, seed=3)
    assert gate.explain(X) == [()] * 6, "a gate that remembers nothing explains nothing"
    gate.remember(seen, [Known(f"sha256:{i}", f"domain {i % 3}") for i in range(40)])
    assert gate.memory.vectors.dtype == torch.float16
    unit = torch.nn.functional.normalize((seen.double() - gate.mean) / gate.std, dim=1)
    ours = torch.nn.functional.normalize((X.double() - gate.mean) / gate.std, dim=1)
    likeness = ours @ unit.T
    for row, nearest in enumerate(gate.explain(X, 4)):
        assert [n.index for n in nearest] == likeness[row].topk(4).indices.tolist()
        assert [n.similarity for n in nearest] == pytest.approx(likeness[row].topk(4).values.tolist(), abs=2e-3)
        assert all(n.known == Known(f"sha256:{n.index}", f"domain {n.index % 3}") for n in nearest)
    assert len(gate.explain(X, 100)[0]) == 40
    with pytest.raises(UserError, match="remembers 2 prompts by 40 vectors"):
        gate.remember(seen, [Known("x"), Known("y")])


def test_a_digest_is_of_everything_that_makes_coefficients():
    one = make_gate()
    assert make_gate().digest == one.digest
    assert make_gate(top_k=1).digest != one.digest
    before = one.digest
    with torch.no_grad():
        one.last.bias[0] += 1e-3
    assert one.digest != before


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 7), torch.zeros(8), torch.full((1, 8), torch.nan)], ids=["7", "1d", "nan"]
)
def test_other_features_are_refused(x):
    with pytest.raises(UserError, match="features"):
        make_gate().coefficients(x)


def test_modules_find_their_group():
    spec = make_gate(groups=("layers.0-1", "layers.2", "other")).spec
    paths = ["model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "lm_head"]
    assert spec.group_of(paths) == dict(zip(paths, range(3), strict=True))
    assert make_gate().spec.group_of(paths) is None
    with pytest.raises(AdapterError, match=r"layers\.3\.q_proj' is in none of gate 'chooser'"):
        spec.group_of(["model.layers.3.q_proj"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": ""}, "name is empty"),
        ({"name": "auto"}, "reserved"),
        ({"name": "../x"}, "no name for an adapter"),
        ({"adapters": ()}, "1 to 4096 members"),
        ({"adapters": (AdapterId("a", "1"), AdapterId("a", "2"))}, "different names"),
        ({"adapters": (AdapterId("a=1", "1"),)}, "no name for a gate's member"),
        ({"adapters": (AdapterId("a\n", "1"),)}, "no name for a gate's member"),
        ({"adapters": (AdapterId("a", ""),)}, "has no digest"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown; there are softmax"),
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"activation": "linear", "none": True}, "none belongs to softmax"),
        ({"activation": "linear", "temperature": 2.0}, "temperature belongs"),
        ({"hidden": -1}, "hidden is -1"),
        ({"groups": ("layers.0", "layers.0")}, "named twice"),
        ({"groups": ("layers.0", "x\r\ny: z")}, "is no group of layers"),
    ],
)
def test_a_specification_that_makes_no_sense_is_refused(changed, message):
    good = {"name": "g", "adapters": (AdapterId("a", "1"), AdapterId("b", "2")), "base": BASE}
    with pytest.raises(UserError, match=message):
        GateSpec(**good | changed)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (torch.zeros(3), torch.ones(4)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.full((3,), torch.inf), torch.ones(3)),
        (torch.zeros(3), torch.full((3,), torch.nan)),
        (torch.zeros(1, 3), torch.ones(1, 3)),
    ],
    ids=["lengths", "zero", "infinite", "nan", "axes"],
)
def test_a_standardisation_that_makes_no_sense_is_refused(mean, std):
    with pytest.raises(UserError, match="standardised"):
        Gate(make_gate().spec, mean, std)


# What it gives to whom


def of(rows, domains, best=None, **kind):
    gate = make_gate(members=("a", "b"), **kind)
    return loads(gate.spec, domains, torch.tensor(rows), best or {"x": "a", "y": "b"})


def test_a_gate_that_routes():
    found = of([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]], ["x", "x", "y"])
    assert found.kind == "routes"
    assert found.coefficients["x"] == pytest.approx({"a": 0.85, "b": 0.15}, abs=1e-6)
    assert found.shares["y"] == pytest.approx({"a": 0.1, "b": 0.9, "base": 0.0}, abs=1e-6)
    assert 0.9 < found.entropy <= 1
    assert "'x': 'a' 85%" in found.sentence


def test_one_member_everywhere_is_a_collapse():
    found = of([[0.99, 0.01], [0.97, 0.03]], ["x", "y"])
    assert found.kind == "collapsed"
    assert found.entropy < 0.2
    assert "'a' has 97% or more" in found.sentence
    assert "raise the balance term" in found.sentence
    assert "use it alone" in of([[0.99, 0.01], [0.97, 0.03]], ["x", "y"], {"x": "a", "y": "a"}).sentence


@pytest.mark.parametrize(("kind", "row"), [({"activation": "sigmoid"}, 0.001), ({"none": True}, 0.01)], ids=str)
def test_the_base_everywhere_is_a_collapse_too(kind, row):
    found = of([[row, row], [row, row]], ["x", "y"], **kind)
    assert found.kind == "collapsed"
    assert "'base' has" in found.sentence


def test_the_same_for_all_domains_is_static_and_one_domain_says_nothing():
    assert of([[0.6, 0.4], [0.62, 0.38]], ["x", "y"]).kind == "static"
    assert of([[0.99, 0.01]], ["x"], {"x": "a"}).kind == "routes"


def test_a_gate_without_any_weight_is_counted_as_the_base():
    found = of([[0.0, 0.0], [1.0, 0.0]], ["x", "y"], top_k=1)
    assert found.shares["x"] == {"a": 0.0, "b": 0.0, "base": 1.0}
