"""A whole server in this process: the tiny model in the embedded engine, adapters, keys, gates, ``auto``, and HTTP."""

from __future__ import annotations

import io
import json
from contextlib import asynccontextmanager

import torch
from starlette.testclient import TestClient
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.embedded.worlds import adapter_for

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.cli import serve_registry
from lorchestra.gate import prototypes
from lorchestra.gate.features import FeatureSpec, features
from lorchestra.gate.network import AdapterId, Gate, GateSpec, Known
from lorchestra.registry.access import Key, Keys, hashed
from lorchestra.serve.adapter_files import served
from lorchestra.serve.app import HttpSettings, create_app
from lorchestra.serve.auto import Auto
from lorchestra.serve.choosing import Choosing
from lorchestra.serve.embedded.answers import TextEngine
from lorchestra.serve.embedded.core import Limits, Setup
from lorchestra.serve.embedded.engine import ContinuousEngine
from lorchestra.serve.embedded.local import loaded as loaded_here
from lorchestra.serve.embedded.process import loaded as loaded_apart
from lorchestra.serve.gateway import TenantGateway
from lorchestra.serve.metrics import Metrics
from lorchestra.serve.request_log import RequestLog
from lorchestra.serve.routing import Router

BASE = BaseId("tiny", "sha256:" + "a" * 64, "sha256:" + "b" * 64)
NAMES = ("a", "b", "c")
EMBEDDINGS = FeatureSpec()
KEYS = Keys((
    Key(name="whole", sha256=hashed("whole"), adapters=list(NAMES)),
    Key(name="part", sha256=hashed("part"), adapters=["a", "b"]),
    Key(name="rival", sha256=hashed("rival"), adapters=["c"]),
    Key(name="bare", sha256=hashed("bare"), adapters=[]),
    Key(name="ops", sha256=hashed("ops"), role="operator", adapters="all"),
))  # fmt: skip
# What each adapter of `prompted` is for, in bytes that hardly any other one's prompts have.
KINDS = {"a": "0123456789 ", "b": "ABCDEFGHIJK ", "c": "的一是不了人我在有他"}


def ids_of(text: str) -> list[int]:
    """As the server reads a chat with this one turn."""
    chat = [{"role": "user", "content": text}]
    return make_tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def texts_of(kind: str, count: int, seed: int = 0) -> list[str]:
    """Prompts of a kind."""
    noise = torch.Generator().manual_seed(seed)
    letters = KINDS[kind]
    return ["".join(letters[i] for i in torch.randint(len(letters), (30,), generator=noise)) for _ in range(count)]


def write_adapters(place, names=NAMES, prompted=False):
    """Name → directory of an adapter for the tiny model; with prototypes of its prompts, if asked."""
    model, out = make_tiny_model(), {}
    for i, name in enumerate(names):
        out[name] = adapter_for(model, i, rank=(3, 8, 5)[i]).save(place / name)
        if prompted:
            x = features(model, [ids_of(text) for text in texts_of(name, 150)], prototypes.FEATURES)
            prototypes.save(prototypes.of_prompts(Adapter.load(out[name]), x), out[name])
    return out


def gate_of(directories, name="triage", seed=0, width=32, spec=EMBEDDINGS, base=BASE, **settings) -> Gate:
    """A gate whose network is drawn at random: its coefficients differ between prompts."""
    members = tuple(AdapterId(member, Adapter.load(path).digest) for member, path in directories.items())
    n = 2 * width if spec.last else width
    usual = features(make_tiny_model(), [ids_of(text) for kind in KINDS for text in texts_of(kind, 4)], spec)
    gate = Gate(GateSpec(name, members, base, spec, **settings), usual.mean(dim=0), usual.std(dim=0), seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    gate.remember(torch.randn(5, n), [Known(f"sha256:{i}", "domain", f"training prompt {i}") for i in range(5)])
    return gate.requires_grad_(False)


class World:
    """A server; ``with World(…) as world``.

    Args:
        base: directory of the tiny model.
        directories: name → directory of an adapter that is served.
        gates: by name.
        auto: adapters of an answer of ``auto``; ``None``: there is none.
        keys: of the server.
        apart: whether the engine has a process of its own.
        above: the gate with the last word of ``auto``.
        versions: of a registry, which is followed.
    """

    def __init__(self, base, directories, gates=None, auto=None, keys=KEYS, apart=False, above="", versions=None):
        self.out = io.StringIO()
        adapters = [served(name, directory) for name, directory in directories.items()]
        setup = Setup(base, device="cpu", dtype="float32", limits=Limits())
        core, tokenizer = (loaded_apart if apart else loaded_here)(setup)
        self.metrics = Metrics("base")
        self.engine = TextEngine(ContinuousEngine(core, observer=self.metrics), tokenizer, core.end_ids, core.rows)
        aliases = {"chief": "a"} if "a" in directories else {}
        self.router = Router("base", adapters, aliases, gates=gates or {}, versions=versions)
        follower = serve_registry.follower(self.router, self.engine, self.metrics)[0] if versions else None
        self.auto = Auto(self.engine, base, auto) if auto else None
        self.choosing = Choosing(self.router, self.engine, gates or {}, self.auto, above)
        self.gateway = TenantGateway(
            self.engine, self.router, keys, self.metrics, RequestLog(self.out), may_load=True, choosing=self.choosing,
            follower=follower,
        )  # fmt: skip

        @asynccontextmanager
        async def life(app):
            await self.engine.start()
            if follower:
                follower.start()
            yield
            if follower:
                await follower.stop()
            await self.engine.stop(1)

        self.client = TestClient(create_app(self.gateway, HttpSettings(True), life))

    def __enter__(self):
        self.client.__enter__()
        return self

    def __exit__(self, *error):
        self.client.__exit__(*error)

    def ask(self, model, prompt="hello there", key="whole", tokens=6, chat=False, **more):
        """The response."""
        body = {"model": model, "max_tokens": tokens, "temperature": 0, **more}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        return self.client.post(path, json=body, headers={"authorization": f"Bearer {key}"})

    def said(self, model, prompt="hello there", **more):
        """The choices, the coefficients that the header tells, and the field."""
        answer = self.ask(model, prompt, **more)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        return body["choices"], coefficients(answer.headers.get("x-lorchestra-coefficients")), body.get("lorchestra")

    def said_raw(self, model, **more):
        """The choices, the header that tells the coefficients, and the field."""
        answer = self.ask(model, **more)
        return answer.json()["choices"], answer.headers["x-lorchestra-coefficients"], answer.json()["lorchestra"]

    def refused(self, model, **more):
        answer = self.ask(model, **more)
        assert answer.status_code >= 400, answer.text
        return answer.status_code, answer.json()["error"]["message"]

    def models(self, key="whole"):
        answer = self.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        return {model["id"]: model for model in answer.json()["data"]}

    def page(self):
        return self.client.get("/metrics", headers={"authorization": "Bearer ops"}).text

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


def coefficients(header):
    """``a=0.7,b=0.3`` as a mapping; ``none`` as an empty one."""
    if header is None or header == "none":
        return None if header is None else {}
    return {name: float(c) for name, c in (part.split("=") for part in header.split(","))}


def mixture(told) -> str:
    """What ``model`` says for these coefficients."""
    return "+".join(f"{name}={c!r}" for name, c in told.items()) if told else "base"
