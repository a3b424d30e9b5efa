"""Bad adapters, bad requests and bad paths against a real server with the real engine, while neighbours are answered.

Whatever is sent, the answer is a 4xx in OpenAI's form that names no place on the server, the server stays up, and the
neighbours' answers stay what they were.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
from dataclasses import replace

import httpx2
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from tests.serve.real_server import make_adapter, make_base, make_keys, serving

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.registry.access import remove_key

pytestmark = pytest.mark.slow

LOOPING = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
Q = "model.layers.0.self_attn.q_proj"
COMPLETION = {"model": "clinic", "prompt": "Fever?", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "clinic", "messages": [{"role": "user", "content": "Fever?"}], "max_tokens": 4}


def one_module(path: str, m: int, n: int, rank: int = 1, value: float = 1.0) -> Adapter:
    return Adapter({path: LowRank(torch.full((m, rank), value), torch.full((rank, n), value))})


def write_nan(directory):
    """As another tool would write it: without our digest."""
    make_adapter(7, 2).save(directory)
    (directory / "lorchestra.json").unlink()
    from safetensors.torch import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    tensors[first][0, 0] = float("nan")
    save_file(tensors, directory / "adapter_model.safetensors")


class World:
    """A server with good adapters, bad ones beside them, and roots to load from."""

    def __init__(self, place, server, keys, secrets):
        self.place, self.server, self.keys, self.secrets = place, server, keys, secrets
        self.client = httpx2.Client(base_url=server.url, timeout=60)

    def headers(self, tenant="operator"):
        return {"Authorization": f"Bearer {self.secrets[tenant]}"}

    def post(self, path, body, tenant="operator"):
        return self.client.post(path, json=body, headers=self.headers(tenant))

    def complete(self, tenant="operator", **body):
        return self.post("/v1/completions", COMPLETION | body, tenant)

    def load(self, name, path):
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def models(self):
        return [card["id"] for card in self.client.get("/v1/models", headers=self.headers()).json()["data"]]

    def refused(self, response, status=400, param=None, code=None, says=""):
        """OpenAI's form, and no place on this server that the client did not name."""
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"] != "server_error"
        assert says in error["message"]
        sent = response.request.content.decode("utf-8", "replace")
        if str(self.place) not in sent:
            assert str(self.place) not in response.text
        if param is not None:
            assert (error["param"] or "").split(".")[0] == param
        if code is not None:
            assert error["code"] == code
        return error


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    root, outside = place / "root", place / "outside"
    for name, seed in {"clinic": 1, "audit": 2, "later": 3, "replaced": 4}.items():
        make_adapter(seed, 4).save(root / name)
    make_adapter(5, 4).save(outside / "secret")
    base = make_base(place / "model")
    there = {"clinic": "clinic", "audit": "audit", "replaced": "replaced"}
    bad = {
        "foreign": replace(make_adapter(6, 2), base=BaseId(name="other", weights="sha256:" + "0" * 64)),
        "elsewhere": one_module("transformer.h.0.attn.c_attn", 5, 7),
        "partly": Adapter(make_adapter(6, 2).modules | one_module("model.layers.7.mlp.up_proj", 96, 32).modules),
        "misshapen": one_module(Q, 5, 7),
        "oversized": make_adapter(8, 400),
        "wide": one_module(Q, 32, 32, rank=300, value=0.01),
        "overflows": make_adapter(9, 4, size=1e30),
    }  # fmt: skip
    for name, adapter in bad.items():
        adapter.save(root / name)
        there[name] = name
    write_nan(root / "nan")
    make_adapter(10, 2).save(root / "looping")
    (root / "looping" / "chat_template.jinja").write_text(LOOPING)
    there["looping"] = "looping"
    secrets = make_keys(place / "keys.yaml", {"acme": ["clinic"], "beta": ["audit"], "gone": ["clinic"]})
    words = [f"--adapter={name}={root / path}" for name, path in there.items()]
    words += ["--name", "base", "--keys", str(place / "keys.yaml"), "--memory", "0.5MB", "--max-batch", "8"]
    words += ["--enable-load", "--lora-root", str(root), "--alias", "both=clinic=0.5+audit=0.5"]
    with serving(base, place, *words) as server:
        yield World(place, server, place / "keys.yaml", secrets)
        assert server.process.poll() is None
        assert "Traceback" not in server.stderr.read_text()


