"""A small real engine for the tests of what stands in front of one: the tiny model, greedy, merged adapters."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from torch.func import functional_call

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.serve.engine import Answer, Call, Chunk, StoppingError, Usage


def write_adapter(directory: Path, seed: int, parents: tuple[Parent, ...] = ()) -> Path:
    """A PEFT directory for the tiny model, whose ΔW changes what it says."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in (0, 1):
        for name, (m, n) in {"q_proj": (32, 32), "o_proj": (32, 32)}.items():
            B, A = torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator)
            modules[f"model.layers.{layer}.self_attn.{name}"] = LowRank(B, A * 0.3)
    made_by = "fusion" if parents else "foreign"
    Adapter(modules, lineage=Lineage(made_by=made_by, parents=parents)).save(directory)
    return directory


class PlainEngine:
    """Answers completions with the base's weights plus the adapters', summed for each token."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.loaded: dict[str, Adapter] = {}
        self.ready = False
        self.stopped = None
        self.hold = asyncio.Event()  # a test may keep answers waiting
        self.hold.set()

    async def start(self) -> None:
        self.ready = True

    async def stop(self, grace: float) -> None:
        self.ready, self.stopped = False, grace

    async def load(self, adapter) -> None:
        if adapter.key not in self.loaded:
            found = Adapter.load(adapter.directory)
            assert found.digest == adapter.digest
            self.loaded[adapter.key] = found

    async def unload(self, adapter) -> None:
        self.loaded.pop(adapter.key, None)

    def resident(self):
        return list(self.loaded)

    async def answer(self, call: Call) -> Answer:
        text, usage = "", Usage(0, 0)
        async for chunk in self.stream(call):
            text, usage = text + chunk.choices[0]["text"], chunk.usage
        return Answer([{"index": 0, "text": text, "finish_reason": "length"}], usage)

    async def stream(self, call: Call):
        if not self.ready:
            raise StoppingError("not ready")
        for adapter, _ in call.target.members:
            await self.load(adapter)
        members = [(self.loaded[adapter.key], weight) for adapter, weight in call.target.members]
        ids = self.tokenizer(call.body.prompt)["input_ids"]
        prompt = len(ids)
        for _ in range(call.body.max_tokens or 8):
            await self.hold.wait()
            ids = [*ids, self._next(ids, members)]
            text = f"{ids[-1]} "  # a number tells more than half a character
            yield Chunk([{"index": 0, "text": text, "finish_reason": None}], Usage(prompt, len(ids) - prompt))

    def _next(self, ids, members) -> int:
        summed = {name: weight.clone() for name, weight in self.model.named_parameters()}  # a tied one once
        for adapter, weight in members:
            for path, update in adapter.modules.items():
                summed[f"{path}.weight"] += weight * update.dense()
        return int(functional_call(self.model, summed, (torch.tensor([ids]),)).logits[0, -1].argmax())
