"""``model: auto``: of the adapters that a key may use, those that its prompt is for, by a router of the gate room."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.safetensors_file import entries, weight_files
from lorchestra.errors import LorchestraError
from lorchestra.gate import prototypes
from lorchestra.gate.background import PROMPTS, Background
from lorchestra.gate.prototypes import FEATURES, Prototype
from lorchestra.gate.router import Routed, Router
from lorchestra.serve.wire import ChatRequest, parse

if TYPE_CHECKING:
    from lorchestra.serve.engine import Engine, Served

ROUTERS = 16  # sets of adapters whose router is kept: keys with the same adapters share one
_log = logging.getLogger("lorchestra.serve.auto")


class Auto:
    """Knows the adapters' prototypes, and has a router for each set of adapters that keys may use.

    A router knows the adapters of its set and no others, so that no key's answer depends on what others have. It
    belongs to one event loop; files are read and routers made on a thread.

    Args:
        engine: sees prompts.
        base: directory of the model, whose norm is read.
        k: adapters of an answer, at most.
    """

    def __init__(self, engine: Engine, base: Path, k: int = 1) -> None:
        self._engine, self._base, self._k = engine, base, k
        self._background: Background | None = None
        self._prototypes: dict[str, Prototype | None] = {}  # by digest; None: nothing can be known of it
        self._routers: OrderedDict[frozenset[tuple[str, str]], Router] = OrderedDict()
        self._learning = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "lorchestra-auto")

    async def router(self, present: Mapping[str, Served]) -> Router:
        """The router among these adapters, by the names they have here; those that are new are read first.

        Raises:
            StoppingError: the engine cannot see prompts now.
        """
        which = frozenset((name, adapter.digest) for name, adapter in present.items())
        found = self._routers.get(which)
        if found is not None:
            self._routers.move_to_end(which)
            return found
        async with self._learning:
            if self._background is None:
                self._background = await self._seen()
            background = self._background
            new = {adapter.digest: adapter for adapter in present.values() if adapter.digest not in self._prototypes}
            loop = asyncio.get_running_loop()
            read = await loop.run_in_executor(self._thread, self._read, new.values(), background.x.shape[1])
            self._prototypes |= read
            known = {name: one for name, digest in which if (one := self._prototypes[digest]) is not None}
            found = await loop.run_in_executor(self._thread, Router, known, background)
        self._routers[which] = found
        while len(self._routers) > ROUTERS:
            self._routers.popitem(last=False)
        return found

    def routed(self, router: Router, x: Tensor) -> Routed:
        """Adapters for a prompt with the features ``x`` ``[n]``, with their coefficients."""
        return router.route(x, self._k)

    async def _seen(self) -> Background:
        """What this base makes of plain prompts, asked as any request is."""
        rows = []
        for prompt in PROMPTS:
            body = parse(ChatRequest, {"model": "auto", "messages": [{"role": "user", "content": prompt}]})
            rows.append(list(await self._engine.features(body, FEATURES.layers, FEATURES.last)))
        x = torch.tensor(rows, dtype=torch.float32)
        return Background(x, await asyncio.to_thread(input_norm, self._base, FEATURES.layers, x.shape[1]))

    def _read(self, adapters: Iterable[Served], width: int) -> dict[str, Prototype | None]:
        """On the thread."""
        return {adapter.digest: _prototype(adapter, width) for adapter in adapters}


def _prototype(adapter: Served, width: int) -> Prototype | None:
    found: Prototype | None = None
    try:
        found = prototypes.load(adapter.directory, adapter.digest)
    except LorchestraError as error:
        _log.warning("%s: its prototypes are not used: %s", adapter.key, error)
    if found is not None and (found.features != FEATURES or found.centroids.shape[1] not in (0, width)):
        _log.warning("%s: its prototypes are of other features than this server's; its weights have to do", adapter.key)
        found = None
    if found is None:
        try:
            loaded = Adapter.load(adapter.directory)
        except LorchestraError as error:
            _log.warning("%s is never chosen by auto: %s", adapter.key, error)
            return None
        found = prototypes.of_adapter(loaded) if loaded.digest == adapter.digest else None
    if found is None or (not found.prompts and found.directions.shape[1] != width):
        _log.warning("%s is never chosen by auto: there is nothing to know it by", adapter.key)
        return None
    return found


def input_norm(base: Path, layers: int, width: int) -> Tensor:
    """``[n]``: what the normalised states after ``layers`` are multiplied by before the next layer reads them.

    Ones where the base's files do not say so in the way of the Llama family.
    """
    from safetensors import safe_open

    wanted = f"layers.{layers}.input_layernorm.weight"
    try:
        for file in weight_files(base):
            for entry in entries(file):
                if entry.name.endswith(wanted) and entry.shape == (width,):
                    with safe_open(file, "pt") as opened:
                        found: Tensor = opened.get_tensor(entry.name).float()
                    return found
    except (LorchestraError, OSError) as error:
        _log.warning("the norm of the base is not read (%s); directions are compared without it", error)
    return torch.ones(width)
