"""A gateway that follows a real registry and answers over real HTTP, in a thread; and adapters for its base."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import httpx2
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.tenants import PlainEngine

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage
from lorchestra.adapter.lowrank import LowRank
from lorchestra.cli import serve_registry
from lorchestra.registry.access import Key, Keys, hashed
from lorchestra.registry.registry import Registry
from lorchestra.registry.snapshot import Snapshot
from lorchestra.serve.app import HttpSettings, create_app
from lorchestra.serve.gateway import TenantGateway
from lorchestra.serve.metrics import Metrics
from lorchestra.serve.outcomes import Outcomes
from lorchestra.serve.request_log import RequestLog
from lorchestra.serve.routing import Router
from lorchestra.serve.versions import Versions, View

BASE = BaseId("tiny", "sha256:" + "a" * 64, "sha256:" + "b" * 64, "sha256:" + "c" * 64)
KEYS = Keys((
    Key(name="acme", sha256=hashed("acme"), adapters=["clinic"]),
    Key(name="rival", sha256=hashed("rival"), adapters=["clinic"]),
    Key(name="slow", sha256=hashed("slow"), adapters=["clinic"], rpm=2),
    Key(name="ops", sha256=hashed("ops"), role="operator", adapters="all"),
))  # fmt: skip


def write(directory: Path, seed: int, base: BaseId = BASE, scale: float = 1.0) -> Path:
    """A PEFT directory for the tiny model, whose ΔW changes what it says."""
    made, modules = torch.Generator().manual_seed(seed), {}
    for layer in (0, 1):
        B, A = torch.randn(32, 2, generator=made), torch.randn(2, 32, generator=made)
        modules[f"model.layers.{layer}.self_attn.q_proj"] = LowRank(scale * B, A)
        B, A = torch.randn(32, 2, generator=made), torch.randn(2, 32, generator=made)
        modules[f"model.layers.{layer}.self_attn.o_proj"] = LowRank(scale * B, A)
    return Adapter(modules, base, Lineage(made_by="stage", name="sft", task="sft")).save(directory)


class SlowEngine(PlainEngine):
    """Counts what it is told to load and unload; a token takes ``pause`` seconds; one adapter may fail."""

    def __init__(self):
        super().__init__(make_tiny_model(), make_tiny_tokenizer())
        self.pause, self.broken, self.unloaded, self.using = 0.0, set(), [], {}

    async def load(self, adapter):
        await asyncio.sleep(0)
        await super().load(adapter)

    async def unload(self, adapter):
        while self.using.get(adapter.key):
            await asyncio.sleep(0.01)
        self.unloaded.append(adapter.reference)
        await super().unload(adapter)

    async def stream(self, call):
        keys = [adapter.key for adapter, _ in call.target.members]
        for key in keys:
            self.using[key] = self.using.get(key, 0) + 1
        try:
            for adapter, _ in call.target.members:
                if adapter.reference in self.broken:
                    raise ZeroDivisionError("this version fails")
            async for chunk in super().stream(call):
                yield chunk
                await asyncio.sleep(self.pause)
        finally:
            for key in keys:
                self.using[key] -= 1


class Gateway:
    """One gateway process, as far as anybody outside can tell.

    Args:
        url: of the registry.
        cache: of local copies.
        versions: instead, as ``lorchestra serve`` makes them.
    """

    def __init__(self, url: str = "", cache: Path = Path(), *, keys=None, prompts=False, grace=3600.0, base=BASE,
                 adapters=(), aliases=None, advance=0.2, versions=None):  # fmt: skip
        self.out, self.operator = io.StringIO(), "ops" if keys else None
        self.engine = SlowEngine()
        self.versions = versions or Versions(Registry.open(url), base, cache, grace)
        self.registry = self.versions.registry
        self.metrics = Metrics("base")
        if versions is None:
            self.versions.view = View(Snapshot.read(self.registry.catalog))
        self.router = Router("base", adapters, aliases, versions=self.versions)
        self.follower, told = serve_registry.follower(self.router, self.engine, self.metrics)
        self.outcomes = Outcomes(self.follower, told, prompts=prompts, advance=advance)
        self.gateway = TenantGateway(
            self.engine, self.router, keys, self.metrics, RequestLog(self.out, prompts), may_load=True,
            follower=self.follower, outcomes=self.outcomes,
        )  # fmt: skip
        app = create_app(self.gateway, HttpSettings(True, registry=True))
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=2
        )  # a client that left half a request does not hold the test up
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx2.Client(base_url=self.url, timeout=60)

    async def _serve(self):
        await self.engine.start()
        self.follower.start()
        self.outcomes.start()
        await self.server.serve()
        await self.outcomes.stop()
        await self.follower.stop()
        await self.engine.stop(0)

    def stop(self):
        if not self.thread.is_alive():
            return
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.registry.close()

    def ask(self, model="clinic", key=None, tokens=3, headers=None, **more):
        """The response to a completion."""
        auth = {"authorization": f"Bearer {key}"} if key else {}
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, **more}
        return self.client.post("/v1/completions", json=body, headers=auth | (headers or {}))

    def text(self, model="clinic", **more) -> str:
        answer = self.ask(model, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def by(self, model="clinic", **more) -> str:
        """Which version answers; or the error's status and code."""
        answer = self.ask(model, **more)
        if answer.status_code == 200:
            return answer.headers.get("x-lorchestra-model", "base")
        return f"{answer.status_code} {answer.json()['error']['code']}"

    @contextmanager
    def streaming(self, model="clinic", tokens=200, **more):
        """Lines of a stream that has begun."""
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body, **more) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line)
            yield response, next(lines), lines

    def get(self, path, key=None):
        return self.client.get(path, headers={"authorization": f"Bearer {key}"} if key else {})

    def post(self, path, body, key=None):
        return self.client.post(path, json=body, headers={"authorization": f"Bearer {key}"} if key else {})

    def report(self):
        return self.get("/admin/registry", self.operator).json()

    def counted(self, name, **labels) -> float:
        page = self.get("/metrics", self.operator).text
        return sum(
            sample.value for family in text_string_to_metric_families(page) for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )  # fmt: skip

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


def until(holds: Callable[[], object], seconds: float = 20.0) -> float:
    """Wait until it holds; how long that took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it never came"
        time.sleep(0.03)
    return time.monotonic() - began
