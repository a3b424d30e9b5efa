"""The routes over ASGI: bodies, refusals in OpenAI's shape, streams, clients that leave."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest
import torch

from lorchestra.errors import AdapterError
from lorchestra.serve.app import HttpSettings, create_app
from lorchestra.serve.engine import OverloadedError, RequestError, StoppingError
from lorchestra.serve.ports import ForbiddenError

ONE, TWO = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
COMPLETION = {"model": "base", "prompt": "Fever?", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Fever?"}], "max_tokens": 4, "temperature": 0}


def asked(app, method, path, **options) -> httpx2.Response:
    async def send():
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **{"headers": ONE} | options)

    return asyncio.run(send())


@pytest.fixture
def app(gateway):
    return create_app(gateway, HttpSettings(runtime_adapters=True, max_body=10_000))


def refusal(response, status) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-request-id"]
    return error


def events(response) -> list:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_completion(app):
    body = asked(app, "POST", "/v1/completions", json=COMPLETION).json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], body["model"]) == ("text_completion", "base")
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert body["usage"]["prompt_tokens"] == 6


def test_a_chat(app):
    body = asked(app, "POST", "/v1/chat/completions", json=CHAT).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_a_stream_is_the_answer_in_parts(app, path, body):
    whole = asked(app, "POST", path, json=body).json()
    chunks = events(asked(app, "POST", path, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    text = "".join(c.get("text") or c.get("delta", {}).get("content", "") for x in chunks for c in x["choices"])
    assert text == (whole["choices"][0].get("text") or whole["choices"][0].get("message", {}).get("content", ""))
    plain = events(asked(app, "POST", path, json=body | {"stream": True}))
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
    counting = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert all(chunk["usage"] for chunk in events(asked(app, "POST", path, json=body | counting)))


def test_log_likelihoods_as_lm_evaluation_harness_asks_for_them(app, tiny_model):
    """Batches of prompts in tokens, echoed; it sums the log-probabilities of the answer's tokens, and takes the answer
    for greedy where each of them is the largest beside it.
    """
    sequences = [([80, 81, 82], [90, 91]), ([80], [100]), ([70, 71, 229, 144, 145], [229])]
    body = {"model": "base", "prompt": [a + b for a, b in sequences], "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True}  # fmt: skip
    choices = asked(app, "POST", "/v1/completions", json=body).json()["choices"]
    for (context, answer), choice in zip(sequences, sorted(choices, key=lambda c: c["index"]), strict=True):
        start, whole = len(context), torch.tensor([context + answer])
        wanted = torch.log_softmax(tiny_model(whole).logits[0], -1)[start - 1 : -1]
        told = choice["logprobs"]["token_logprobs"][start:]
        told = told[: len(answer)]  # what was generated comes after; it is none where the first token ends the answer
        assert told == pytest.approx([float(row[i]) for row, i in zip(wanted, answer, strict=True)], abs=1e-4)
        top = choice["logprobs"]["top_logprobs"][start : start + len(answer)]
        greedy = [value == max(others.values()) for value, others in zip(told, top, strict=True)]
        assert greedy == [int(row.argmax()) == i for row, i in zip(wanted, answer, strict=True)]


def test_models_are_those_of_the_key_with_their_parents(app):
    first = asked(app, "GET", "/v1/models").json()["data"]
    assert [model["id"] for model in first] == ["base", "clinic"]
    assert first[1]["parents"] == {"general": 0.3, "medical": 0.5}
    assert (first[1]["parent"], first[1]["root"], first[1]["max_model_len"]) == ("base", "base", 512)
    assert [model["id"] for model in asked(app, "GET", "/v1/models", headers=TWO).json()["data"]] == ["base"]
    assert asked(app, "GET", "/v1/models/clinic").json()["id"] == "clinic"
    assert refusal(asked(app, "GET", "/v1/models/clinic", headers=TWO), 404)["code"] == "model_not_found"
    unknown = refusal(asked(app, "GET", "/v1/models/nowhere", headers=TWO), 404)
    foreign = refusal(asked(app, "GET", "/v1/models/clinic", headers=TWO), 404)
    assert unknown["message"].replace("nowhere", "clinic") == foreign["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/base", "/metrics"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer none"}, {"authorization": "Basic one"}])
def test_who_has_no_key_reads_nothing(app, path, headers):
    response = asked(app, "GET", path, headers=headers)
    assert refusal(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"])
def test_who_has_no_key_asks_nothing(app, path):
    refusal(asked(app, "POST", path, headers={}, content=b"no JSON"), 401)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (RequestError("no", "prompt"), 400, "invalid_request_error", "prompt", None),
        (AdapterError("not finite"), 400, "invalid_request_error", "model", "adapter_unusable"),
        (ForbiddenError("no"), 403, "permission_error", None, "forbidden"),
        (OverloadedError("full", 2.1), 429, "rate_limit_error", None, "rate_limit_exceeded"),
        (StoppingError("draining"), 503, "server_error", None, "unavailable"),
        (RuntimeError("secret"), 500, "server_error", None, "internal"),
    ],
)
def test_refusals_of_the_gateway(app, gateway, error, status, kind, param, code, stream):
    gateway.failure = error
    response = asked(app, "POST", "/v1/completions", json=COMPLETION | {"stream": stream})
    told = refusal(response, status)
    assert (told["type"], told["param"], told["code"]) == (kind, param, code)
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


def test_a_failure_on_the_way_ends_the_stream_with_an_error(app, tokens, monkeypatch):
    plain = tokens.generate

    async def breaking(generation):
        steps = plain(generation)
        yield await anext(steps)
        await steps.aclose()
        raise RuntimeError("secret")

    monkeypatch.setattr(tokens, "generate", breaking)
    response = asked(app, "POST", "/v1/completions", json=COMPLETION | {"stream": True, "logit_bias": {"69": 100}})
    *_, last = events(response)
    assert last["error"]["type"] == "server_error"
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "nobody"}, "model", "model_not_found"), ({"temperature": 9}, "temperature", None),
        ({"n": 10**6}, "n", None), ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": -1}, "max_tokens", None), ({"prompt": [9999]}, "prompt", None),
        ({"prompt": "a" * 600}, "prompt", "context_length_exceeded"), ({"promt": "a"}, "promt", None),
    ],
)  # fmt: skip
def test_absurd_requests_name_the_field_and_the_server_goes_on(app, body, param, code):
    before = asked(app, "POST", "/v1/completions", json=COMPLETION).json()["choices"]
    for stream in (False, True):
        response = asked(app, "POST", "/v1/completions", json=COMPLETION | body | {"stream": stream})
        error = refusal(response, 404 if code == "model_not_found" else 400)
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert asked(app, "POST", "/v1/completions", json=COMPLETION).json()["choices"] == before


def test_malformed_bodies(app):
    def sent(content, kind="application/json"):
        return asked(app, "POST", "/v1/completions", content=content, headers=ONE | {"content-type": kind})

    refusal(sent(b"{"), 400)
    refusal(sent(b""), 400)
    refusal(sent(b"[1]"), 400)
    refusal(sent(b'{"model": NaN}'), 400)
    refusal(sent(json.dumps(COMPLETION), "text/plain"), 415)
    refusal(sent(json.dumps(COMPLETION), "application/x-www-form-urlencoded"), 415)
    assert sent(json.dumps(COMPLETION), "application/json; charset=utf-8").status_code == 200


def test_large_bodies_are_not_read(app):
    async def endless():
        for _ in range(1000):
            yield b" " * 1000
        raise AssertionError("it was read to its end")

    refusal(asked(app, "POST", "/v1/completions", json=COMPLETION | {"prompt": "a" * 10_000}), 413)
    headers = ONE | {"content-type": "application/json"}
    refusal(asked(app, "POST", "/v1/completions", content=endless(), headers=headers), 413)


def test_slow_bodies_are_given_up(gateway):
    async def slow():
        yield b"{"
        await asyncio.sleep(5)

    app = create_app(gateway, HttpSettings(body_seconds=0.05))
    headers = ONE | {"content-type": "application/json"}
    refusal(asked(app, "POST", "/v1/completions", content=slow(), headers=headers), 408)


def test_no_such_route_and_wrong_methods(app):
    assert "/v1" in refusal(asked(app, "GET", "/nowhere"), 404)["message"]
    response = asked(app, "GET", "/v1/completions")
    refusal(response, 405)
    assert response.headers["allow"] == "POST"


def test_request_ids_are_the_clients_where_they_are_plain(app):
    response = asked(app, "POST", "/v1/completions", json=COMPLETION, headers=ONE | {"x-request-id": "trace-7"})
    assert response.headers["x-request-id"] == "trace-7"
    assert response.json()["id"] == "cmpl-trace-7"
    ids = {asked(app, "GET", "/health", headers=h).headers["x-request-id"] for h in ({}, {}, {"x-request-id": 'a"b c'})}
    assert len(ids) == 3
    assert all(len(one) == 32 for one in ids)


def test_health_and_readiness(app, engine):
    assert asked(app, "GET", "/health", headers={}).status_code == 200
    assert asked(app, "GET", "/ready", headers={}).status_code == 200
    asyncio.run(engine.stop(0))
    assert asked(app, "GET", "/health", headers={}).status_code == 200
    refusal(asked(app, "GET", "/ready", headers={}), 503)


def test_metrics_are_the_operators(app):
    assert asked(app, "GET", "/metrics").text.endswith("up 1\n")
    refusal(asked(app, "GET", "/metrics", headers=TWO), 403)


def test_adapters_come_and_go_where_it_is_allowed(app, gateway):
    load = {"lora_name": "new", "lora_path": "stores/new"}
    assert (
        asked(app, "POST", "/v1/load_lora_adapter", json=load).text == "Success: LoRA adapter 'new' added successfully."
    )
    assert gateway.loads == [("new", "stores/new")]
    refusal(asked(app, "POST", "/v1/load_lora_adapter", json=load, headers=TWO), 403)
    outside = refusal(asked(app, "POST", "/v1/load_lora_adapter", json=load | {"lora_path": "../new"}), 400)
    assert outside["param"] == "lora_path"
    assert asked(app, "POST", "/v1/unload_lora_adapter", json={"lora_name": "clinic"}).status_code == 200
    assert [status for _, _, status, _ in gateway.changes] == [200, 403, 400, 200]
    refusal(asked(app, "POST", "/v1/unload_lora_adapter", json={"lora_name": "clinic"}), 404)


def test_adapters_do_not_come_and_go_unless_it_is_enabled(gateway):
    app = create_app(gateway)
    refusal(asked(app, "POST", "/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "a"}), 404)
    assert "/v1/load_lora_adapter" not in app.openapi()["paths"]
    assert not gateway.loads


def test_other_origins_only_where_they_are_named(gateway):
    ask = {"origin": "https://clinic.example", "access-control-request-method": "POST"}
    assert (
        "access-control-allow-origin"
        not in asked(create_app(gateway), "OPTIONS", "/v1/completions", headers=ask).headers
    )
    app = create_app(gateway, HttpSettings(cors_origins=("https://clinic.example",)))
    allowed = asked(app, "OPTIONS", "/v1/completions", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://clinic.example"
    other = asked(app, "OPTIONS", "/v1/completions", headers=ask | {"origin": "https://else.example"})
    assert "access-control-allow-origin" not in other.headers


def left(app, body, until) -> list[dict]:
    """What is sent to a client that leaves when ``until(sent)`` holds."""
    sent: list[dict] = []

    async def run():
        content = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if content:
                return content.pop()
            while not until(sent):
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", b"Bearer one"), (b"content-type", b"application/json")]
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
                 "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
                 "query_string": b"", "headers": headers,
                 "scheme": "http", "client": ("127.0.0.1", 1), "server": ("server", 80), "root_path": ""}  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(run())
    return sent


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_what_it_held(app, tokens, stream, n):
    long = COMPLETION | {"max_tokens": 500, "ignore_eos": True, "logit_bias": {"69": 100}, "stream": stream, "n": n}
    sent = left(app, long, lambda sent: len(sent) > 3 if stream else tokens.running)
    assert not tokens.running
    assert len(tokens.ended) == n
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_client_that_leaves_before_the_first_token_frees_what_it_held(app, tokens, monkeypatch):
    async def never(generation):
        tokens.running.add(generation.id)
        try:
            await asyncio.sleep(60)
            yield
        finally:
            tokens.running.remove(generation.id)

    monkeypatch.setattr(tokens, "generate", never)
    left(app, COMPLETION | {"stream": True}, lambda sent: tokens.running)
    assert not tokens.running
