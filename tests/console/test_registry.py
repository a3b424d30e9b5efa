"""What the console shows of a registry, and what it changes there: against the registry itself."""

from __future__ import annotations

import json
import time
from datetime import timedelta

import pytest
import torch
from sqlalchemy import insert, select
from tests.console.world import EVIL, World, stocked
from tests.registry.conftest import postgres  # noqa: F401  # a fixture
from tests.serve.registry_world import until

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import UserError
from lorchestra.registry import browsing
from lorchestra.registry.canary import rollout
from lorchestra.registry.canary.observations import Tally, observe
from lorchestra.registry.canary.plan import Plan
from lorchestra.registry.manifest import digest_of
from lorchestra.registry.sql.finding import Filter
from lorchestra.registry.sql.schema import manifests, names, version_metrics, version_tags, versions
from lorchestra.registry.steering import hold, step

HOUR = timedelta(hours=1)


def refused(answer):
    return answer.status_code, answer.json()["error"]["message"]


def last(world):
    return world.registry.history(limit=1)[0]


# ---- looking


@pytest.fixture(scope="module")
def ann(shared):
    return shared.browser("ann")


def test_adapters_with_their_aliases(ann):
    found = ann.get("adapters").json()
    assert found["total"] == 2
    assert [row["name"] for row in found["rows"]] == ["legal", "clinic"], "the newest first"
    clinic = found["rows"][1]
    assert (clinic["versions"], clinic["newest"], clinic["revoked"]) == (3, 3, 0)
    assert [(a["alias"], a["reference"], a["canary"]) for a in clinic["aliases"]] == [
        ("production", "clinic@v1", False)
    ]


@pytest.mark.parametrize(
    ("params", "numbers"),
    [
        ({}, [3, 2, 1]),
        ({"tag": "dpo"}, [2]),
        ({"alias": "production"}, [1]),
        ({"metric": "loss<=1.2"}, [3, 2]),
        ({"state": "revoked"}, []),
        ({"text": "NOTE"}, [1]),
        ({"text": "maker clin"}, [3, 2, 1]),
        ({"text": "%"}, []),
        ({"text": "clinic_"}, []),
        ({"limit": 1, "offset": 1}, [2]),
    ],
)
def test_versions_are_filtered_and_paged_by_the_server(ann, params, numbers):
    found = ann.get("versions", name="clinic", **params).json()
    assert [row["number"] for row in found["rows"]] == numbers
    if "limit" in params:
        assert found["total"] == 3


def test_a_filter_that_is_none_is_said_in_words(ann):
    status, message = refused(ann.get("versions", state="asleep"))
    assert status == 400
    assert "ready or revoked" in message


def test_one_version_is_its_manifest(ann, shared):
    told = ann.get("version", reference="clinic@v2").json()
    manifest = shared.registry.resolve("clinic@v2").manifest
    expected = manifest.model_dump(mode="json")
    assert {"ranks", "scales"} == {key for key in expected if key not in told["manifest"]}
    assert told["manifest"] == {key: value for key, value in expected.items() if key in told["manifest"]}
    assert {module["path"]: module["rank"] for module in told["modules"]} == manifest.ranks
    assert told["manifest_digest"] == manifest.manifest_digest
    assert told["note"] == EVIL, "as it was written: making it harmless is the page's business"
    assert refused(ann.get("version", reference="clnic@v2")) == (
        404,
        "there is no adapter 'clnic' in this registry; the nearest are clinic",
    )


def test_the_lineage_has_parents_and_children_with_coefficients(ann, shared):
    v1, v3 = (shared.registry.resolve(f"clinic@v{n}").manifest for n in (1, 3))
    for reference in ("clinic@v1", "clinic@v3"):
        found = ann.get("lineage", reference=reference).json()
        edges = {(edge["child"], edge["parent"], edge["coefficient"]) for edge in found["edges"]}
        assert (v3.digest, v1.digest, 0.3) in edges
        assert found["centre"] == shared.registry.resolve(reference).manifest.digest
        assert found["total"] == len(found["nodes"])
    assert ann.get("lineage", reference="legal").json()["edges"] == []


