"""Gates by groups of layers: the answer is that of the model with every layer merged at its own coefficients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.gates_world import BASE, NAMES, World, coefficients, gate_of, ids_of, mixture, write_adapters

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.errors import UserError
from lorchestra.fusion.groups import layer_of
from lorchestra.gate import store
from lorchestra.gate.features import FeatureSpec, features
from lorchestra.serve.choosing import read_gate

GROUPS = ("layers.0", "layers.1")
PROMPTS = ("hello there", "42", "什么是高血压？", "A fairly long question, about nothing.")
SEEN = 5e-5  # of a coefficient: rounding of features in another forward pass, and to six digits
SETTINGS = {
    "parts": {"seed": 0},
    "few": {"seed": 1, "top_k": 1, "none": True, "spec": FeatureSpec(1)},
    "open": {"seed": 3, "activation": "sigmoid", "hidden": 8},
    "line": {"seed": 4, "activation": "linear", "top_k": 2},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def gates(directories):
    return {name: gate_of(directories, name, groups=GROUPS, **settings) for name, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def world(tiny_dir, directories, gates):
    with World(tiny_dir, directories, gates) as made:
        yield made


def by_layers(header):
    """``layers.0:a=0.3,b=0.7;layers.1:none``, group by group; one for all if there is but one."""
    if not header.startswith("layers."):
        return dict.fromkeys(GROUPS, coefficients(header))
    return {group: coefficients(found) for group, found in (part.split(":") for part in header.split(";"))}


def wanted(gate, ids, allowed=None):
    """Its coefficients by the transformers model, alone: group → member → coefficient."""
    x = features(make_tiny_model(), [ids], gate.spec.features)
    found = gate.coefficients(x, None if allowed is None else torch.tensor(allowed))[0].tolist()
    return {
        group: {name: c for name, c in zip(gate.members, row, strict=True) if round(c, 6)}
        for group, row in zip(gate.spec.groups, found, strict=True)
    }


def merged(directories, layers):
    """The model with each layer merged at its coefficients, in float64."""
    model = make_tiny_model().double()
    for name, directory in directories.items():
        for path, update in Adapter.load(directory).modules.items():
            c = layers[f"layers.{layer_of(path)}"].get(name, 0.0)
            model.get_submodule(path).weight.data += c * (update.B.double() @ update.A.double())
    return model


def logprobs(model, ids):
    """``[L - 1]``, of each token after those before it."""
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return found[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_logits_are_those_of_the_model_merged_layer_by_layer_and_of_the_bank(world, directories, gates, name):
    gate, different = gates[name], 0
    bank = Bank(make_tiny_model())
    for member, directory in directories.items():
        bank.load(member, directory)
    groups = gate.spec.group_of(list(bank.layers()))
    for prompt in PROMPTS:
        ids = make_tiny_tokenizer()(prompt)["input_ids"]
        answer = world.ask(name, prompt, tokens=0, echo=True, logprobs=1)
        layers = by_layers(answer.headers["x-lorchestra-coefficients"])
        assert list(layers) == list(GROUPS)
        for group, found in wanted(gate, ids).items():
            assert layers[group] == pytest.approx(found, abs=SEEN)
        found = torch.tensor(answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:])
        torch.testing.assert_close(found.double(), logprobs(merged(directories, layers), ids), rtol=0, atol=1e-4)
        rows = torch.tensor([[[layers[group].get(member, 0.0) for member in gate.members] for group in GROUPS]])
        with bank.using_tensor(gate.members, rows, groups):
            torch.testing.assert_close(found.double(), logprobs(bank.model, ids), rtol=0, atol=1e-4)
        # It would not do to mix whole adapters.
        mean = answer.json()["lorchestra"]["coefficients"]
        plain = logprobs(merged(directories, dict.fromkeys(GROUPS, mean)), ids)
        different += (found - plain).abs().max() > 0.01
    assert different


def test_tokens_of_rows_by_layers_are_the_same_in_one_batch_with_others(world, directories):
    asked = [
        (model, prompt) for prompt in PROMPTS[:2] for model in ("parts", "a", "few", "a=0.3+b=0.5", "base", "line")
    ]
    alone = [world.ask(model, prompt, tokens=20) for model, prompt in asked]
    with ThreadPoolExecutor(len(asked)) as many:
        together = list(many.map(lambda one: world.ask(*one, tokens=20), asked))
    for one, other in zip(alone, together, strict=True):
        assert other.json()["choices"] == one.json()["choices"]
    answer = world.ask("parts", "which?", tokens=8)
    model = merged(directories, by_layers(answer.headers["x-lorchestra-coefficients"]))
    ids = made = make_tiny_tokenizer()("which?")["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            made = [*made, int(model(torch.tensor([made])).logits[0, -1].argmax())]
    assert answer.json()["choices"][0]["text"] == make_tiny_tokenizer().decode(made[len(ids) :])


def test_what_is_told_agrees_in_header_body_and_log(world):
    answer = world.ask("parts", chat=True)
    told, field = by_layers(answer.headers["x-lorchestra-coefficients"]), answer.json()["lorchestra"]
    assert field["layers"] == told
    names = field["coefficients"]
    assert names == pytest.approx({n: sum(told[g].get(n, 0.0) for g in GROUPS) / 2 for n in names}, abs=1e-6)
    assert answer.headers["x-lorchestra-model"] == ";".join(f"{g}:{mixture(told[g])}" for g in GROUPS)
    adapters = {one["adapter"]: one for one in world.lines[-1]["adapters"]}
    assert {n: one["coefficient"] for n, one in adapters.items()} == names
    assert {n: one["layers"] for n, one in adapters.items()} == {
        n: {g: told[g].get(n, 0.0) for g in GROUPS} for n in names
    }


def test_of_top_k_a_group_has_its_own_and_who_is_in_none_is_not_there(world, monkeypatch):
    given, split, left_out = [], 0, 0
    real = world.engine._tokens.generate
    monkeypatch.setattr(world.engine._tokens, "generate", lambda one: given.append(one) or real(one))
    for number in range(40):
        told = by_layers(world.ask("few", f"{number} {'x' * number}", tokens=1).headers["x-lorchestra-coefficients"])
        assert all(len(found) <= 1 for found in told.values())
        acting = {name for found in told.values() for name in found}
        assert {adapter.name for adapter, _ in given[-1].members} == acting
        split += len(acting) == 2
        left_out += len(acting) < 2
        # Where the groups agree it is a plain mixture.
        assert bool(given[-1].layers) == (told[GROUPS[0]] != told[GROUPS[1]])
    assert split
    assert left_out


@pytest.mark.parametrize(("key", "own"), [("part", "ab"), ("rival", "c")])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_key_may_not_use_is_nothing_in_every_group(world, gates, name, key, own):
    allowed = [member in own for member in NAMES]
    for prompt in PROMPTS:
        answer = world.ask(name, prompt, key=key, chat=True)
        told = by_layers(answer.headers["x-lorchestra-coefficients"])
        for group, found in wanted(gates[name], ids_of(prompt), allowed).items():
            assert set(told[group]) <= set(own)
            assert told[group] == pytest.approx(found, abs=SEEN)
        assert {line["adapter"] for line in world.lines[-1]["adapters"]} <= set(own)
    assert world.refused(name, key="bare")[0] == 404


def test_the_engine_in_its_own_process_computes_the_same(tiny_dir, directories, gates, world):
    with World(tiny_dir, directories, gates, apart=True) as other:
        for name in SETTINGS:
            assert other.said_raw(name) == world.said_raw(name)


def test_the_gate_above_auto_may_be_one_by_layers(tiny_dir, tmp_path):
    directories = write_adapters(tmp_path, prompted=True)
    gate = gate_of(directories, "parts", groups=GROUPS)
    with World(tiny_dir, directories, {"parts": gate}, 1, above="parts") as world:
        answer = world.ask("auto", "012 345 678 901 234 567 890", chat=True)
        told = by_layers(answer.headers["x-lorchestra-coefficients"])
        for group, found in wanted(gate, ids_of("012 345 678 901 234 567 890")).items():
            assert told[group] == pytest.approx(found, abs=SEEN)


def test_more_adapters_than_may_be_mixed_are_counted_over_all_groups(tmp_path, directories):
    place = store.save(gate_of(directories, top_k=1, groups=GROUPS), tmp_path / "gate")
    assert read_gate("triage", place, BASE, 2).spec.groups == GROUPS
    with pytest.raises(UserError, match=r"up to 2 adapters for an answer \(1 in each of 2 groups .* fewer --groups"):
        read_gate("triage", place, BASE, 1)


def test_groups_that_leave_out_a_layer_of_a_member_are_an_error_and_no_answer(tiny_dir, directories):
    with World(tiny_dir, directories, {"half": gate_of(directories, "half", groups=("layers.0", "other"))}) as world:
        status, said = world.refused("half")
        assert status == 400
        assert "changes module 'model.layers.1." in said
        assert world.ask("a").status_code == 200
