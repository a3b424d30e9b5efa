"""A server over real HTTP that follows a real registry: promotions, failures, revocations, bases, names."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.serve.registry_world import BASE, KEYS, Gateway, until, write

from lorchestra.adapter.lineage import BaseId
from lorchestra.registry.manifest import FileEntry, Manifest
from lorchestra.registry.registry import Registry
from lorchestra.registry.sql.catalog import PRODUCTION
from lorchestra.serve.adapter_files import served

OTHER = replace(BASE, name="other", weights="sha256:" + "9" * 64)


@pytest.fixture
def world(tmp_path):
    """``world(...)`` starts a gateway on a registry in ``tmp_path``; ``clinic`` has two versions, v1 in production."""
    with Registry.open(str(tmp_path / "registry"), create=True, actor="tester") as registry:
        for seed in (1, 2):
            registry.push(write(tmp_path / f"a{seed}", seed), "clinic")
        registry.promote("clinic@v1")
        started = []

        def start(**settings) -> Gateway:
            gateway = Gateway(str(tmp_path / "registry"), tmp_path / f"cache{len(started)}", **settings)
            gateway.edit, gateway.place = registry, tmp_path
            started.append(gateway)
            return gateway

        start.registry, start.place = registry, tmp_path
        yield start
        for gateway in started:
            gateway.stop()


def blob(place, manifest, file="adapter_model.safetensors"):
    name = manifest.files[file].sha256.removeprefix("sha256:")
    return place / "registry" / "blobs" / "sha256" / name[:2] / name


def settled(gateway):
    """What the registry says now was taken in."""
    until(lambda: gateway.report()["generation"] == gateway.edit.generation())


# ---- names


def test_names_aliases_numbers_digests_and_mixtures_of_them_are_served(world):
    gateway = world()
    gateway.edit.alias("clinic", "staging", "clinic@v2")
    settled(gateway)
    digest = {number: gateway.edit.resolve(f"clinic@v{number}").manifest.digest for number in (1, 2)}
    for model, version in {
        "clinic": 1, "clinic@production": 1, "clinic@v1": 1, "clinic@v2": 2, "clinic@staging": 2,
        f"clinic@{digest[2]}": 2, f"clinic@{digest[1][:19]}": 1,
    }.items():  # fmt: skip
        assert gateway.by(model) == f"clinic@v{version}", model
        assert gateway.lines[-1]["adapters"][0]["digest"] == digest[version]
    gateway.edit.push(write(gateway.place / "full", 3), "medical_notes_v2_20250315")
    settled(gateway)
    for model in ("medical_notes", "medical_notes_v2", "medical_notes@v2", "medical_notes_v2_20250315"):
        assert gateway.by(model) == "medical_notes@v2", model
    assert gateway.by("medical_notes_v2@v3") == "404 model_not_found"
    assert gateway.by("medical_notes_v2=0.5+clinic@v1=0.25") == "medical_notes@v2=0.5+clinic@v1=0.25"
    assert gateway.by("clinic@v1=0.5+clinic@staging=-0.25") == "clinic@v1=0.5+clinic@v2=-0.25"
    for model in ("clinic@v3", "clinic@nightly", "clinic@sha256:" + "0" * 12, "nobody"):
        assert gateway.by(model) == "404 model_not_found"
    assert "x-lorchestra-model" not in gateway.ask("base").headers
    with gateway.streaming("clinic@v2", tokens=2) as (response, _, lines):
        assert response.headers["x-lorchestra-model"] == "clinic@v2"
        assert list(lines)[-1] == "data: [DONE]"


def test_a_name_without_production_is_its_latest_version_that_is_not_revoked(world, tmp_path):
    gateway = world()
    gateway.edit.push(write(tmp_path / "b1", 11), "audit")
    until(lambda: gateway.by("audit") == "audit@v1")
    gateway.edit.push(write(tmp_path / "b2", 12), "audit")
    until(lambda: gateway.by("audit") == "audit@v2")
    gateway.edit.revoke("audit@v2", why="wrong")
    until(lambda: gateway.by("audit") == "audit@v1")
    gateway.edit.revoke("audit@v1", why="wrong too")
    until(lambda: gateway.by("audit") == "404 model_revoked")


def test_a_key_sees_its_names_and_no_trace_of_others(world, tmp_path):
    world.registry.push(write(tmp_path / "b1", 11), "audit", alias="staging")
    gateway = world(keys=KEYS)
    shown = {card["id"]: card for card in gateway.get("/v1/models", "acme").json()["data"]}
    assert shown.keys() == {"base", "clinic", "clinic@production"}
    assert shown["clinic"]["version"] == "clinic@v1"
    assert shown["clinic"]["digest"] == gateway.edit.resolve("clinic").manifest.digest
    everything = {card["id"] for card in gateway.get("/v1/models", "ops").json()["data"]}
    assert everything == {"base", "clinic", "clinic@production", "audit", "audit@staging"}
    said = {model: gateway.ask(model, "acme") for model in ("audit", "audit@v1", "audiz", "audit=0.5+clinic=0.5")}
    assert {answer.status_code for answer in said.values()} == {404}
    assert len({answer.text.replace(model, "X") for model, answer in said.items()}) == 1
    gateway.edit.revoke("audit@v1", why="wrong")
    until(lambda: gateway.by("audit@staging", key="ops") == "404 model_revoked")
    assert gateway.ask("audit@v1", "acme").text.replace("audit@v1", "X") == said["audit"].text.replace("audit", "X")


def test_the_servers_own_names_win(world, tmp_path):
    own = served("clinic", write(tmp_path / "own", 5))
    world.registry.push(write(tmp_path / "b1", 11), "audit", alias="beta")
    world.registry.push(write(tmp_path / "b2", 12), "base")
    gateway = world(adapters=[own], aliases={"audit": "clinic", "chief": "clinic"})
    assert gateway.by("clinic") == gateway.by("audit") == gateway.by("chief") == "clinic"
    assert gateway.by("base") == "base"
    for model in ("clinic@v1", "clinic@production", "audit@v1", "audit@beta", "base@v1"):
        assert gateway.by(model) == "404 model_not_found", model
    assert gateway.router.hidden() == ["audit", "base", "clinic"]


def test_a_name_that_is_pushed_later_and_is_the_servers_own_is_told_of_once(world, tmp_path, caplog):
    own = served("own", write(tmp_path / "own", 5))
    gateway = world(adapters=[own], aliases={"chief": "clinic", "clinic@next": "clinic@v1"})
    assert gateway.report()["hidden"] == []
    world.registry.push(write(tmp_path / "b1", 11), "own")
    world.registry.push(write(tmp_path / "b2", 12), "chief")
    world.registry.alias("clinic", "next", "clinic@v2")
    until(lambda: gateway.report()["hidden"] == ["chief", "clinic@next", "own"])
    assert gateway.by("own") == "own"
    assert gateway.by("clinic@next") == "clinic@v1"
    world.registry.push(write(tmp_path / "b3", 13), "own")
    settled(gateway)
    told = [r.getMessage().partition(":")[0] for r in caplog.records if "the server's own name wins" in r.getMessage()]
    assert sorted(told) == ["chief", "clinic@next", "own"], "once each"


def test_an_alias_of_the_server_may_name_a_version(world):
    gateway = world(aliases={"chief": "clinic@v2", "team": "clinic@v1=0.5+clinic@v2=0.5"})
    assert gateway.by("chief") == "clinic@v2"
    assert gateway.by("team") == "clinic@v1=0.5+clinic@v2=0.5"
    cards = {card["id"]: card for card in gateway.get("/v1/models").json()["data"]}
    assert cards["chief"]["digest"] == gateway.edit.resolve("clinic@v2").manifest.digest
    refused = gateway.post("/v1/load_lora_adapter", {"lora_name": "clinic", "lora_path": "x"})
    assert refused.status_code == 400
    assert "name of the registry" in refused.json()["error"]["message"]


# ---- following


def test_a_promotion_is_followed_within_a_second_without_a_restart(world):
    gateway = world()
    texts = {model: gateway.text(model) for model in ("clinic@v1", "clinic@v2", "base")}
    assert len(set(texts.values())) == 3
    assert gateway.text() == texts["clinic@v1"]
    took = []
    for _ in range(3):  # the machine may be busy; a server that looked less often would be late each time
        gateway.edit.promote("clinic@v2")
        took.append(until(lambda: gateway.by(tokens=1) == "clinic@v2"))
        assert gateway.text() == gateway.text("clinic@production") == texts["clinic@v2"]
        gateway.edit.rollback("clinic")
        took.append(until(lambda: gateway.by(tokens=1) == "clinic@v1"))
        assert gateway.text() == texts["clinic@v1"]
    assert min(took) < 1
    assert gateway.counted("lorchestra_registry_switches_total") == 12, "the name and its alias, six times"
    assert gateway.counted("lorchestra_registry_generation") == gateway.edit.generation()


def test_what_runs_ends_on_the_version_it_began_with_which_is_then_unloaded(world):
    gateway = world()
    whole = gateway.text(tokens=20)
    gateway.engine.pause = 0.1
    with gateway.streaming(tokens=20) as (response, first, lines):
        gateway.edit.promote("clinic@v2")
        until(lambda: gateway.by(tokens=1) == "clinic@v2")
        assert gateway.engine.unloaded == []
        parts = [json.loads(line.removeprefix("data: ")) for line in [first, *lines][:-1]]
        assert response.headers["x-lorchestra-model"] == "clinic@v1"
    assert "".join(part["choices"][0]["text"] for part in parts) == whole
    until(lambda: gateway.engine.unloaded == ["clinic@v1"])
    assert gateway.engine.resident() == [served("clinic", gateway.place / "a2").key]


def test_a_version_that_is_damaged_leaves_the_alias_where_it_was_until_it_is_mended(world, tmp_path, caplog):
    gateway = world()
    gateway.by()
    third = gateway.edit.push(write(tmp_path / "a3", 3), "clinic").manifest
    kept = blob(tmp_path, third).read_bytes()
    blob(tmp_path, third).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    gateway.edit.promote("clinic@v3")
    until(lambda: gateway.report()["failures"])
    assert gateway.by() == gateway.by("clinic@production") == "clinic@v1"
    assert gateway.by("clinic@v3") == "400 adapter_unusable"
    report = gateway.report()
    assert report["names"]["clinic"]["production"]["wanted"] == "clinic@v3"
    assert report["names"]["clinic"]["production"]["serving"] == "clinic@v1"
    assert [(f["version"], f["kind"]) for f in report["failures"]] == [("clinic@v3", "damaged")]
    assert gateway.counted("lorchestra_registry_failures_total", kind="damaged") == 1
    assert gateway.counted("lorchestra_registry_unservable", kind="damaged") == 1
    assert gateway.counted("lorchestra_registry_unservable", kind="other base") == 0
    assert gateway.counted("lorchestra_registry_failing", kind="store") == 0, "one blob is damaged; the store is there"
    assert [r.getMessage() for r in caplog.records if "clinic@v3 cannot be served (damaged)" in r.getMessage()]
    told = gateway.ask("clinic@v3").text
    assert str(tmp_path) not in told
    blob(tmp_path, third).write_bytes(kept)
    until(lambda: gateway.by() == "clinic@v3")
    assert gateway.report()["failures"] == []


def test_weights_that_are_no_numbers_leave_the_alias_where_it_was(world, tmp_path):
    gateway = world()
    gateway.by()
    first = gateway.edit.resolve("clinic@v1").manifest
    tensors = load_file(tmp_path / "a1" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")  # a push would refuse it: somebody put it there
    told = json.loads((tmp_path / "a1" / "lorchestra.json").read_text())
    (tmp_path / "nan.json").write_text(json.dumps({**told, "digest": "sha256:" + "5" * 64}))
    files = dict(first.files)
    for name, put in {"adapter_model.safetensors": "nan.safetensors", "lorchestra.json": "nan.json"}.items():
        digest, size = gateway.edit.blobs.put_file(tmp_path / put)
        files[name] = FileEntry(sha256=digest, size=size)
    said = {**first.model_dump(), "number": 9, "files": files, "digest": "sha256:" + "5" * 64}
    gateway.edit.admit(Manifest.model_validate(said))
    gateway.edit.promote("clinic@v9")
    until(lambda: gateway.report()["failures"])
    assert gateway.report()["failures"][0]["kind"] == "unusable"
    assert gateway.by() == "clinic@v1"


# ---- bases


def test_a_version_of_another_base_is_refused_and_leaves_the_alias_where_it_was(world, tmp_path):
    world.registry.push(write(tmp_path / "o1", 21, OTHER), "foreign", alias=PRODUCTION)
    gateway = world()
    gateway.by()
    gateway.edit.push(write(tmp_path / "o2", 22, OTHER), "clinic")
    gateway.edit.promote("clinic@v3")
    until(lambda: len(gateway.report()["failures"]) == 2)
    assert {failure["kind"] for failure in gateway.report()["failures"]} == {"other base"}
    assert gateway.by() == "clinic@v1"
    assert gateway.by("clinic@v3") == gateway.by("foreign") == "400 adapter_unusable"
    assert "foreign" not in {card["id"] for card in gateway.get("/v1/models").json()["data"]}


@pytest.mark.parametrize("kind", ["tokenizer", "template"])
def test_a_changed_tokenizer_or_template_wants_a_recorded_accept(world, kind):
    changed = replace(BASE, **{kind: "sha256:" + "8" * 64})
    gateway = world(base=changed)
    assert gateway.by() == "400 adapter_unusable"
    gateway.edit.accept("clinic", kind, changed, why="looked at")
    until(lambda: gateway.by() == "clinic@v1")


def test_a_quantised_sibling_is_served_with_its_drift_told(world):
    sibling = BaseId("tiny-awq", "sha256:" + "7" * 64, BASE.tokenizer, BASE.template)
    gateway = world(base=sibling)
    assert gateway.by() == "400 adapter_unusable"
    gateway.edit.derive(BASE.weights, sibling, "awq", {"kl": 0.01}, why="measured")
    until(lambda: gateway.by() == "clinic@v1")
    cards = {card["id"]: card for card in gateway.get("/v1/models").json()["data"]}
    assert cards["clinic"]["base_drift"] == {"kl": 0.01}
    assert gateway.versions.here[1].sibling_of == BASE.weights


# ---- revocation


def test_a_revoked_version_is_refused_at_once_and_never_silently_another(world):
    gateway = world()
    assert gateway.by() == "clinic@v1"
    gateway.edit.revoke("clinic@v1", why="leaks")
    until(lambda: gateway.by() == "404 model_revoked")
    for model in ("clinic@production", "clinic@v1", "clinic@v1=0.5+clinic@v2=0.5"):
        assert gateway.by(model) == "404 model_revoked"
    assert gateway.by("clinic@v2") == "clinic@v2"
    assert "leaks" not in gateway.ask().text, "the reason is the operator's"
    assert "clinic" not in {card["id"] for card in gateway.get("/v1/models").json()["data"]}
    until(lambda: gateway.engine.unloaded == ["clinic@v1"])
    gateway.edit.reinstate("clinic@v1", why="it did not")
    until(lambda: gateway.by() == "clinic@v1")


def test_a_revocation_ends_what_is_in_flight(world):
    gateway = world()
    gateway.text("clinic@v2")
    gateway.engine.pause = 0.05
    whole = []
    thread = threading.Thread(target=lambda: whole.append(gateway.ask(tokens=400)))
    thread.start()
    with (
        gateway.streaming("clinic@v1=0.5+clinic@v2=0.5", tokens=400) as (_, _, mixed),
        gateway.streaming(tokens=400) as (_, _, lines),
    ):
        until(lambda: gateway.report()["names"]["clinic"]["production"]["requests"] == 3)
        with gateway.streaming("clinic@v2", tokens=30) as (_, _, others):
            gateway.edit.revoke("clinic@v1", why="leaks")
            for told in (list(lines), list(mixed)):
                assert len(told) < 300
                assert told[-1] == "data: [DONE]"
                assert json.loads(told[-2].removeprefix("data: "))["error"]["code"] == "model_revoked"
            thread.join(20)
            assert whole[0].status_code == 409
            assert whole[0].json()["error"]["code"] == "model_revoked"
            assert "error" not in "".join(others), "what another version answers goes on"
    until(lambda: gateway.gateway.running == 0)
    assert gateway.engine.using == dict.fromkeys(gateway.engine.using, 0), "nothing goes on in the engine"
    assert sorted(line["status"] for line in gateway.lines if line.get("error") == "WithdrawnError") == [409] * 3


def test_a_client_that_leaves_as_its_version_is_revoked_just_leaves(world):
    gateway = world()
    gateway.by()
    gateway.engine.pause = 0.05
    with gateway.streaming(tokens=400):
        pass
    gateway.edit.revoke("clinic@v1", why="leaks")
    until(lambda: gateway.gateway.running == 0)
    assert gateway.lines[-1]["status"] in (499, 409)
    assert gateway.by("clinic@v2") == "clinic@v2"


# ---- operators


def test_the_registrys_state_is_for_operators_and_who_asked_is_logged(world):
    gateway = world(keys=KEYS)
    assert gateway.get("/admin/registry").status_code == 401
    assert gateway.get("/admin/registry", "nobody").status_code == 401
    refused = gateway.get("/admin/registry", "acme")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    report = gateway.get("/admin/registry", "ops")
    assert report.status_code == 200
    assert report.json()["names"]["clinic"]["(name alone)"]["serving"] == "clinic@v1"
    assert report.json()["stale_seconds"] < 5
    told = [(line["tenant"], line["status"]) for line in gateway.lines if line["kind"] == "admin"]
    assert told == [(None, 401), (None, 401), ("acme", 403), ("ops", 200)]


# ---- the request path


def test_a_request_asks_no_database_and_no_store_once_its_version_is_here(world):
    from sqlalchemy import event

    gateway = world()
    models = ["clinic", "clinic@production", "clinic@v2", "clinic@v1=0.5+clinic@v2=0.5"]
    expected = {model: gateway.text(model) for model in models}
    asked = []

    @event.listens_for(gateway.registry.catalog.engine, "before_cursor_execute")
    def note(*_):
        asked.append(threading.current_thread().name)

    (gateway.place / "registry" / "blobs").rename(gateway.place / "away")
    for model in models * 3:
        assert gateway.text(model) == expected[model]
    until(lambda: len(asked) > 5)  # what follows the registry goes on beside it
    assert {name.rpartition("_")[0] for name in asked} <= {"lorchestra-registry", "lorchestra-outcomes"}


@pytest.mark.slow
def test_while_versions_come_and_go_every_answer_is_the_one_its_header_names(world):
    gateway = world()
    texts = {f"clinic@v{k}": gateway.text(f"clinic@v{k}") for k in (1, 2)}
    stop, seen = threading.Event(), []

    def client():
        while not stop.is_set():
            answer = gateway.ask()
            seen.append((answer.status_code, answer.headers.get("x-lorchestra-model"), answer.json()))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for k in (2, 1, 2, 1, 2):
        gateway.edit.promote(f"clinic@v{k}")
        until(lambda k=k: gateway.by() == f"clinic@v{k}")
    stop.set()
    for thread in threads:
        thread.join(20)
    assert {status for status, _, _ in seen} == {200}
    assert {by for _, by, _ in seen} == set(texts)
    assert [by for _, by, body in seen if body["choices"][0]["text"] != texts[by]] == []
