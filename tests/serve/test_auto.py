"""``model: auto``: the adapter that a prompt is for, of those that its key may use; nobody, where it is for none."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.serve import registry_world
from tests.serve.gates_world import KINDS, NAMES, World, gate_of, ids_of, mixture, texts_of, write_adapters
from tests.serve.registry_world import until

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import UserError
from lorchestra.gate import prototypes
from lorchestra.gate.features import features
from lorchestra.registry.access import Key, Keys, hashed
from lorchestra.registry.registry import Registry
from lorchestra.serve.auto import Auto, input_norm
from lorchestra.serve.choosing import Choosing


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"), prompted=True)


@pytest.fixture(scope="module")
def world(tiny_dir, directories):
    with World(tiny_dir, directories, auto=1) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_goes_to_the_adapter_that_was_trained_on_its_like_and_is_answered_by_it(world, name):
    for prompt in texts_of(name, 6, seed=1):
        choices, told, field = world.said("auto", prompt, chat=True, logprobs=True)
        assert told == {name: 1.0}
        assert field == {"gate": "auto", "coefficients": {name: 1.0}}
        assert choices == world.said(name, prompt, chat=True, logprobs=True)[0]
        assert choices == world.said(mixture(told), prompt, chat=True, logprobs=True)[0]


@pytest.mark.parametrize(("key", "own"), [("whole", "abc"), ("part", "ab"), ("rival", "c"), ("bare", "")])
def test_a_key_never_gets_what_it_may_not_use_whatever_the_prompt(world, key, own):
    foreign = [
        "Как дела? Что это такое?",
        "これは日本語の文章です。",
        "שלום עולם",
        "hello there",
        "\x00\x01\x02",
        "🙂" * 9,
    ]
    for prompt in [text for kind in KINDS for text in texts_of(kind, 4, seed=2)] + foreign:
        answer = world.ask("auto", prompt, key=key, chat=True)
        assert answer.status_code == 200
        told = answer.json()["lorchestra"]["coefficients"]
        assert set(told) <= set(own)
        assert answer.headers["x-lorchestra-coefficients"] == (next(iter(told)) + "=1.0" if told else "none")
        assert answer.headers.get("x-lorchestra-model", "") == next(iter(told), "")
        assert {line["adapter"] for line in world.lines[-1]["adapters"]} == set(told)


def test_what_others_have_changes_nothing_for_a_key(tiny_dir, directories):
    prompts = [text for kind in KINDS for text in texts_of(kind, 3, seed=3)]
    own = {name: directories[name] for name in "ab"}
    with World(tiny_dir, directories, auto=3) as many, World(tiny_dir, own, auto=3) as few:
        for prompt in prompts:
            one, other = (w.ask("auto", prompt, key="part", chat=True) for w in (many, few))
            assert one.json()["choices"] == other.json()["choices"]
            assert one.json()["lorchestra"] == other.json()["lorchestra"]
            assert one.headers["x-lorchestra-coefficients"] == other.headers["x-lorchestra-coefficients"]
        assert many.models("part") == {name: card | {"created": many.models("part")[name]["created"]}
                                       for name, card in few.models("part").items()}  # fmt: skip


def test_prompts_in_unseen_languages_and_blank_ones_are_the_bases(world):
    for prompt in ("Как дела? Что это такое?", "שלום עולם, מה שלומך?", "", "  \n"):
        choices, told, _ = world.said("auto", prompt, chat=True)
        assert told == {}
        assert choices == world.said("base", prompt, chat=True)[0]


def test_auto_is_listed_with_what_a_key_may_use_and_is_no_adapters_name(world):
    assert world.models()["auto"]["chooses"] == ["a", "b", "c"]
    assert world.models("part")["auto"]["chooses"] == ["a", "b"]
    assert world.models("bare")["auto"]["chooses"] == []
    assert world.refused("auto=0.5+a=0.5")[0] == 400


def test_there_is_no_auto_unless_it_is_asked_for(tiny_dir, directories):
    with World(tiny_dir, directories) as world:
        assert world.refused("auto")[0] == 404
        assert "auto" not in world.models()


def test_an_adapter_that_is_loaded_joins_and_one_that_is_unloaded_leaves(tiny_dir, directories):
    with World(tiny_dir, {"a": directories["a"]}, auto=1) as world:
        prompt = texts_of("b", 1, seed=4)[0]
        assert world.said("auto", prompt, chat=True)[1] == {}
        world.router.add(world_served("b", directories))
        assert world.said("auto", prompt, chat=True)[1] == {"b": 1.0}
        auth = {"authorization": "Bearer ops"}
        world.client.post("/v1/unload_lora_adapter", json={"lora_name": "b"}, headers=auth)
        assert world.said("auto", prompt, chat=True)[1] == {}


def world_served(name, directories):
    from lorchestra.serve.adapter_files import served

    return served(name, directories[name])


def test_damaged_prototypes_are_told_of_and_never_used(tiny_dir, tmp_path, caplog):
    directories = write_adapters(tmp_path, prompted=True)
    (directories["a"] / prototypes.FILE).write_bytes(b"\x80\x04damaged")
    stolen = (directories["c"] / prototypes.FILE).read_bytes()
    (directories["b"] / prototypes.FILE).write_bytes(stolen)  # of another adapter
    with World(tiny_dir, directories, auto=1) as world:
        assert world.said("auto", texts_of("a", 1, seed=5)[0], chat=True)[1] != {"a": 1.0}
        assert world.said("auto", texts_of("c", 1, seed=5)[0], chat=True)[1] == {"c": 1.0}
    assert "prototypes are not used" in caplog.text
    assert "is of the adapter" in caplog.text


def test_the_norm_is_read_from_the_base(tiny_dir, tmp_path):
    weight = make_tiny_model().model.layers[1].input_layernorm.weight
    assert torch.equal(input_norm(tiny_dir, 1, 32), weight)
    assert torch.equal(input_norm(tmp_path, 1, 32), torch.ones(32))
    assert torch.equal(input_norm(tiny_dir, 1, 31), torch.ones(31))


class Following:
    """A gateway on a registry whose engine sees prompts, with ``auto``."""

    def __init__(self, url, place, tiny_dir):
        keys = Keys((
            Key(name="acme", sha256=hashed("acme"), adapters=["clinic", "law"]),
            Key(name="ops", sha256=hashed("ops"), role="operator", adapters="all"),
        ))  # fmt: skip
        self.gateway = registry_world.Gateway(url, place, keys=keys)
        model = make_tiny_model()

        async def see(body, layers, last):
            ids = ids_of(body.messages[-1].content) if hasattr(body, "messages") else ids_of(body.prompt)
            return features(model, [ids], prototypes.FEATURES)[0].tolist()

        self.gateway.engine.features = see
        auto = Auto(self.gateway.engine, tiny_dir, 1)
        self.gateway.gateway._choosing = Choosing(self.gateway.router, self.gateway.engine, {}, auto)

    def by(self, kind, seed=6, key="acme"):
        return self.gateway.by("auto", prompt=texts_of(kind, 1, seed=seed)[0], key=key)


def push(registry, name, place, seed, kind, **more):
    """An adapter of the registry's base, for prompts of a kind."""
    registry_world.write(place, seed)
    x = features(make_tiny_model(), [ids_of(text) for text in texts_of(kind, 40)], prototypes.FEATURES)
    prototypes.save(prototypes.of_prompts(Adapter.load(place), x), place)
    return registry.push(place, name, **more)


