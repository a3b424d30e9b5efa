"""A plain server on the tiny model: no cache, nothing shared; and a gateway with two keys."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lorchestra.serve.embedded.answers import TextEngine
from lorchestra.serve.embedded.generation import Generation, Produced, Sampling, Token
from lorchestra.serve.engine import Call, RequestError, Served, Target
from lorchestra.serve.ports import Caller, Card, ForbiddenError, UnauthenticatedError, UnknownModelError


class PlainTokens:
    """A token engine as straight as can be: the whole sequence through the model for every token.

    Args:
        base: a transformers model.
        tuned: name of an adapter → the model with it merged.
    """

    def __init__(self, base, tuned=None, max_length=512):
        self.base, self.tuned, self.max_length = base, dict(tuned or {}), max_length
        self.ready, self.running, self.ended, self.seen = False, set(), [], []
        self.pause = 0.0
        self._loaded: dict[str, Served] = {}

    async def start(self):
        self.ready = True

    async def stop(self, grace):
        self.ready = False

    async def load(self, adapter):
        self._loaded[adapter.key] = adapter

    async def unload(self, adapter):
        self._loaded.pop(adapter.key, None)

    def resident(self) -> Sequence[str]:
        return list(self._loaded)

    async def generate(self, generation: Generation):
        assert generation.id not in self.running
        self.seen.append(generation)
        self.running.add(generation.id)
        try:
            model = self.tuned[generation.members[0][0].name] if generation.members else self.base
            async for produced in self._generate(model, generation.prompt, generation.sampling):
                yield produced
                await asyncio.sleep(self.pause)
        finally:
            self.running.remove(generation.id)
            self.ended.append(generation.id)

    async def _generate(self, model, prompt, how: Sampling):
        ids = list(prompt)
        generator = torch.Generator().manual_seed(how.seed % 2**63) if how.seed is not None else None
        if how.prompt_logprobs is not None:
            logits = model(torch.tensor([ids])).logits[0].float()
            for i, bias in how.logit_bias.items():
                logits[:, i] += bias
            logprobs = torch.log_softmax(logits, -1)
            scored = [Token(ids[0])]
            scored += [token(logprobs[i], ids[i + 1], how.prompt_logprobs) for i in range(len(ids) - 1)]
            yield Produced(prompt=tuple(scored))
        for made in range(how.max_tokens):
            logits = model(torch.tensor([ids])).logits[0, -1].float()
            for i, bias in how.logit_bias.items():
                logits[i] += bias
            logprobs = torch.log_softmax(logits, -1)
            for i in set(ids[len(prompt) :]):
                logits[i] -= how.presence_penalty + how.frequency_penalty * ids[len(prompt) :].count(i)
            if made < how.min_tokens:
                logits[list(how.stop_ids)] = -torch.inf
            chosen = pick(logits, how, generator)
            if chosen in how.stop_ids:
                yield Produced(finish="stop")
                return
            ids.append(chosen)
            finish = "length" if made + 1 == how.max_tokens else None
            yield Produced((token(logprobs, chosen, how.logprobs),), finish=finish)
        if not how.max_tokens:
            yield Produced(finish="length")


def pick(logits, how: Sampling, generator) -> int:
    if how.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / how.temperature, -1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(-1) - probabilities[order]
    keep = (before < how.top_p) & (probabilities[order] >= how.min_p * probabilities.max())
    if how.top_k:
        keep[how.top_k :] = False
    keep[0] = True
    return int(order[torch.multinomial(probabilities[order] * keep, 1, generator=generator)])


def token(logprobs, chosen: int, alternatives: int | None) -> Token:
    if alternatives is None:
        return Token(chosen)
    top = logprobs.topk(alternatives)
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), likeliest)


class PlainGateway:
    """Keys ``one`` (who sees all) and ``two`` (who sees the base), names, and no limits."""

    def __init__(self, engine: TextEngine, adapters: Sequence[Served] = ()):
        self.engine = engine
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self.loads: list[tuple[str, str]] = []
        self.changes: list[tuple[str, str | None, int, str]] = []
        self.failure: Exception | None = None

    registry_stale = None

    def told(self, kind, request_id, tenant, status, **more):
        self.changes.append((kind, tenant, status, more["model"]))

    @property
    def ready(self):
        return self.engine.ready

    def authenticate(self, authorization):
        tenants = {"Bearer one": "first", "Bearer two": "second"}
        if authorization not in tenants:
            raise UnauthenticatedError("the API key is unknown; send 'Authorization: Bearer <key>'")
        return Caller(tenants[authorization])

    def models(self, caller):
        adapters = self.adapters.values() if caller.tenant == "first" else ()
        cards = [Card(a.name, 1, "base", a.parents, a.digest, self.engine._tokens.max_length) for a in adapters]
        return [Card("base", 1), *cards]

    def call(self, caller, request_id, body):
        if self.failure is not None:
            raise self.failure
        names = [card.id for card in self.models(caller)]
        if body.model not in names:
            raise UnknownModelError(f"there is no model {body.model!r} for this key", body.model)
        adapter = self.adapters.get(body.model)
        members = ((adapter, 1.0),) if adapter else ()
        return Call(request_id, caller.tenant, Target(body.model, members), body)

    async def answer(self, caller, request_id, body):
        return await self.engine.answer(self.call(caller, request_id, body))

    async def stream(self, caller, request_id, body):
        parts = self.engine.stream(self.call(caller, request_id, body))
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    async def load(self, caller, name, path):
        if caller.tenant != "first":
            raise ForbiddenError("this key may not load adapters")
        if ".." in path:
            raise RequestError(f"lora_path: {path!r} leads out of the adapters' directory", "lora_path")
        self.loads.append((name, path))

    async def unload(self, caller, name):
        if name not in self.adapters:
            raise UnknownModelError(f"there is no model {name!r} for this key", name)
        del self.adapters[name]

    def metrics(self, caller):
        if caller.tenant != "first":
            raise ForbiddenError("metrics are the operator's")
        return b"# HELP up Up.\n# TYPE up gauge\nup 1\n"


@pytest.fixture
def clinic() -> Served:
    return Served(
        "clinic",
        "sha256:" + "c" * 64,
        Path("clinic"),
        parents={"general": 0.3, "medical": 0.5},
        chat_template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[answer]",
        system_prompt="You are a nurse.",
        defaults={"temperature": 0, "max_tokens": 5},
    )


@pytest.fixture
def tokens(tiny_model) -> PlainTokens:
    tuned = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(1)
    for weight in tuned.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return PlainTokens(tiny_model, {"clinic": tuned})


@pytest.fixture
def engine(tokens, tiny_tokenizer) -> TextEngine:
    engine = TextEngine(tokens, tiny_tokenizer, rows=260)
    asyncio.run(engine.start())
    return engine


@pytest.fixture
def gateway(engine, clinic) -> PlainGateway:
    return PlainGateway(engine, [clinic])


@pytest.fixture
def live():
    """``live(app)`` serves it by uvicorn on a port of this machine, until the test ends; the address."""
    import uvicorn

    started = []

    def serve(app) -> str:
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        started.append((server, thread))
        for _ in range(1000):
            if server.started:
                break
            thread.join(0.01)
        assert server.started
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield serve
    for server, thread in started:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
