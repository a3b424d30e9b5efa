"""``model`` → who answers, and what a key can find out of what is not its own: nothing."""

from __future__ import annotations

import builtins
import os
import shutil
from pathlib import Path

import pytest
from tests.serve.tenants import write_adapter

from lorchestra.errors import AdapterError, UserError
from lorchestra.registry.access import OPEN, Key
from lorchestra.serve.engine import RequestError, Served
from lorchestra.serve.ports import UnknownModelError
from lorchestra.serve.routing import Router

DIGESTS = {name: "sha256:" + char * 64 for name, char in {"general": "1", "clinic": "2", "preference": "3"}.items()}


def key(*adapters: str, role: str = "user") -> Key:
    return Key(name="k", sha256="0" * 64, adapters=list(adapters), role=role)


def adapter(name: str) -> Served:
    return Served(name, DIGESTS.get(name, "sha256:" + "9" * 64), Path("/nowhere"), {"parent": 0.5})


@pytest.fixture
def router():
    aliases = {"chief": "clinic", "clinic@production": "clinic", "team": "general=0.3+clinic=0.7", "gpt": "base/model"}
    return Router("base/model", [adapter(name) for name in DIGESTS], aliases, most_members=3)


def members(target):
    return [(adapter.name, weight) for adapter, weight in target.members]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("base/model", []),
        ("gpt", []),
        ("clinic", [("clinic", 1.0)]),
        ("chief", [("clinic", 1.0)]),
        ("clinic@production", [("clinic", 1.0)]),
        ("clinic@sha256:222222222222", [("clinic", 1.0)]),
        ("team", [("general", 0.3), ("clinic", 0.7)]),
        ("general=0.3+clinic=0.5+preference=-0.2", [("general", 0.3), ("clinic", 0.5), ("preference", -0.2)]),
        ("chief=0.5", [("clinic", 0.5)]),
    ],
)
def test_what_a_model_means(router, model, expected):
    target = router.resolve(OPEN, model)
    assert members(target) == expected
    assert target.asked == model


def test_unknown_and_forbidden_are_the_very_same(router):
    nobody = key()
    for theirs, nowhere in (
        ("clinic", "cliniq"),
        ("chief", "chiew"),
        ("team", "teem"),
        ("clinic@sha256:222222222222", "cliniq@sha256:222222222222"),
        ("clinic=1+general=1", "cliniq=1+general=1"),
    ):
        with pytest.raises(UnknownModelError) as forbidden:
            router.resolve(nobody, theirs)
        with pytest.raises(UnknownModelError) as unknown:
            router.resolve(nobody, nowhere)
        assert str(forbidden.value).replace(theirs, "X") == str(unknown.value).replace(nowhere, "X")