class Neighbours(threading.Thread):
    """Asks the same of four models, again and again, and compares with what they said when nobody else asked."""

    ASKED = (
        {"model": "clinic", "max_tokens": 12, "logprobs": 2},
        {"model": "audit", "max_tokens": 12, "temperature": 1.0, "seed": 5},
        {"model": "base", "max_tokens": 12, "logprobs": 1},
        {"model": "clinic=0.5+audit=0.5", "max_tokens": 9},
    )

    def __init__(self, world):
        super().__init__()
        self.ended, self.rounds, self.problems = threading.Event(), 0, []
        self.headers, self.client = world.headers(), httpx2.Client(base_url=world.server.url, timeout=60)
        self.before = [self.ask(body) for body in self.ASKED]
        assert not any("failed" in text for text, _ in self.before)

    def ask(self, body):
        told = self.client.post("/v1/completions", json=COMPLETION | body, headers=self.headers)
        choice = told.json()["choices"][0] if told.status_code == 200 else {"failed": told.text}
        logprobs = choice.pop("logprobs", None) or {"token_logprobs": []}
        return json.dumps(choice), logprobs["token_logprobs"]

    def run(self):
        while not self.ended.is_set():
            for body, (text, logprobs) in zip(self.ASKED, self.before, strict=True):
                now = self.ask(body)
                if now[0] != text or now[1] != pytest.approx(logprobs, abs=1e-4):
                    self.problems.append((body, text, now))
            self.rounds += 1


@pytest.fixture(scope="module")
def beside(world):
    running = Neighbours(world)
    running.start()
    yield running
    running.ended.set()
    running.join(60)


@pytest.fixture(autouse=True)
def neighbours(beside):
    """Run beside each test, and are answered as before."""
    rounds = beside.rounds
    yield
    while beside.rounds < rounds + 2 and beside.is_alive():
        beside.ended.wait(0.01)
    assert beside.is_alive()
    assert beside.problems == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("foreign", "base"), ("elsewhere", "does not have"), ("partly", "does not have"), ("misshapen", "shape"),
        ("oversized", "memory"), ("wide", "300"), ("overflows", "not finite"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["whole", "stream", "scored", "chat", "mixture", "choices"])
def test_an_adapter_that_cannot_be_served_is_told_to_who_asks_for_it(world, name, says, shape):
    ask = {
        "whole": lambda: world.complete(model=name),
        "stream": lambda: world.complete(model=name, stream=True),
        "scored": lambda: world.complete(model=name, echo=True, logprobs=1, max_tokens=0),
        "chat": lambda: world.post("/v1/chat/completions", CHAT | {"model": name}),
        "mixture": lambda: world.complete(model=f"clinic=0.5+{name}=0.5"),
        "choices": lambda: world.complete(model=name, n=3),
    }[shape]
    for _ in range(2):
        error = world.refused(ask(), 400, param="model", code="adapter_unusable", says=says)
        assert name in error["message"]


def test_a_chat_template_that_never_ends_is_ended(world, neighbours):
    refused = world.post("/v1/chat/completions", CHAT | {"model": "looping"})
    world.refused(refused, param="messages", says="goes through more than")
    assert world.complete(model="looping").status_code == 200
    world.refused(world.load("again", "looping"), says="does not render a question: the template goes through")


def test_loading_what_is_no_good_is_refused_and_changes_nothing(world):
    root, before = world.place / "root", world.models()
    for name in ("foreign", "elsewhere", "partly", "misshapen", "oversized", "wide", "nan"):
        world.refused(world.load(f"new-{name}", name), 400, code="adapter_unusable")
    spoil = {
        "no-config": lambda d: (d / "adapter_config.json").unlink(),
        "no-weights": lambda d: (d / "adapter_model.safetensors").unlink(),
        "config-is-no-json": lambda d: (d / "adapter_config.json").write_text("{"),
        "config-is-a-list": lambda d: (d / "adapter_config.json").write_text("[]"),
        "config-has-no-rank": lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "config-of-another-method": lambda d: (d / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
        "weights-are-empty": lambda d: (d / "adapter_model.safetensors").write_bytes(b""),
        "weights-are-cut": lambda d: os.truncate(d / "adapter_model.safetensors", 900),
        "header-is-endless": lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 64),
        "header-is-no-json": lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"notjson!"),
        "weights-are-a-pickle": lambda d: torch.save({"a": 1}, d / "adapter_model.safetensors"),
        "weights-are-a-directory": lambda d: ((d / "adapter_model.safetensors").unlink(),
                                              (d / "adapter_model.safetensors").mkdir()),
        "weights-are-other": lambda d: shutil.copy(root / "audit" / "adapter_model.safetensors", d),
        "sidecar-is-no-json": lambda d: (d / "lorchestra.json").write_text("{"),
        "sidecar-is-a-list": lambda d: (d / "lorchestra.json").write_text("[1]"),
        "defaults-are-absurd": lambda d: (d / "serve.yaml").write_text("sampling: {temperature: 99}"),
        "defaults-are-no-yaml": lambda d: (d / "serve.yaml").write_text("sampling: ["),
        "template-is-none": lambda d: (d / "chat_template.jinja").write_text("{% for %}"),
        "template-breaks-out": lambda d: (d / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
    }  # fmt: skip
    for name, make in spoil.items():
        make_adapter(3, 4).save(root / f"spoiled-{name}")
        make(root / f"spoiled-{name}")
        answer = world.load(f"new-{name}", f"spoiled-{name}")
        assert 400 <= answer.status_code < 500, (name, answer.text)
        world.refused(answer, answer.status_code)
    assert world.models() == before
    for name in spoil:
        world.refused(world.complete(model=f"new-{name}"), 404, code="model_not_found")