def test_two_versions_compared_are_as_far_apart_as_dense_matrices_say(ann, shared, tmp_path):
    found = ann.get("compare", before="clinic@v1", after="clinic@v3").json()
    assert (found["before"], found["after"], found["same"]) == ("clinic@v1", "clinic@v3", False)
    apart = size = 0.0
    pair = []
    for reference in ("clinic@v1", "clinic@v3"):
        shared.registry.pull(reference, tmp_path / reference)
        pair.append(Adapter.load(tmp_path / reference).modules)
    for path in pair[0].keys() & pair[1].keys():
        one, two = (side[path].dense().double() for side in pair)
        apart += float(torch.sum((one - two) ** 2))
        size += float(torch.sum(one**2))
    assert found["distance"]["relative"] == pytest.approx((apart / size) ** 0.5, rel=1e-5)
    loss = next(pair for pair in found["metrics"] if pair["key"] == "loss")
    assert loss["change"] == pytest.approx(-0.19)
    assert loss["verdict"] == "better"


def test_the_history_is_the_audit_log_in_pages(ann, shared):
    whole = shared.registry.history()
    first = ann.get("history", limit=2).json()
    assert [row["id"] for row in first["rows"]] == [entry.id for entry in whole[:2]]
    assert first["more"] is True
    rest = ann.get("history", before=first["rows"][-1]["id"]).json()
    assert [row["hash"] for row in rest["rows"]] == [entry.hash for entry in whole[2:]]
    assert rest["more"] is False
    only = ann.get("history", name="clinic", action="push").json()["rows"]
    assert {(row["name"], row["action"]) for row in only} == {("clinic", "push")}
    assert len(only) == 3
    about = ann.get("history", reference="clinic@v2").json()["rows"]
    assert [row["action"] for row in about] == ["push"]


def test_facets_are_the_words_in_use(ann):
    found = ann.get("facets").json()
    assert found == {"tags": ["dpo", "notes"], "bases": ["tiny"], "aliases": ["production"]}


def test_postgresql_tells_the_same(postgres, tmp_path):  # noqa: F811
    """Every page of a registry in PostgreSQL is that of the same registry in SQLite."""
    told = []
    for url in (str(tmp_path / "registry"), postgres.url(postgres.database(), tmp_path / "blobs")):
        place = tmp_path / f"made{len(told)}"
        with stocked(url, place) as registry:
            rollout.start(registry, "clinic", "clinic@v2", plan=Plan((0.1, 1.0), HOUR), why="look")
            step(registry, "clinic", why="on")
            hold(registry, "clinic", 2 * HOUR, why="slowly")
            rollout.start(registry, "legal", registry.push(place / "two", "legal").reference, plan=Plan((1.0,), HOUR))
            rollout.abort(registry, "legal", why="no")
            running, ended = browsing.canaries(registry)
            told.append([
                browsing.facets(registry),
                [row._replace(changed="", aliases=tuple(one._replace(since="") for one in row.aliases))
                 for row in browsing.adapters(registry, Filter(state="ready"), "CLI", limit=9).rows],
                [(version.id, version.reference)
                 for version in browsing.versions_in(registry, Filter(metric="loss<1.2"), "", limit=2, offset=1).rows],
                browsing.adapters(registry, Filter(), "", limit=1).total,
                [row._replace(since="") for row in browsing.pointed(registry, "PROD", limit=9).rows],
                [(one.rollout.candidate.reference, one.rollout.plan, one.rollout.step) for one in running],
                [(one.rollout.candidate.reference, one.rollout.state) for one in ended],
                [(entry.id, entry.action, entry.why)
                 for entry in browsing.entries(registry, reference="clinic@v2", before=8, limit=3)],
                browsing.pointing(registry, [1, 2, 5]),
            ])  # fmt: skip
    assert told[0] == told[1]
    assert told[0][5] == [("clinic@v2", Plan((0.1, 1.0), 2 * HOUR), 1)]
    assert told[0][6] == [("legal@v2", "aborted")]


# ---- changing


def test_a_promotion_is_followed_and_is_in_the_log_under_the_keys_name(world):
    ann = world.browser("ann")
    assert world.gateway.by("clinic", key=world.secrets["uma"]) == "clinic@v1"
    answer = ann.post("promote", {"reference": "clinic@v2", "gates": ["loss<=1.2"], "why": "lower loss"})
    assert answer.json() == {"name": "clinic", "alias": "production", "reference": "clinic@v2"}
    until(lambda: world.gateway.by("clinic", key=world.secrets["uma"]) == "clinic@v2", 5)
    entry = last(world)
    assert (entry.actor, entry.action, entry.before, entry.after, entry.why) == (
        "ann", "promote", "clinic@v1", "clinic@v2", "lower loss",
    )  # fmt: skip
    assert world.registry.verify(deep=False) == []


