"""Adapters on the tiny model, an engine on a core, and what a merged model says."""

from __future__ import annotations

import asyncio
import copy
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.serve.conftest import PlainTokens

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.serve.embedded.core import Limits, Setup
from lorchestra.serve.embedded.engine import ContinuousEngine
from lorchestra.serve.embedded.generation import Generation, Sampling
from lorchestra.serve.embedded.local import loaded as loaded_here
from lorchestra.serve.embedded.process import loaded as loaded_apart
from lorchestra.serve.engine import Served

GREEDY = Sampling(max_tokens=8, temperature=0)
PATHS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def adapter_for(model, seed: int, rank: int, size: float = 0.25) -> Adapter:
    noise = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in model.named_modules():
        if path.endswith(PATHS):
            m, n = module.weight.shape
            B, A = torch.randn(m, rank, generator=noise), torch.randn(rank, n, generator=noise)
            modules[path] = LowRank(size * B / rank**0.5, A)
    return Adapter(modules)


def merged(model, *members):
    model = copy.deepcopy(model)
    for adapter, c in members:
        for path, update in adapter.modules.items():
            model.get_submodule(path).weight.data += c * update.dense()
    return model


class World:
    """Adapters of ranks 3 to 20 on disk, the engine, and what a merged model says.

    Args:
        base: directory of the tiny model.
        place: for the adapters.
        apart: whether the core has a process of its own.
        room: for those that wait; the engine's own unless given.
        options: of the core's limits.
    """

    def __init__(self, base, place, apart=False, room=None, **options):
        self.model = make_tiny_model()
        self.adapters = {f"a{i}": adapter_for(self.model, i, rank) for i, rank in enumerate((3, 8, 8, 20))}
        self.served = {}
        for name, adapter in self.adapters.items():
            adapter.save(place / name)
            self.served[name] = Served(name, Adapter.load(place / name).digest, place / name)
        self.heard: list[tuple] = []
        self.apart = apart
        setup = Setup(base, device="cpu", dtype="float32", limits=Limits(**options))
        self.core, _ = (loaded_apart if apart else loaded_here)(setup)
        self.engine = ContinuousEngine(self.core, room, observer=self)
        self._runner = asyncio.Runner()
        self._number = 0

    def waited(self, members, seconds):
        self.heard.append(("waited", tuple(served.name for served, _ in members)))

    def loaded(self, adapter, seconds):
        self.heard.append(("loaded", adapter.name))

    def evicted(self, adapter):
        self.heard.append(("evicted", adapter.name))

    def generation(self, members, prompt, sampling=GREEDY, tenant="t") -> Generation:
        self._number += 1
        named = tuple((self.served[name], c) for name, c in members.items())
        return Generation(f"g{self._number}", tenant, tuple(prompt), named, sampling)

    async def expected(self, generation):
        members = [(self.adapters[served.name], c) for served, c in generation.members]
        plain = PlainTokens(merged(self.model, *members))
        return await collected(plain, replace(generation, members=()))

    def run(self, work, seconds=60):
        """What ``work()`` makes of it, on the one event loop that the engine has."""

        async def inside():
            if not self.engine.ready:
                await self.engine.start()
            return await asyncio.wait_for(work(), seconds)

        return self._runner.run(inside())

    def close(self):
        self._runner.run(self.engine.stop(5))
        self._runner.close()

    def holds_nothing(self):
        """The engine; and the core, where it can be looked at: once it has stopped."""
        assert not self.engine._users.total()
        assert not self.engine._results
        assert not self.engine._asked
        assert not len(self.engine._room)
        if not self.apart:
            self._runner.run(self.engine.stop(5))
            scheduler = self.core._scheduler
            assert not scheduler.running
            assert scheduler._slots.reserved == 0
            assert not scheduler._slots.order()
            assert not self.core._bank._where
            assert not self.core._sequences
            assert not len(self.core._queue)
        return True


async def collected(engine, generation):
    tokens, prompt, finish = [], (), None
    async with aclosing(engine.generate(generation)) as steps:
        async for produced in steps:
            tokens += produced.tokens
            prompt = produced.prompt or prompt
            finish = produced.finish or finish
    return tokens, prompt, finish


def same(found, expected):
    (tokens, prompt, finish), (their_tokens, their_prompt, their_finish) = found, expected
    assert [t.id for t in tokens] == [t.id for t in their_tokens]
    assert finish == their_finish
    assert len(prompt) == len(their_prompt)
    for mine, theirs in zip((*tokens, *prompt), (*their_tokens, *their_prompt), strict=True):
        assert mine.id == theirs.id
        assert (mine.logprob is None) == (theirs.logprob is None)
        if mine.logprob is not None:
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [p for _, p in mine.top] == pytest.approx([p for _, p in theirs.top], abs=1e-4)
