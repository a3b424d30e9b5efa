"""Canaries and feedback through real gateways: who is answered by what, what is counted, and what comes of it."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from tests.registry.conftest import postgres  # noqa: F401  # a fixture
from tests.serve.registry_world import KEYS, Gateway, until, write

from lorchestra.registry.canary import feedback, rollout
from lorchestra.registry.canary.guards import Guards
from lorchestra.registry.canary.plan import Plan
from lorchestra.registry.canary.traffic import arm_of
from lorchestra.registry.registry import Registry

SALT = "a salt"
USERS = [f"user-{k}" for k in range(24)]
HOUR = timedelta(hours=1)


class World:
    """A registry with two versions of clinic, v1 in production, and gateways on it."""

    def __init__(self, url, place):
        self.url, self.place, self.gateways = url, place, []
        self.registry = Registry.open(url, create=True, actor="tester")
        for seed in (1, 2):
            self.registry.push(write(place / f"a{seed}", seed), "clinic")
        self.registry.promote("clinic@v1")

    def gateway(self, **settings) -> Gateway:
        gateway = Gateway(self.url, self.place / f"cache{len(self.gateways)}", **settings)
        self.gateways.append(gateway)
        gateway.by()
        return gateway

    def begin(self, share=0.5, **more):
        plan = Plan((share, 1.0) if share < 1 else (1.0,), HOUR)
        rollout.start(self.registry, "clinic", "clinic@v2", plan=plan, salt=SALT, **more)
        for gateway in self.gateways:
            until(lambda g=gateway: [c["tried_here"] for c in g.report()["canaries"]] == [True])

    def stop(self):
        for gateway in self.gateways:
            gateway.stop()
        self.registry.close()


@pytest.fixture
def world(tmp_path):
    world = World(str(tmp_path / "registry"), tmp_path)
    yield world
    world.stop()


@pytest.fixture
def shared(tmp_path, postgres):  # noqa: F811
    world = World(postgres.url(postgres.database(), tmp_path / "blobs"), tmp_path)
    yield world
    world.stop()


def asked(gateway, user, **more):
    answer = gateway.ask("clinic", tokens=1, user=user, **more)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-lorchestra-model"], answer.headers.get("x-lorchestra-arm")


def counts(world):
    arms = rollout.status(world.registry, "clinic").arms
    return {arm: (counted.requests, counted.errors) for arm, counted in arms.items()}


def test_users_are_split_the_same_on_every_gateway_and_counted_once_in_all(shared):
    pair = [shared.gateway(keys=KEYS), shared.gateway(keys=KEYS)]
    shared.begin()
    expected = {user: arm_of(0.5, SALT, "acme", user) for user in USERS}
    assert set(expected.values()) == {"stable", "candidate"}
    for gateway in pair:
        for user in USERS:
            version = {"stable": "clinic@v1", "candidate": "clinic@v2"}[expected[user]]
            assert asked(gateway, user, key="acme") == (version, expected[user])
            assert gateway.lines[-1]["arm"] == expected[user]
            assert gateway.lines[-1]["adapters"][0]["version"] == version
    for model in ("clinic@v1", "clinic@v2"):
        assert "x-lorchestra-arm" not in pair[0].ask(model, "acme", user="user-1").headers
    each = {arm: list(expected.values()).count(arm) for arm in ("stable", "candidate")}
    until(lambda: counts(shared) == {arm: (2 * n, 0) for arm, n in each.items()})
    for arm, n in each.items():
        assert pair[0].counted("lorchestra_canary_requests_total", arm=arm, outcome="answered") == n


def test_a_share_that_grows_adds_users_and_a_promotion_is_followed(world):
    gateway = world.gateway()
    world.begin(0.3, guards=Guards(min_requests=1))
    before = {user for user in USERS if asked(gateway, user)[1] == "candidate"}
    assert 0 < len(before) < len(USERS)
    assert {asked(gateway, "")[1], asked(gateway, "")[1]} == {arm_of(0.3, SALT, "anonymous", "")}
    until(lambda: counts(world)["candidate"][0] >= len(before))
    gateway.outcomes._every = 1e9
    (change,) = rollout.advance(world.registry, until_hold_is_over())
    assert change.action == "canary-step"
    until(lambda: gateway.report()["canaries"][0]["share"] == 1.0)
    assert {asked(gateway, user) for user in USERS} == {("clinic@v2", "candidate")}
    rollout.promote(world.registry, "clinic", why="well")
    until(lambda: asked(gateway, "user-1") == ("clinic@v2", None))


def until_hold_is_over():
    from datetime import UTC, datetime

    return datetime.now(UTC) + 2 * HOUR


def test_a_candidate_that_fails_is_taken_back_by_the_gateways_themselves_once(shared, caplog):
    pair = [shared.gateway(), shared.gateway()]
    for gateway in pair:
        gateway.engine.broken.add("clinic@v2")
    shared.begin()
    sick = [user for user in USERS if arm_of(0.5, SALT, "anonymous", user) == "candidate"]
    for turn in range(40):
        statuses = [
            g.ask("clinic", tokens=1, user=user).status_code for g in pair for user in (sick[0], USERS[turn % 24])
        ]
        if 500 not in statuses:
            break
    for gateway in pair:
        until(
            lambda g=gateway: g.ask("clinic", tokens=1, user=sick[0]).headers.get("x-lorchestra-model") == "clinic@v1"
        )
        assert gateway.report()["canaries"] == []
    ended = [entry for entry in shared.registry.history("clinic") if entry.action == "canary-rollback"]
    assert len(ended) == 1
    assert "error rate" in ended[0].why
    assert sum("canary-rollback" in record.getMessage() for record in caplog.records) == 1
    assert sum(gateway.counted("lorchestra_canary_rollbacks_total") for gateway in pair) == 1, "by the one that did it"
    assert shared.registry.verify() == []


def test_what_a_version_is_not_to_blame_for_is_not_counted(world):
    gateway = world.gateway()
    world.begin()
    asked(gateway, "user-1")
    assert gateway.ask("clinic", tokens=1, user="user-1", temperature=9).status_code == 400
    with gateway.streaming(tokens=400):
        pass
    until(lambda: gateway.gateway.running == 0)
    until(lambda: sum(n for n, _ in counts(world).values()) == 1)
    assert sum(errors for _, errors in counts(world).values()) == 0


def test_a_candidate_that_cannot_be_loaded_gets_no_traffic(world, tmp_path):
    gateway = world.gateway()
    manifest = world.registry.resolve("clinic@v2").manifest
    name = manifest.files["adapter_model.safetensors"].sha256.removeprefix("sha256:")
    (tmp_path / "registry" / "blobs" / "sha256" / name[:2] / name).write_bytes(b"damaged")
    rollout.start(world.registry, "clinic", "clinic@v2", plan=Plan((1.0,), HOUR), salt=SALT)
    until(lambda: gateway.report()["failures"])
    assert gateway.report()["canaries"][0]["tried_here"] is False
    assert {asked(gateway, user) for user in USERS[:4]} == {("clinic@v1", None)}


def test_a_gateway_that_starts_in_the_middle_splits_as_the_others_do(world):
    world.gateway()
    world.begin()
    late = world.gateway()
    for user in USERS[:8]:
        assert asked(late, user)[1] == arm_of(0.5, SALT, "anonymous", user)


# ---- feedback


def judged(world):
    with world.registry.catalog.reading() as connection:
        from sqlalchemy import select

        from lorchestra.registry.sql.schema import feedback as table

        return [row._asdict() for row in connection.execute(select(table).order_by(table.c.id))]


def test_feedback_is_kept_of_ones_own_answers_and_counts_for_the_arm(world):
    gateway = world.gateway(keys=KEYS)
    world.begin(1.0)
    answer = gateway.ask("clinic", "acme", user="u", headers={"x-request-id": "mine-1"})
    said = gateway.post("/v1/feedback", {"request_id": "mine-1", "score": 0.25, "comment": "vague"}, "acme")
    assert (said.status_code, said.json()) == (200, {"object": "feedback", "request_id": "mine-1"})
    (row,) = judged(world)
    assert (row["score"], row["comment"], row["arm"], row["version_id"]) == (0.25, "vague", "candidate", 2)
    assert row["prompt"] is row["answer"] is None, "prompts are not logged here"
    by_body = gateway.post("/v1/feedback", {"request_id": answer.json()["id"], "thumb": "up"}, "acme")
    assert by_body.status_code == 200
    (row,) = judged(world)
    assert row["score"] == 1.0, "what is said again replaces what was said"
    assert rollout.status(world.registry, "clinic").arms["candidate"].score_n == 1
    assert [line["status"] for line in gateway.lines if line["kind"] == "feedback"] == [200, 200]


def test_nobody_learns_of_anothers_answers(world):
    gateway = world.gateway(keys=KEYS)
    gateway.ask("clinic", "acme", headers={"x-request-id": "mine-1"})
    told = {}
    for request_id in ("mine-1", "never-was"):
        refused = gateway.post("/v1/feedback", {"request_id": request_id, "thumb": "up"}, "rival")
        assert refused.status_code == 404
        told[request_id] = refused.json()
    assert told["mine-1"] == told["never-was"]
    assert told["mine-1"]["error"]["code"] == "request_not_found"
    assert gateway.post("/v1/feedback", {"request_id": "mine-1", "thumb": "up"}).status_code == 401
    assert gateway.post("/v1/feedback", {"request_id": "mine-1", "thumb": "up"}, "nobody").status_code == 401
    assert judged(world) == []
    statuses = [(line["tenant"], line["status"]) for line in gateway.lines if line["kind"] == "feedback"]
    assert statuses == [("rival", 404), ("rival", 404), (None, 401), (None, 401)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"request_id": "mine-1"}, "score"),
        ({"request_id": "mine-1", "score": 1, "thumb": "up"}, "score"),
        ({"request_id": "mine-1", "score": 1.5}, "score"),
        ({"request_id": "mine-1", "score": True}, "score"),
        ({"request_id": "mine-1", "thumb": "sideways"}, "thumb"),
        ({"thumb": "up"}, "request_id"),
        ({"request_id": "mine-1", "thumb": "up", "comment": "x" * 4001}, "comment"),
        ({"request_id": "mine-1", "thumb": "up", "comment": "a\0b"}, "comment"),
        ({"request_id": "mine-1", "thumb": "up", "rating": 5}, "rating"),
    ],
)
def test_feedback_that_says_nothing_is_refused(feedback_gateway, body, param):
    refused = feedback_gateway.post("/v1/feedback", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)


@pytest.fixture(scope="module")
def feedback_gateway(tmp_path_factory):
    place = tmp_path_factory.mktemp("feedback")
    world = World(str(place / "registry"), place)
    gateway = world.gateway()
    gateway.ask("clinic", headers={"x-request-id": "mine-1"})
    yield gateway
    world.stop()


def test_feedback_that_is_no_json_or_too_much_is_refused_as_everywhere(feedback_gateway):
    refused = feedback_gateway.client.post("/v1/feedback", content=b"{", headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert feedback_gateway.client.post("/v1/feedback", content=b"{}").status_code == 415
    big = {"request_id": "mine-1", "thumb": "up", "comment": "x" * 2**24}
    assert feedback_gateway.post("/v1/feedback", big).status_code == 413


def test_feedback_is_in_the_schema(feedback_gateway):
    schema = feedback_gateway.get("/openapi.json").json()
    route = schema["paths"]["/v1/feedback"]["post"]
    assert "422" in route["responses"]
    assert schema["components"]["schemas"]["FeedbackRequest"]["required"] == ["request_id"]
    assert "/admin/registry" in schema["paths"]


def test_feedback_is_within_the_keys_limits(world):
    gateway = world.gateway(keys=KEYS)
    body = {"request_id": "none", "thumb": "up"}
    assert [gateway.post("/v1/feedback", body, "slow").status_code for _ in range(3)] == [404, 404, 429]


def test_where_prompts_are_logged_feedback_makes_pairs_to_train_on(world, tmp_path):
    gateway = world.gateway(prompts=True)
    texts = {}
    for name, score in (("clinic@v1", 0.0), ("clinic@v2", 1.0)):
        texts[name] = gateway.text(name, headers={"x-request-id": f"score-{score}"}, tokens=4)
        assert gateway.post("/v1/feedback", {"request_id": f"score-{score}", "score": score}).status_code == 200
    with gateway.streaming("clinic@v1", tokens=6, headers={"x-request-id": "streamed"}) as (_, first, lines):
        parts = [json.loads(line.removeprefix("data: ")) for line in [first, *lines][:-1]]
    streamed = "".join(part["choices"][0]["text"] for part in parts)
    assert gateway.post("/v1/feedback", {"request_id": "streamed", "score": 0.5}).status_code == 200
    feedback.export(world.registry, tmp_path / "pairs.jsonl")
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {(p["prompt"], p["chosen"], p["rejected"]) for p in pairs} == {
        ("hello", texts["clinic@v2"], texts["clinic@v1"]), ("hello", texts["clinic@v2"], streamed),
    }  # fmt: skip


def test_what_is_not_in_the_registry_can_be_judged_too(world):
    gateway = world.gateway()
    gateway.ask("base", headers={"x-request-id": "b"})
    assert gateway.post("/v1/feedback", {"request_id": "b", "thumb": "down"}).status_code == 200
    assert [(row["name"], row["version_id"], row["score"]) for row in judged(world)] == [("base", None, 0.0)]