def test_adapters_join_when_they_are_pushed_and_leave_at_once_when_they_are_revoked(tmp_path, tiny_dir):
    url = str(tmp_path / "registry")
    registry = Registry.open(url, create=True, actor="tester")
    push(registry, "clinic", tmp_path / "clinic", 1, "a")
    following = Following(url, tmp_path / "cache", tiny_dir)
    try:
        until(lambda: following.by("a") == "clinic@v1")
        assert following.by("b") == "base"
        push(registry, "law", tmp_path / "law", 2, "b")
        until(lambda: following.by("b").startswith("law@"))
        push(registry, "secret", tmp_path / "secret", 3, "c")
        until(lambda: following.by("c", key="ops").startswith("secret@"))
        assert following.by("c") == "base"
        registry.revoke("clinic@v1", "it was wrong")
        until(lambda: not following.by("a").startswith("clinic@"))
        assert following.by("a") == "base"
        assert following.by("b").startswith("law@")
    finally:
        following.gateway.stop()
        registry.close()


def test_many_that_ask_at_once_read_prototypes_once(tiny_dir, directories, monkeypatch):
    reads = []
    real = prototypes.load
    monkeypatch.setattr(prototypes, "load", lambda place, digest: reads.append(place) or real(place, digest))
    with World(tiny_dir, directories, auto=1) as world:
        present = {name: world_served(name, directories) for name in NAMES}

        async def many():
            return await asyncio.gather(*(world.auto.router(present) for _ in range(8)))

        routers = world.client.portal.call(many)
    assert sorted(reads) == sorted(served.directory for served in present.values())
    assert all(router.names == NAMES for router in routers)


def test_a_gate_above_has_the_last_word_where_auto_finds_a_member_of_it(tiny_dir, directories):
    two = {name: directories[name] for name in "ab"}
    with World(tiny_dir, directories, {"pair": gate_of(two, "pair", 5, none=True)}, auto=1, above="pair") as world:
        for name in "ab":
            for prompt in texts_of(name, 3, seed=7):
                choices, told, field = world.said("auto", prompt, chat=True)
                assert told == world.said("pair", prompt, chat=True)[1]
                assert field["gate"] == "auto"
                assert choices == world.said(mixture(told), prompt, chat=True)[0]
        assert world.said("auto", texts_of("c", 1, seed=7)[0], chat=True)[1] == {"c": 1.0}
        assert world.ask("auto", texts_of("c", 1, seed=7)[0], key="part", chat=True).json()["lorchestra"][
            "coefficients"
        ].keys() <= {"a", "b"}
    with pytest.raises(UserError, match="auto_gate is 'other'"):
        Choosing(world.router, world.engine, {}, None, "other")


def test_a_key_that_was_changed_has_what_it_may_use_now(world):
    before = Key(name="acme", sha256=hashed("acme"), adapters=["a", "c"])
    after = Key(name="acme", sha256=hashed("acme"), adapters=["b"])
    assert set(world.router.present(before)) == {"a", "c"}
    assert world.router.present(before) is world.router.present(before)
    assert set(world.router.present(after)) == {"b"}
    assert set(world.router.present(before)) == {"a", "c"}