def test_an_adapter_that_changes_on_the_disk_after_it_was_registered_is_refused(world):
    """It was not in memory yet, so that nothing else than its digest can tell."""
    shutil.copy(world.place / "root/audit/adapter_model.safetensors", world.place / "root/replaced")
    for _ in range(2):
        world.refused(world.complete(model="replaced"), 400, code="adapter_unusable", says="lorchestra.json")


def test_a_name_that_is_taken_away_is_unknown_and_may_come_back(world):
    assert world.load("later", "later").status_code == 200
    text = world.complete(model="later").json()["choices"][0]["text"]
    world.refused(world.load("later", "audit"), 400, param="lora_name", says="other weights")
    unload = {"lora_name": "later"}
    assert world.post("/v1/unload_lora_adapter", unload).status_code == 200
    world.refused(world.complete(model="later"), 404, code="model_not_found")
    world.refused(world.post("/v1/unload_lora_adapter", unload), 404, code="model_not_found")
    assert world.load("later", "later").status_code == 200
    assert world.complete(model="later").json()["choices"][0]["text"] == text
    assert world.post("/v1/unload_lora_adapter", unload).status_code == 200


def test_a_key_that_is_revoked_is_nobodys(world):
    assert world.complete("gone").status_code == 200
    remove_key(world.keys, "gone")
    for _ in range(100):
        answer = world.complete("gone")
        if answer.status_code != 200:
            break
        threading.Event().wait(0.1)
    world.refused(answer, 401)


def test_another_tenants_adapter_is_as_if_it_were_not(world):
    nobody = world.refused(world.complete("acme", model="nobody"), 404, code="model_not_found")
    other = world.refused(world.complete("acme", model="audit"), 404, code="model_not_found")
    assert nobody["message"].replace("nobody", "audit") == other["message"]
    for model in ("both", "clinic=0.5+audit=0.5", "audit=0"):
        world.refused(world.complete("acme", model=model), 404, code="model_not_found")
    for path, body in (("load", {"lora_name": "x", "lora_path": "later"}), ("unload", {"lora_name": "clinic"})):
        world.refused(world.post(f"/v1/{path}_lora_adapter", body, "acme"), 403)
    world.refused(world.client.get("/metrics", headers=world.headers("acme")), 403)


@pytest.mark.parametrize(
    "model",
    [
        "../clinic", "clinic/../audit", "/etc/passwd", "clinic\x00", "clinic ", " clinic", "CLINIC", "clinic@v9",
        "clinic@", "clinic@sha256:", "clinic@sha256:0000", "..", ".", "%2e%2e", "clinic=", "=1", "+", "clinic=1+",
        "clinic=nan", "clinic=inf", "clinic=1e999", "clinic=1+clinic=1", "clinic=0.5+nobody=0.5",
        "+".join(f"clinic=0.{i}" for i in range(1, 10)), "base=1+clinic=1", "auto", "a" * 2048, "a" * 2049, "",
        "\ud800", "诊所", "clinic\n", "clinic=1e38+audit=1e38", None, 1, [], {}, True,
    ],
    ids=lambda model: repr(model)[:30],
)  # fmt: skip
def test_names_of_nothing(world, model):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        content = json.dumps(body | {"model": model}).encode()
        headers = world.headers() | {"content-type": "application/json"}
        answer = world.client.post(path, content=content, headers=headers)
        assert answer.status_code in (400, 404), answer.text
        world.refused(answer, answer.status_code)


