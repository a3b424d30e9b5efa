"""Gates whose members a registry holds: pinned by their digests, whatever they are called there and aliases lead to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.gates_world import World, coefficients, gate_of, texts_of, write_adapters
from tests.serve.registry_world import until, write

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.fingerprint import fingerprint
from lorchestra.cli import serve_gates
from lorchestra.errors import AdapterError, UserError
from lorchestra.events import SILENT
from lorchestra.gate import store
from lorchestra.gate.features import features
from lorchestra.registry.access import Key, Keys, hashed
from lorchestra.registry.registry import Registry
from lorchestra.registry.snapshot import Snapshot
from lorchestra.serve.adapter_files import served
from lorchestra.serve.choosing import Choosing
from lorchestra.serve.config import ServeConfig
from lorchestra.serve.routing import Router
from lorchestra.serve.versions import Versions, View

PROMPT = "A question about nothing."
RIGHTS = {
    "whole": ["a", "legal", "ward", "c"],
    "own": ["a", "c"],
    "named": ["a", "b", "c"],  # b is what the gate calls it, and nothing of the registry
    "ward": ["ward"],
    "copy": ["copy"],
}
KEYS = Keys(tuple(Key(name=name, sha256=hashed(name), adapters=list(own)) for name, own in RIGHTS.items()))


@pytest.fixture
def made(tiny_dir, tmp_path):
    """A gate over a, b and c; in the registry a is behind its production, b is legal and ward, and c is not."""
    base = fingerprint(tiny_dir, "tiny")
    directories = {name: write(tmp_path / name, seed, base, 0.3) for seed, name in enumerate("abc")}
    gate = gate_of(directories, base=base, temperature=8.0)  # everybody has a part
    with Registry.open(str(tmp_path / "registry"), create=True, actor="tester") as registry:
        registry.push(directories["a"], "a")
        registry.push(write(tmp_path / "newer", 9, base), "a", alias="production")
        registry.push(directories["a"], "copy")
        registry.push(directories["b"], "legal")
        registry.push(directories["b"], "ward")
        versions = Versions(Registry.open(str(tmp_path / "registry")), base, tmp_path / "cache")
        versions.view = View(Snapshot.read(versions.registry.catalog))
        yield SimpleNamespace(
            base=base, directories=directories, gate=gate, registry=registry, versions=versions, place=tmp_path,
            only_c={"c": directories["c"]},
        )  # fmt: skip
        versions.registry.close()


@pytest.fixture
def world(tiny_dir, made):
    with World(tiny_dir, made.only_c, {"triage": made.gate}, keys=KEYS, versions=made.versions) as world:
        yield world


def told_of(world, key="whole"):
    answer = world.ask("triage", PROMPT, key=key)
    if answer.status_code == 409:  # revoked while it answered
        return {}
    assert answer.status_code == 200, answer.text
    return coefficients(answer.headers["x-lorchestra-coefficients"])


def expected(made, allowed=(True, True, True)):
    ids = make_tiny_tokenizer()(PROMPT)["input_ids"]
    x = features(make_tiny_model(), [ids], made.gate.spec.features)
    return made.gate.coefficients(x, torch.tensor(allowed))[0].tolist()


def test_the_answer_is_that_of_the_pinned_versions_merged(world, made):
    answer = world.ask("triage", PROMPT, tokens=0, echo=True, logprobs=1)
    told = coefficients(answer.headers["x-lorchestra-coefficients"])
    assert told == pytest.approx(dict(zip(("a", "legal@v1", "c"), expected(made), strict=True)), abs=5e-5)
    assert answer.headers["x-lorchestra-model"].startswith(f"a@v1={told['a']!r}+legal@v1=")
    assert {line.get("version") for line in world.lines[-1]["adapters"]} == {"a@v1", "legal@v1", None}
    model = make_tiny_model().double()
    for member, c in zip("abc", told.values(), strict=True):
        for path, update in Adapter.load(made.directories[member]).modules.items():
            model.get_submodule(path).weight.data += c * (update.B.double() @ update.A.double())
    ids = make_tiny_tokenizer()(PROMPT)["input_ids"]
    with torch.no_grad():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)[:-1]
    found = torch.tensor(answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]).double()
    torch.testing.assert_close(found, wanted.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], rtol=0, atol=1e-4)
    assert world.models()["triage"]["chooses"] == ["a", "legal@v1", "c"]


def test_aliases_that_move_and_versions_that_come_change_nothing(world, made):
    before = world.said("triage", PROMPT, tokens=12)
    made.registry.push(write(made.place / "newest", 11, made.base), "legal", alias="production")
    made.registry.promote("a@v1")
    until(lambda: world.ask("legal", key="whole").headers["x-lorchestra-model"] == "legal@v2")
    assert world.said("triage", PROMPT, tokens=12) == before


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("own", {"a": 0, "c": 2}),
        ("named", {"a": 0, "c": 2}),
        ("ward", {"ward@v1": 1}),
    ],
)
def test_a_key_needs_the_name_that_the_registry_has(world, made, key, names):
    allowed = [k in names.values() for k in range(3)]
    wanted = {name: expected(made, allowed)[k] for name, k in names.items()}
    assert told_of(world, key) == pytest.approx(wanted, abs=5e-5)
    answer = world.ask("triage", PROMPT, key=key)
    assert "nearest" not in answer.json()["lorchestra"]
    assert world.models(key)["triage"]["chooses"] == list(names)


def test_who_may_use_every_member_is_told_of_the_nearest_prompts(world):
    assert len(world.said("triage", PROMPT)[2]["nearest"]) == 3


def test_a_copy_under_another_name_is_no_way_around_the_members_own(world):
    """a is a@v1, which this key may not use: that the same weights are there as copy@v1 does not matter."""
    assert world.refused("triage", key="copy")[0] == 404


def test_what_is_revoked_is_no_candidate_and_no_copy_of_it_takes_its_place(world, made):
    assert set(told_of(world)) == {"a", "legal@v1", "c"}
    made.registry.revoke("a@v1", why="leaks")
    until(lambda: set(told_of(world)) == {"legal@v1", "c"})
    assert world.ask("triage", PROMPT, key="own").headers["x-lorchestra-coefficients"] == "c=1.0"
    # Nobody calls b so in the registry; another name that has it still does.
    made.registry.revoke("legal@v1", why="leaks")
    until(lambda: set(told_of(world)) == {"ward@v1", "c"})
    made.registry.revoke("ward@v1", why="leaks")
    until(lambda: told_of(world) == {"c": 1.0})
    assert told_of(world, "own") == {"c": 1.0}
    assert world.refused("triage", key="ward")[0] == 404


def test_a_member_that_is_nowhere_or_has_other_weights_is_refused_at_the_start(made):
    def chosen(*local):
        return Choosing(Router("base", local, versions=made.versions), None, {"triage": made.gate})

    with pytest.raises(UserError, match=r"'c' with digest .* not here and not in the registry; serve that adapter as"):
        chosen()
    assert chosen(served("c", made.directories["c"])).has("triage")
    made.registry.push(made.directories["b"], "c")
    made.versions.view = View(Snapshot.read(made.versions.registry.catalog))
    with pytest.raises(UserError, match="'c' with digest"):
        chosen()
    # A name that the server has for something else is no name of the registry's.
    with pytest.raises(UserError, match="'b' with digest"):
        chosen(*(served(name, made.directories["c"]) for name in ("c", "legal", "ward")))


def test_adapters_in_the_gates_directory_give_way_to_the_registrys(made, tiny_dir):
    """What is revoked in the registry would go on from there."""
    place = store.save(made.gate, made.place / "gate")
    for name, directory in made.directories.items():
        Adapter.load(directory).save(place / "adapters" / name)
    config = ServeConfig(base=str(tiny_dir), gates={"triage": str(place)})
    found = serve_gates.gates(config, SILENT)
    made.registry.revoke("ward@v1", why="leaks")
    made.registry.revoke("legal@v1", why="leaks")
    made.versions.view = View(Snapshot.read(made.versions.registry.catalog))
    places = {}
    serve_gates.add_members(config, found, places, made.versions)
    assert places == {"c": place / "adapters" / "c"}


def test_the_gate_above_auto_knows_its_members_by_their_weights(tiny_dir, tmp_path):
    base = fingerprint(tiny_dir, "tiny")
    directories = write_adapters(tmp_path, prompted=True)
    gate = gate_of(directories, base=base)
    with Registry.open(str(tmp_path / "registry"), create=True, actor="tester") as registry:
        for name, directory in directories.items():
            registry.push(directory, f"ward-{name}")
        versions = Versions(Registry.open(str(tmp_path / "registry")), base, tmp_path / "cache")
        versions.view = View(Snapshot.read(versions.registry.catalog))
        keys = Keys((Key(name="whole", sha256=hashed("whole"), adapters="all"),))
        with World(tiny_dir, {}, {"triage": gate}, 1, keys, above="triage", versions=versions) as world:
            until(lambda: len(world.models()["auto"]["chooses"]) == 3)
            told = world.said("auto", texts_of("a", 1, 7)[0], chat=True)[1]
        versions.registry.close()
    assert set(told) == {"ward-a@v1", "ward-b@v1", "ward-c@v1"}  # the gate's softmax, not the router's one adapter


def test_a_gate_is_not_pushed_and_what_to_do_is_said(made):
    place = store.save(made.gate, made.place / "gate")
    with pytest.raises(AdapterError, match=r"is a gate, and a registry keeps adapters: .* --gate NAME="):
        made.registry.push(place, "triage")