def test_a_gate_that_refuses_is_told_with_what_it_measured(world):
    status, message = refused(
        world.browser("ann").post("promote", {"reference": "clinic@v2", "gates": ["loss<=1.0"], "why": "hope"})
    )
    assert status == 409
    assert "1.18" in message
    assert world.registry.resolve("clinic").reference == "clinic@v1"


def test_nothing_is_changed_without_a_reason(world):
    ann, before = world.browser("ann"), world.registry.generation()
    bodies = {
        "promote": {"reference": "clinic@v2"}, "rollback": {"name": "clinic"}, "revoke": {"reference": "clinic@v2"},
        "reinstate": {"reference": "clinic@v2"}, "canary/start": {"name": "clinic", "candidate": "v2", "steps": [0.5]},
        "canary/step": {"name": "clinic"}, "canary/hold": {"name": "clinic", "hold": "1h"},
        "canary/promote": {"name": "clinic"}, "canary/abort": {"name": "clinic"},
    }  # fmt: skip
    changing = {route.path.removeprefix("/api/") for route in world.console.routes if route.access == "operator"}
    assert set(bodies) == changing
    for path, body in bodies.items():
        for why in ({}, {"why": " \n"}):
            status, message = refused(ann.post(path, body | why))
            assert (status, "reason" in message) == (400, True), path
    assert world.registry.generation() == before


def test_rollback_revoke_and_reinstate(world):
    ann = world.browser("ann")
    ann.post("promote", {"reference": "clinic@v2", "why": "try"})
    assert ann.post("rollback", {"name": "clinic", "why": "worse"}).json()["reference"] == "clinic@v1"
    assert ann.post("revoke", {"reference": "clinic@v2", "why": "leaks"}).json() == {"state": "revoked"}
    assert world.registry.resolve("clinic@v2").revoked.by == "ann"
    status, message = refused(ann.post("promote", {"reference": "clinic@v2", "why": "again"}))
    assert status == 409
    assert "leaks" in message
    assert ann.post("reinstate", {"reference": "clinic@v2", "why": "it did not"}).json() == {"state": "ready"}
    actions = [(entry.actor, entry.action) for entry in world.registry.history("clinic", limit=4)]
    assert actions == [("ann", "restore"), ("ann", "revoke"), ("ann", "rollback"), ("ann", "promote")]


START = {
    "name": "clinic", "candidate": "clinic@v2", "steps": [0.05, 0.5, 1.0], "hold": "1h", "min_requests": 10,
    "why": "notes of 2025",
}  # fmt: skip


def test_a_canary_from_start_to_abort(world):
    ann = world.browser("ann")
    assert ann.post("canary/start", START).json()["share"] == 0.05
    assert refused(ann.post("canary/start", START))[0] == 400, "one at a time"
    until(lambda: ann.get("traffic").json()["running"][0]["tried_here"])
    assert ann.post("canary/hold", {"name": "clinic", "hold": "7d", "why": "weekend"}).json()["hold"] == 7 * 86400
    moved = ann.post("canary/step", {"name": "clinic", "why": "looks well"}).json()
    assert (moved["step"], moved["share"]) == (1, 0.5)
    (seen,) = ann.get("traffic").json()["running"]
    assert (seen["stable"], seen["candidate"], seen["share"]) == ("clinic@v1", "clinic@v2", 0.5)
    assert seen["steps"][0]["share"] == 0.05
    ann.post("canary/step", {"name": "clinic", "why": "on"})
    assert "last step" in refused(ann.post("canary/step", {"name": "clinic", "why": "on"}))[1]
    assert ann.post("canary/abort", {"name": "clinic", "why": "answers in French"}).json()["state"] == "aborted"
    told = ann.get("traffic").json()
    assert told["running"] == []
    assert told["ended"][0]["why"] == "answers in French"
    entries = world.registry.history("clinic", limit=5)
    assert [entry.action for entry in entries] == ["canary-abort", *["canary-step"] * 3, "canary-start"]
    assert {entry.actor for entry in entries} == {"ann"}
    assert [entry.why for entry in entries][1:4] == ["on", "looks well", "weekend"]
    assert world.registry.verify(deep=False) == []