ABSURD = {
    "max_tokens": [-1, 513, 2**31, 2**70, 1.5, "4", True, [], {}],
    "temperature": [-0.1, 2.1, 1e308, "0", [], True],
    "top_p": [-0.1, 1.1, "1", []], "top_k": [-2, 2**31, 1.5, "1"], "min_p": [-0.1, 1.1],
    "n": [0, -1, 129, 10**9, 1.5, "1"], "seed": [2**63, -(2**63) - 1, 1.5, "1"],
    "stop": [1, [1], ["a"] * 5, "", [""], {}, "a" * 100_000],
    "logit_bias": [
        {"a": 1}, {"-1": 1}, {"260": 1}, {"1": 101}, {"1": -101}, {"1": "1"}, {"1": None}, [], {"9" * 40: 1},
        {str(i): 1 for i in range(1025)},
    ],
    "presence_penalty": [-2.1, 2.1, "1"], "frequency_penalty": [-2.1, 2.1, []],
    "logprobs": [-1, 6, 1.5, "1"], "echo": ["yes", 1], "suffix": ["x", 1], "best_of": [0, 2, 999],
    "min_tokens": [-1, 5, 2**31], "stop_token_ids": [[-1], [2**40], ["a"], list(range(257)), 1],
    "stream": ["yes", 1], "stream_options": [{"include_usage": "yes"}, {"no": 1}, 1],
    "repetition_penalty": [0, 1.1, 11],
    "prompt": ["", [], [""], [[]], [-1], [260], [2**40], [1.5], ["a", 1], [["a"]], {}, 1, None, True, [[1], [999]],
        "a" * 513, [9] * 513, ["a"] * 2049, "a" * 10**6],
    "user": [1], "no_such_field": [1], "promt": ["a"], "response_format": [{"type": "json_object"}],
    "structured_outputs": [{"json": {}}], "truncate_prompt_tokens": [1], "skip_special_tokens": [False],
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(ABSURD))
def test_absurd_parameters_name_their_field(world, field):
    for value in ABSURD[field]:
        for stream in (False, True):
            body = ({"stream": True} if stream else {}) | {field: value}
            answer = world.complete(**body)
            assert answer.status_code in (400, 413), (field, value, answer.text)
            error = world.refused(answer, answer.status_code)
            assert field in (error["param"] or "") or field in error["message"], (field, str(value)[:60], error)


@pytest.mark.parametrize(
    "messages",
    [
        [], None, "hello", [{}], [{"role": "user"}], [{"role": "king", "content": "a"}], [{"content": "a"}],
        [{"role": "user", "content": 1}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": "a", "contents": "b"}], [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": "a" * 600}], [{"role": "user", "content": "a"}] * 4097,
        [{"role": "user", "content": "\ud800"}], [[["user"]]],
    ],
    ids=lambda messages: repr(messages)[:40],
)  # fmt: skip
def test_absurd_conversations(world, messages):
    content = json.dumps(CHAT | {"messages": messages}).encode()
    headers = world.headers() | {"content-type": "application/json"}
    world.refused(world.client.post("/v1/chat/completions", content=content, headers=headers), 400)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400), (b"{", 400), (b"null", 400), (b"[1]", 400), (b'"a"', 400), (b"\xff\xfe{}", 400), (b"\0" * 100, 400),
        (b'{"model": NaN}', 400), (b'{"model": "clinic", "prompt": "a", "temperature": Infinity}', 400),
        (b'{"model": "clinic", "prompt": "\xff"}', 400), (b'{"model": "clinic", "prompt": "\\ud800"}', 400),
        (b"[" * 200_000, 400), (b'{"a":' * 100_000, 400), (b'{"prompt": "a", "prompt": "b"}', 400),
        (b'{"model": "clinic", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", 400),
        (b'{"model": "clinic", "prompt": "' + b"a" * (9 << 20) + b'"}', 413),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
@pytest.mark.parametrize("path", ["completions", "chat/completions", "load_lora_adapter", "unload_lora_adapter"])
def test_malformed_bodies(world, path, content, status):
    headers = world.headers() | {"content-type": "application/json"}
    world.refused(world.client.post(f"/v1/{path}", content=content, headers=headers), status)


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\1\2\3\r\n\r\n", b"GET\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{",
    ],
    ids=lambda sent: repr(sent)[:40],
)  # fmt: skip
def test_what_is_no_http_harms_nobody(world, sent):
    host, port = world.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        said = b""
        with contextlib.suppress(OSError):  # it may hang up before it has read everything
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(4096)
    assert b" 200 " not in said[:20]
    assert world.client.get("/health").status_code == 200