def test_neither_touches_the_disk(router, monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("the disk was touched")

    names = [
        "clinic",
        "../../etc/passwd",
        "/etc/passwd",
        "cliniq",
        "a/b",
        "clinic\0",
        "team",
        "clinic=1+x=1",
        "é" * 500,
    ]
    with monkeypatch.context() as patched:
        for place, name in ((os, "stat"), (os, "open"), (os, "lstat"), (builtins, "open"), (os, "scandir")):
            patched.setattr(place, name, touched)
        outcomes = []
        for name in names:
            for who in (key(), key("clinic")):
                try:
                    outcomes.append(members(router.resolve(who, name)))
                except (UnknownModelError, RequestError) as error:
                    outcomes.append(type(error))
    assert outcomes[1] == [("clinic", 1.0)]
    assert all(outcome is UnknownModelError for outcome in outcomes[2:10])


def test_a_mixture_needs_permission_for_every_member(router):
    model = "general=0.3+clinic=0.5"
    assert members(router.resolve(key("general", "clinic"), model)) == [("general", 0.3), ("clinic", 0.5)]
    for who in (key("general"), key("clinic"), key()):
        with pytest.raises(UnknownModelError):
            router.resolve(who, model)
        with pytest.raises(UnknownModelError):
            router.resolve(who, "team")


def test_mixtures_are_capped_and_bad_ones_explained_whoever_asks(router):
    for who in (key(), OPEN):
        with pytest.raises(RequestError, match="at most 3"):
            router.resolve(who, "a=1+b=1+c=1+d=1")
        with pytest.raises(RequestError, match="no weight") as bad:
            router.resolve(who, "a=1+b")
        assert bad.value.param == "model"


def test_a_list_has_what_the_key_may_use_and_no_trace_of_the_rest(router):
    assert [card.id for card in router.cards(key())] == ["base/model", "gpt"]
    own = router.cards(key("clinic"))
    assert [card.id for card in own] == ["base/model", "clinic", "chief", "clinic@production", "gpt"]
    assert "general" not in str(own)
    cards = {card.id: card for card in router.cards(OPEN)}
    assert cards.keys() == {"base/model", *DIGESTS, "chief", "clinic@production", "team", "gpt"}
    assert cards["clinic"].parents == {"parent": 0.5}
    assert cards["clinic"].digest == cards["chief"].digest == DIGESTS["clinic"]
    assert cards["clinic"].base == "base/model"
    assert cards["team"].parents == {"general": 0.3, "clinic": 0.7}


def test_names_are_used_once():
    with pytest.raises(UserError, match="base's name"):
        Router("clinic", [adapter("clinic")])
    with pytest.raises(UserError, match="is an alias"):
        Router("base", [adapter("clinic")], {"clinic": "base"})
    with pytest.raises(UserError, match="there is no adapter cliniq; there are clinic"):
        Router("base", [adapter("clinic")], {"chief": "cliniq"})
    with pytest.raises(UserError, match="a digest names its weights"):
        Router("base", [adapter("clinic")], {"clinic@sha256:222222222222": "clinic"})
    with pytest.raises(UserError, match="at most 1"):
        Router("base", [adapter("clinic")], {"x": "clinic=1+general=1"}, most_members=1)
    with pytest.raises(UserError, match="alias x: "):
        Router("base", [adapter("clinic")], {"x": "clinic=nan"})


def test_added_and_removed_while_requests_hold_what_they_have(router):
    before = router.resolve(OPEN, "clinic")
    with pytest.raises(UnknownModelError):
        router.remove(key("general", role="operator"), "clinic")
    assert router.remove(OPEN, "clinic").digest == DIGESTS["clinic"]
    with pytest.raises(UnknownModelError):
        router.resolve(OPEN, "clinic")
    with pytest.raises(UnknownModelError):
        router.resolve(OPEN, "chief")
    assert "chief" not in [card.id for card in router.cards(OPEN)]
    other = Served("clinic", "sha256:" + "7" * 64, Path("/elsewhere"))
    router.add(other)
    router.add(other)
    assert router.resolve(OPEN, "chief").members[0][0] is other
    assert before.members[0][0].digest == DIGESTS["clinic"]
    with pytest.raises(UserError, match="other weights"):
        router.add(adapter("clinic"))


# ---- paths


@pytest.fixture
def place(tmp_path):
    (tmp_path / "root").mkdir()
    write_adapter(tmp_path / "root" / "good", 1)
    write_adapter(tmp_path / "secret", 2)
    return tmp_path


def test_what_lies_under_a_root_is_read(place):
    router = Router("base", roots=[place / "root"])
    for path in (str(place / "root" / "good"), "good", "./good/", "good/../good"):
        assert router.read("x", path).digest.startswith("sha256:")
    (place / "root" / "link").symlink_to(place / "root" / "good")
    assert router.read("x", "link").directory == place / "root" / "good"


def test_a_root_may_be_a_link_itself(place):
    (place / "alias").symlink_to(place / "root")
    assert Router("base", roots=[place / "alias"]).read("x", str(place / "alias" / "good"))


def test_no_way_leads_out_and_none_tells_what_is_there(place):
    router = Router("base", roots=[place / "root"])
    (place / "root" / "escape").symlink_to(place / "secret")
    (place / "root" / "ring").symlink_to(place / "root" / "ring")
    borrowed = write_adapter(place / "root" / "borrowed", 3)
    (borrowed / "adapter_model.safetensors").unlink()
    (borrowed / "adapter_model.safetensors").symlink_to(place / "secret" / "adapter_model.safetensors")
    (place / "rootish").mkdir()
    write_adapter(place / "rootish" / "a", 4)
    said = set()
    for path in (
        str(place / "secret"),
        str(place / "nothing"),
        "../secret",
        "good/../../secret",
        "escape",
        "borrowed",
        "ring",
        "/",
        "/etc",
        "~",
        "good\0",
        "a" * 5000,
        str(place / "rootish" / "a"),
    ):
        with pytest.raises(RequestError) as refused:
            router.read("x", path)
        assert refused.value.param == "lora_path"
        said.add(str(refused.value).replace(repr(path), ""))
    assert len(said) == 1


def test_under_a_root_what_is_no_adapter_is_told_of(place):
    router = Router("base", roots=[place / "root"])
    (place / "root" / "empty").mkdir()
    with pytest.raises(AdapterError, match="no adapter_config") as empty:
        router.read("x", "empty")
    assert str(place) not in str(empty.value)
    for name, text in (
        ("adapter_config.json", "{"),
        ("adapter_model.safetensors", "short"),
        ("lorchestra.json", "[]"),
        ("serve.yaml", "a: ["),
        ("chat_template.jinja", "x" * 2_000_000),
    ):
        directory = place / "root" / f"bad-{name}"
        shutil.copytree(place / "root" / "good", directory)
        (directory / name).write_text(text)
        with pytest.raises(AdapterError, match=name) as broken:
            router.read("x", f"bad-{name}")
        assert str(place) not in str(broken.value)
    with pytest.raises(RequestError, match="no name") as bad:
        router.read("../x", "good")
    assert bad.value.param == "lora_name"
    with pytest.raises(RequestError, match="no directory under those"):
        Router("base").read("x", str(place / "root" / "good"))