def test_the_estimates_are_those_of_the_registry(world):
    ann = world.browser("ann")
    ann.post("canary/start", START)
    started = rollout.running(world.registry)[0]
    tallies = {"stable": Tally(), "candidate": Tally()}
    for k in range(600):
        arm = "candidate" if k % 3 == 0 else "stable"
        tallies[arm].failed() if k % 30 == 0 else tallies[arm].answered(0.2 + 0.001 * (k % 50))
    observe(world.registry.catalog, started.id, "elsewhere", tallies)
    (seen,) = ann.get("traffic").json()["running"]
    expected = rollout.status(world.registry, "clinic")
    assert seen["arms"]["candidate"]["requests"] == expected.arms["candidate"].requests == 200
    assert seen["arms"]["candidate"]["error_rate"] == 20 / 200
    for told, reading in zip(seen["readings"], expected.readings, strict=True):
        assert (told["guard"], told["state"]) == (reading.guard, reading.state)
        assert (told["worse"], told["low"], told["high"]) == (reading.worse, reading.low, reading.high)


def test_a_canary_that_is_to_be_taken_back_does_not_go_on_by_hand(tmp_path):
    with stocked(str(tmp_path / "registry"), tmp_path) as registry:
        started = rollout.start(registry, "clinic", "clinic@v2", plan=Plan((0.1, 1.0), HOUR))
        sick, before = Tally(), registry.generation()
        for _ in range(60):
            sick.failed()
        observe(registry.catalog, started.id, "elsewhere", {"candidate": sick})
        with pytest.raises(UserError, match=r"cannot go on: error rate .* abort it"):
            step(registry, "clinic", why="hurry")
        with pytest.raises(UserError, match="no canary is running"):
            step(registry, "legal", why="hurry")
        with pytest.raises(UserError, match="less than nothing"):
            hold(registry, "clinic", -HOUR, why="hurry")
        assert registry.generation() == before


def test_a_promotion_ends_the_canary(world):
    ann = world.browser("ann")
    ann.post("canary/start", START)
    assert ann.post("canary/promote", {"name": "clinic", "why": "two quiet days"}).json()["reference"] == "clinic@v2"
    entry = last(world)
    assert (entry.action, entry.actor, entry.why) == ("canary-promote", "ann", "two quiet days")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("promote", {"reference": "clinic@v9", "why": "x"}, "there is no clinic@v9"),
        ("promote", {"reference": "clinic@v2", "gates": ["loss!"], "why": "x"}, "is no gate"),
        ("promote", {"reference": "clinic@v2", "alias": "Not A Word", "why": "x"}, "Not A Word"),
        ("canary/start", START | {"steps": [0.5, 0.1]}, "grow"),
        ("canary/start", START | {"hold": "soon"}, "is no duration"),
        ("canary/start", START | {"alpha": 2.0}, "alpha"),
        ("canary/start", START | {"candidate": "clinic@v1"}, "already"),
        ("canary/abort", {"name": "clinic", "why": "x"}, "no canary is running"),
        ("rollback", {"name": "clinic", "why": "x"}, "nothing to roll back to"),
        ("promote", {"reference": "clinic@v2", "why": "a\0b"}, "NUL"),
        ("promote", {"reference": "clinic@v2", "why": "x" * 2001}, "2000"),
    ],
)
def test_mistakes_are_said_in_words_and_change_nothing(shared, ann, path, body, words):
    before = shared.registry.generation()
    status, message = refused(ann.post(path, body))
    assert status in (400, 404)
    assert words in message
    assert shared.registry.generation() == before


def test_a_registry_that_is_away_is_said_so(tmp_path):
    world = World(tmp_path)
    try:
        ann = world.browser("ann")
        (tmp_path / "registry" / "catalog.db").rename(tmp_path / "gone.db")
        for name in ("catalog.db-wal", "catalog.db-shm"):
            (tmp_path / "registry" / name).unlink(missing_ok=True)
        world.gateway.registry.close()
        status, message = refused(ann.get("adapters"))
        assert status == 503
        assert "registry" in message
        (tmp_path / "gone.db").rename(tmp_path / "registry" / "catalog.db")
    finally:
        world.stop()


# ---- usage