def test_paths_lead_nowhere_but_under_the_roots(world):
    root, outside = world.place / "root", world.place / "outside"
    (root / "link-out").symlink_to(outside / "secret")
    (root / "link-up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "weights-out").mkdir()
    shutil.copy(root / "later/adapter_config.json", root / "weights-out")
    (root / "weights-out/adapter_model.safetensors").symlink_to(outside / "secret/adapter_model.safetensors")
    (root / "pipe").mkdir()
    shutil.copy(root / "later/adapter_config.json", root / "pipe")
    os.mkfifo(root / "pipe/adapter_model.safetensors")
    (root / "link-in").symlink_to("later")
    before = world.models()
    tricks = [
        "../outside/secret", str(outside / "secret"), "link-out", "link-up/outside/secret",
        "later/../../outside/secret", "weights-out", "loop", "/", "/etc", "/proc/self/cwd", "~", "~root",
        "/proc/self/root" + str(outside / "secret"), "later\0", "a" * 4000, "/dev/zero", "file:///" + str(root),
        "\\\\server\\share", "later/adapter_config.json", ".", "", "no-such", "pipe", "//later",
        "./../root/../outside/secret",
    ]  # fmt: skip
    for trick in tricks:
        answer = world.load("tricked", trick)
        assert 400 <= answer.status_code < 500, (trick, answer.text)
        world.refused(answer, answer.status_code)
    # What is not there and what may not be read are told alike.
    there, not_there = (world.load("x", str(outside / name)).json()["error"]["message"] for name in ("secret", "no"))
    assert there.replace("secret", "no") == not_there
    for name in ("../x", "a/b", "a\0", "", ".", "base", "both", "clinic@v1", "a+b", "a=1", "x" * 600, "auto"):
        answer = world.load(name, "later")
        assert 400 <= answer.status_code < 500, (name, answer.text)
        world.refused(answer, answer.status_code, param="lora_name")
        world.refused(world.post("/v1/unload_lora_adapter", {"lora_name": name or "base"}), answer.status_code
                      if len(name) > 512 else 404)  # fmt: skip
    assert world.models() == before
    for path in ("link-in", str(root / "later"), "./later", "later/"):
        assert world.load("linked", path).status_code == 200, path
    assert world.post("/v1/unload_lora_adapter", {"lora_name": "linked"}).status_code == 200


def test_a_tenants_full_queue_says_when_to_come_back_and_is_its_own_alone(world):
    """2,048 sequences of one request are more than a tenant may have waiting."""
    answer = world.complete("acme", prompt=["a"] * 1024, n=2, max_tokens=1)
    world.refused(answer, 429, code="rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    assert world.complete("acme").status_code == 200


@pytest.mark.parametrize("model", [None, "clinic", "clinic=0.5+audit=-0.3"])
def test_whatever_the_schema_allows_is_no_failure_of_the_real_engine(world, model):
    schema = schemathesis.openapi.from_url(f"{world.server.url}/openapi.json")
    reached = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=30, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(operation.as_strategy(), st.data())
        def check(case, data):
            nonlocal reached
            if model is not None and isinstance(case.body, dict) and "lora_name" not in case.body:
                # Few of the optional fields at once, and often a plain text: all of it drawn hardly ever passes.
                optional = sorted(set(case.body) - {"prompt", "messages", "model"})
                kept = data.draw(st.sets(st.sampled_from(optional), max_size=2)) if optional else set()
                fields = {name: case.body[name] for name in case.body if name in kept | {"prompt", "messages"}}
                if data.draw(st.booleans()):
                    text = data.draw(st.text(min_size=1, max_size=20))
                    plain = {"prompt": text, "messages": [{"role": "user", "content": text}]}
                    fields |= {name: plain[name] for name in plain if name in fields}
                case.body = fields | {"model": model, "max_tokens": 2, "n": 1}
            response = case.call(headers=world.headers())
            reached += response.status_code == 200 and isinstance(case.body, dict)
            case.validate_response(
                response, checks=[not_a_server_error, response_schema_conformance, status_code_conformance]
            )

        check()
    assert model is None or reached > 5
