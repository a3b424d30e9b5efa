"""Keys, names, limits and accounts in front of a real, if small, engine."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import aclosing

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tests.serve.tenants import PlainEngine, write_adapter

from lorchestra.registry.access import Key, Keys, hashed
from lorchestra.serve.adapter_files import served
from lorchestra.serve.app import HttpSettings, create_app
from lorchestra.serve.engine import OverloadedError, RequestError, StoppingError
from lorchestra.serve.gateway import TenantGateway
from lorchestra.serve.metrics import Metrics
from lorchestra.serve.ports import Caller, ForbiddenError, UnauthenticatedError, UnknownModelError
from lorchestra.serve.request_log import RequestLog
from lorchestra.serve.routing import Router
from lorchestra.serve.wire import ChatRequest, CompletionRequest, parse

SECRET = "prompts are nobody's business"


def key(name, adapters: list[str] | str = "all", **settings):
    return Key(name=name, sha256=hashed(f"secret-{name}"), adapters=adapters, **settings)


KEYS = Keys((
    key("acme", ["clinic"], concurrency=2),
    key("slow", ["clinic"], rpm=1),
    key("bare", []),
    key("ops", role="operator"),
))  # fmt: skip


class World:
    """A gateway, its engine, and what it logged."""

    def __init__(self, place, model, tokenizer, keys=KEYS, prompts=False, may_load=True):
        (place / "root").mkdir()
        self.place = place
        adapters = [served(name, write_adapter(place / name, seed)) for seed, name in enumerate(("clinic", "audit"))]
        self.out = io.StringIO()
        self.engine = PlainEngine(model, tokenizer)
        self.router = Router("base", adapters, {"chief": "clinic"}, roots=[place / "root"])
        self.metrics = Metrics("base", resident=self.engine.resident)
        self.gateway = TenantGateway(
            self.engine, self.router, keys, self.metrics, RequestLog(self.out, prompts), may_load=may_load
        )

    def who(self, name):
        return self.gateway.authenticate(f"Bearer secret-{name}")

    async def ask(self, name, model, stream=False, tokens=4):
        body = completion(model, stream, tokens)
        if not stream:
            return (await self.gateway.answer(self.who(name), f"r-{model}", body)).choices[0]["text"]
        async with aclosing(self.gateway.stream(self.who(name), f"r-{model}", body)) as chunks:
            return "".join([chunk.choices[0]["text"] async for chunk in chunks])

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.getvalue().splitlines()]

    def counted(self, name, **labels):
        families = text_string_to_metric_families(self.gateway.metrics(self.who("ops")).decode())
        return sum(
            s.value
            for family in families
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        )


def completion(model, stream=False, tokens=4):
    return parse(CompletionRequest, {"model": model, "prompt": SECRET, "max_tokens": tokens, "stream": stream})


@pytest.fixture
def world(tmp_path, tiny_model, tiny_tokenizer):
    return World(tmp_path, tiny_model, tiny_tokenizer)


def run(world, scenario):
    async def started():
        await world.engine.start()
        return await asyncio.wait_for(scenario(), 30)

    return asyncio.run(started())


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "secret-acme", "Basic secret-acme", "Bearer secret-nobody", "Bearer secret-acme x",
     f"Bearer {hashed('secret-acme')}", "Bearer \udce9"],
)  # fmt: skip
def test_who_has_no_valid_key_is_told_one_thing(world, header):
    with pytest.raises(UnauthenticatedError, match="no valid API key"):
        world.gateway.authenticate(header)
    assert world.counted("lorchestra_rejected_total", reason="key") == 1


def test_a_key_is_known_by_its_header(world):
    assert world.gateway.authenticate("bearer  secret-acme ").tenant == "acme"


def test_without_keys_everybody_may_do_everything(tmp_path, tiny_model, tiny_tokenizer):
    world = World(tmp_path, tiny_model, tiny_tokenizer, keys=None)
    caller = world.gateway.authenticate(None)
    assert caller.tenant == "anonymous"
    assert {card.id for card in world.gateway.models(caller)} == {"base", "clinic", "audit", "chief"}


def test_a_caller_that_was_not_authenticated_here_may_do_nothing(world):
    with pytest.raises(UnauthenticatedError):
        world.gateway.models(Caller("ops"))


def test_each_model_answers_with_its_own_weights_streamed_or_not(world):
    async def scenario():
        texts = {model: await world.ask("ops", model) for model in ("base", "clinic", "audit", "clinic=0.5+audit=0.5")}
        assert len(set(texts.values())) == 4
        for model, text in texts.items():
            assert await world.ask("ops", model, stream=True) == text
        assert await world.ask("ops", "chief") == texts["clinic"]
        assert await world.ask("ops", "clinic=0") == texts["base"]

    run(world, scenario)


def test_another_tenants_adapter_is_as_if_it_were_not_and_the_engine_never_hears_of_it(world):
    async def scenario():
        said = {}
        for model in ("audit", "audiz"):
            for stream in (False, True):
                with pytest.raises(UnknownModelError) as refused:
                    await world.ask("acme", model, stream=stream)
                said[model] = str(refused.value).replace(model, "X")
        assert said["audit"] == said["audiz"]
        assert world.engine.resident() == []

    run(world, scenario)
    assert [line["status"] for line in world.lines] == [404] * 4
    assert world.lines[0].keys() == world.lines[2].keys()
    assert world.lines[0]["adapters"] == []


def test_a_line_a_request_with_digests_coefficients_tokens_and_never_a_prompt(world):
    async def scenario():
        await world.ask("ops", "clinic=0.5+audit=-0.25")
        await world.ask("acme", "chief", stream=True)
        await world.ask("bare", "base")

    run(world, scenario)
    mixed, chief, base = world.lines
    clinic, audit = (next(a for a in world.router.adapters if a.name == name) for name in ("clinic", "audit"))
    assert [(m["digest"], m["coefficient"]) for m in mixed["adapters"]] == [(clinic.digest, 0.5), (audit.digest, -0.25)]
    assert chief["adapters"][0]["key"] == clinic.key
    assert (chief["tenant"], chief["model"], chief["stream"]) == ("acme", "chief", True)
    assert base["adapters"] == []
    for line in world.lines:
        assert (line["status"], line["prompt_tokens"], line["generated_tokens"]) == (200, len(SECRET), 4)
        assert line["seconds"] >= 0
    assert 0 < chief["first_token_seconds"] <= chief["seconds"]
    assert SECRET not in world.out.getvalue()
    assert "secret-" not in world.out.getvalue()


def test_prompts_are_logged_where_they_are_asked_for(tmp_path, tiny_model, tiny_tokenizer):
    world = World(tmp_path, tiny_model, tiny_tokenizer, prompts=True)
    run(world, lambda: world.ask("ops", "clinic"))
    assert world.lines[0]["request"]["prompt"] == SECRET
    assert world.lines[0]["choices"][0]["text"]
    assert "secret-ops" not in world.out.getvalue()


def test_metrics_are_for_operators_and_count_what_happened(world):
    async def scenario():
        await world.ask("acme", "clinic")
        await world.ask("acme", "clinic", stream=True)
        with pytest.raises(UnknownModelError):
            await world.ask("acme", "audit")

    run(world, scenario)
    with pytest.raises(ForbiddenError):
        world.gateway.metrics(world.who("acme"))
    assert world.counted("lorchestra_requests_total", adapter="clinic", status="200") == 2
    assert world.counted("lorchestra_requests_total", adapter="(unknown)", status="404") == 1
    assert world.counted("lorchestra_prompt_tokens_total", adapter="clinic") == 2 * len(SECRET)
    assert world.counted("lorchestra_generated_tokens_total", adapter="clinic") == 8
    assert world.counted("lorchestra_first_token_seconds_count", adapter="clinic") == 1
    assert world.counted("lorchestra_inter_token_seconds_count", adapter="clinic") == 3
    assert world.counted("lorchestra_rejected_total", reason="unknown") == 1
    assert world.counted("lorchestra_requests_in_flight") == 0
    assert world.counted("lorchestra_adapter_resident", adapter="clinic") == 1


def test_limits_are_each_keys_own(world):
    async def scenario():
        world.engine.hold.clear()
        running = [asyncio.ensure_future(world.ask("acme", "clinic")) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError):
            await world.ask("acme", "clinic")
        with pytest.raises(OverloadedError):
            await world.ask("acme", "clinic", stream=True)
        assert world.counted("lorchestra_requests_in_flight") == 2
        world.engine.hold.set()
        await asyncio.gather(*running)
        await world.ask("acme", "clinic")
        await world.ask("slow", "clinic")
        with pytest.raises(OverloadedError) as refused:
            await world.ask("slow", "clinic")
        assert 0 < refused.value.retry_after <= 60

    run(world, scenario)
    assert [line["status"] for line in world.lines].count(429) == 3
    assert world.counted("lorchestra_rejected_total", reason="limit") == 3


def test_who_guesses_names_is_limited_too(world):
    async def scenario():
        with pytest.raises(UnknownModelError):
            await world.ask("slow", "audit")
        with pytest.raises(OverloadedError):
            await world.ask("slow", "audit")

    run(world, scenario)


def test_a_client_that_leaves_frees_its_place_and_is_accounted_for(world):
    async def scenario():
        world.engine.hold.clear()
        task = asyncio.ensure_future(world.ask("acme", "clinic"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.gateway.running == 0
        world.engine.hold.set()
        chunks = world.gateway.stream(world.who("acme"), "left", completion("clinic", True))
        await anext(chunks)
        assert world.gateway.running == 1
        await chunks.aclose()
        assert world.gateway.running == 0

    run(world, scenario)
    assert [(line["status"], line["generated_tokens"]) for line in world.lines] == [(499, 0), (499, 1)]


def test_draining_takes_nothing_new_and_waits_for_what_runs(world):
    async def scenario():
        world.engine.hold.clear()
        task = asyncio.ensure_future(world.ask("acme", "clinic"))
        await asyncio.sleep(0.05)
        assert world.gateway.ready
        assert await world.gateway.drain(0.01) is False
        assert not world.gateway.ready
        for stream in (False, True):
            with pytest.raises(StoppingError):
                await world.ask("acme", "clinic", stream=stream)
        with pytest.raises(StoppingError):
            await world.gateway.load(world.who("ops"), "x", "x")
        drained = asyncio.ensure_future(world.gateway.drain(20))
        await asyncio.sleep(0)
        world.engine.hold.set()
        assert len(await task) > 0
        assert await drained is True

    run(world, scenario)


# ---- loading while it runs


def test_operators_load_and_unload_and_what_runs_keeps_its_weights(world):
    async def scenario():
        ops = world.who("ops")
        first = write_adapter(world.place / "root" / "first", 7)
        write_adapter(world.place / "root" / "second", 8)
        await world.gateway.load(ops, "new", str(first))
        await world.gateway.load(ops, "new", str(first))
        text = await world.ask("ops", "new")
        world.engine.hold.clear()
        running = asyncio.ensure_future(world.ask("ops", "new"))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError, match="other weights"):
            await world.gateway.load(ops, "new", "second")
        await world.gateway.unload(ops, "new")
        with pytest.raises(UnknownModelError):
            await world.gateway.unload(ops, "new")
        await world.gateway.load(ops, "new", "second")
        world.engine.hold.set()
        assert await running == text
        assert await world.ask("ops", "new") != text
        assert world.lines[0]["adapters"][0]["digest"] != world.lines[-1]["adapters"][0]["digest"]
        with pytest.raises(UnknownModelError):
            await world.ask("acme", "new")

    run(world, scenario)


@pytest.mark.parametrize(
    ("name", "path", "param"),
    [
        ("x", "../clinic", "lora_path"),
        ("x", "/etc", "lora_path"),
        ("../x", "good", "lora_name"),
        ("base", "good", "lora_name"),
        ("chief", "good", "lora_name"),
        ("auto", "good", "lora_name"),
    ],
)
def test_a_load_that_cannot_be_changes_nothing(world, name, path, param):
    async def scenario():
        write_adapter(world.place / "root" / "good", 7)
        with pytest.raises(RequestError) as refused:
            await world.gateway.load(world.who("ops"), name, path)
        assert refused.value.param == param
        assert {adapter.name for adapter in world.router.adapters} == {"clinic", "audit"}

    run(world, scenario)


def test_users_load_nothing_and_nobody_does_where_it_is_off(tmp_path, tiny_model, tiny_tokenizer):
    world = World(tmp_path, tiny_model, tiny_tokenizer, may_load=False)

    async def scenario():
        for who, says in (("acme", "role 'operator'"), ("ops", "--enable-load")):
            with pytest.raises(ForbiddenError, match=says):
                await world.gateway.load(world.who(who), "x", "x")
            with pytest.raises(ForbiddenError, match=says):
                await world.gateway.unload(world.who(who), "clinic")

    run(world, scenario)


def test_a_failure_of_the_engine_is_accounted_as_ours(world, monkeypatch):
    async def scenario():
        monkeypatch.setattr(world.engine, "_next", lambda ids, members: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await world.ask("acme", "clinic")

    run(world, scenario)
    assert (world.lines[0]["status"], world.lines[0]["error"]) == (500, "ZeroDivisionError")


def test_a_chat_is_told_from_a_completion(world):
    async def scenario():
        body = parse(ChatRequest, {"model": "audit", "messages": [{"role": "user", "content": SECRET}]})
        with pytest.raises(UnknownModelError):
            await world.gateway.answer(world.who("acme"), "c", body)

    run(world, scenario)
    assert world.lines[0]["kind"] == "chat"


# ---- through HTTP


@pytest.fixture
def web(world):
    asyncio.run(world.engine.start())
    with TestClient(create_app(world.gateway, HttpSettings(runtime_adapters=True))) as client:
        yield client


def asked(web, who, model, **fields):
    return web.post(
        "/v1/completions",
        json={"model": model, "prompt": SECRET, "max_tokens": 2, **fields},
        headers={"authorization": f"Bearer secret-{who}", "x-request-id": "same"},
    )


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_forbidden_and_unknown_are_the_same_bytes(web, fields):
    answers = [asked(web, "acme", model, **fields) for model in ("audit", "audiz")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text == answers[1].text.replace("audiz", "audit")
    headers = [{k: v for k, v in answer.headers.items() if k != "date"} for answer in answers]
    assert headers[0] == headers[1]
    one = [web.get(f"/v1/models/{m}", headers={"authorization": "Bearer secret-acme"}) for m in ("audit", "audiz")]
    assert one[0].status_code == one[1].status_code == 404
    assert one[0].text == one[1].text.replace("audiz", "audit")


def test_limits_say_when_to_come_back(web):
    assert asked(web, "slow", "clinic").status_code == 200
    refused = asked(web, "slow", "clinic")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def test_no_page_of_another_origin_may_read_anything(web):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in web.options("/v1/completions", headers=headers).headers
    assert "access-control-allow-origin" not in web.get("/health", headers=headers).headers


def test_metrics_and_loads_are_refused_to_users(web, world):
    user, ops = ({"authorization": f"Bearer secret-{who}"} for who in ("acme", "ops"))
    write_adapter(world.place / "root" / "new", 7)
    load = {"lora_name": "new", "lora_path": "new"}
    assert web.get("/metrics", headers=user).status_code == 403
    assert web.get("/metrics").status_code == 401
    assert web.post("/v1/load_lora_adapter", json=load, headers=user).status_code == 403
    assert web.post("/v1/load_lora_adapter", json=load, headers=ops).status_code == 200
    assert web.post("/v1/load_lora_adapter", json=load | {"lora_path": "/etc"}, headers=ops).status_code == 400
    assert asked(web, "ops", "new").status_code == 200
    assert web.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=ops).status_code == 200
    assert web.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=ops).status_code == 404
    changes = [line for line in world.lines if line["kind"] in ("load", "unload")]
    assert [(line["kind"], line["tenant"], line["model"], line["status"]) for line in changes] == [
        ("load", "acme", "new", 403), ("load", "ops", "new", 200), ("load", "ops", "new", 400),
        ("unload", "ops", "new", 200), ("unload", "ops", "new", 404),
    ]  # fmt: skip
    page = web.get("/metrics", headers=ops)
    assert page.status_code == 200
    assert "lorchestra_requests_total" in page.text