def test_usage_is_counted_by_tenant_and_model(world):
    key = world.secrets["uma"]
    world.gateway.ask("clinic", key, tokens=3)
    world.gateway.ask("clinic", key, tokens=2)
    world.gateway.ask("base", key, tokens=1)
    world.gateway.ask("clinic=0.5+legal=0.5", key, tokens=1)
    assert world.gateway.ask("nobody", key).status_code == 404
    assert world.gateway.ask("clinic", world.secrets["vic"], temperature=9).status_code == 400
    found = world.browser("vic").get("usage").json()
    rows = {(row["tenant"], row["model"]): row for row in found["rows"]}
    assert set(rows) == {
        ("uma", "clinic@v1"), ("uma", "base"), ("uma", "(mixture)"), ("uma", "(unknown)"),
    }, "a request that could not be read has no tenant's line"  # fmt: skip
    clinic = rows["uma", "clinic@v1"]
    assert (clinic["requests"], clinic["generated_tokens"], clinic["errors"]) == (2, 5, 0)
    assert clinic["prompt_tokens"] == 2 * len("hello")
    assert rows["uma", "(unknown)"]["refused"] == 1
    assert sum(found["minutes"]["uma"]) == 5


# ---- the playground


def events(answer):
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


def test_the_playground_answers_as_the_api_does(shared):
    ann = shared.browser("ann")
    models = [model["id"] for model in ann.get("models").json()["models"]]
    assert models[0] == "base"
    assert {"clinic", "legal", "clinic@production"} <= set(models)
    for model in ("clinic", "clinic=0.5+legal=-0.25"):
        answer = ann.post("ask", {"model": model, "kind": "completion", "prompt": "hello", "max_tokens": 4})
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer)
        assert told[-1] == {"end": True}
        assert "".join(part["text"] for part in told[:-1]) == shared.gateway.text(
            model, key=shared.secrets["ann"], tokens=4
        )
    assert answer.headers["x-lorchestra-model"] == "clinic@v1=0.5+legal@v1=-0.25"


def test_a_viewer_may_ask_and_no_more_than_its_key_may(shared):
    vic = shared.browser("vic")
    body = {"model": "legal", "kind": "completion", "prompt": "hello", "max_tokens": 1}
    assert vic.post("ask", body).status_code == 200
    status, message = refused(vic.post("ask", body | {"model": "nobody"}))
    assert status == 404
    assert "nobody" in message
    assert refused(vic.post("ask", body | {"prompt": ""}))[0] == 400


# ---- ten thousand versions


MANY, EACH = 10_000, 50


def many(registry):
    """Rows as a push writes them, copied from one."""
    with registry.catalog.transaction() as held:
        row = held.execute(select(versions).where(versions.c.name == "clinic", versions.c.number == 1)).one()._asdict()
        told = held.execute(select(manifests.c.text).where(manifests.c.version_id == row["id"])).scalar_one()
        metric = held.execute(select(version_metrics).limit(1)).one()._asdict()
        made, texts, tagged, measured, named = [], [], [], [], []
        for k in range(MANY):
            name, number, id = f"bulk-{k // EACH:03d}", k % EACH + 1, 1000 + k
            text = told.replace('"name":"clinic"', f'"name":"{name}"')
            text = text.replace('"number":1,', f'"number":{number},')
            changed = {
                "id": id, "name": name, "number": number, "content": f"sha256:{k:064x}",
                "manifest_digest": digest_of(text.encode()),
            }  # fmt: skip
            made.append(row | changed)
            texts.append({"version_id": id, "text": text})
            tagged.append({"version_id": id, "tag": "even" if k % 2 == 0 else "odd"})
            measured.append(metric | {"version_id": id, "value": k / MANY})
            if number == 1:
                named.append({"name": name, "last": EACH})
        held.execute(insert(names), named)
        held.execute(insert(versions), made)
        held.execute(insert(manifests), texts)
        held.execute(insert(version_tags), tagged)
        held.execute(insert(version_metrics), measured)


def test_ten_thousand_versions_are_a_page_at_a_time(tmp_path):
    world = World(tmp_path)
    try:
        many(world.registry)
        ann = world.browser("ann")
        for path, params, total in (
            ("adapters", {}, MANY // EACH + 2),
            ("adapters", {"text": "bulk-01"}, 10),
            ("versions", {"offset": 9000}, MANY + 4),
            ("versions", {"tag": "even", "metric": "loss<0.5"}, MANY // 4),
            ("versions", {"name": "bulk-007", "text": "odd"}, EACH // 2),
        ):
            began = time.perf_counter()
            answer = ann.get(path, **params)
            took = time.perf_counter() - began
            found = answer.json()
            assert found["total"] == total, (path, params)
            assert len(found["rows"]) == min(50, total)
            assert len(answer.content) < 200_000
            assert took < 5, f"{path} {params} took {took:.2f} s"
    finally:
        world.stop()
