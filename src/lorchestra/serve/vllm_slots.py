"""Which adapters a vLLM server holds: loaded once, kept by use, given up only when nobody uses them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from lorchestra.errors import LorchestraError
from lorchestra.serve.vllm_adapters import Portable

log = logging.getLogger(__name__)

Make = Callable[[], Awaitable[Portable]]


class _Entry:
    def __init__(self, task: asyncio.Task[Portable]) -> None:
        self.task = task
        self.uses = 0
        self.leaving = False

    @property
    def portable(self) -> Portable | None:
        """What is loaded, as soon as it is."""
        done = self.task.done() and not self.task.cancelled() and self.task.exception() is None
        return self.task.result() if done else None


class Slots:
    """Adapters by key, the least recently used first.

    Args:
        capacity: so many.
        load: tells the server.
        unload: tells the server, and deletes what was written.
    """

    def __init__(
        self,
        capacity: int,
        load: Callable[[Portable], Awaitable[None]],
        unload: Callable[[Portable], Awaitable[None]],
    ) -> None:
        self.capacity = capacity
        self._load, self._unload = load, unload
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._change = asyncio.Event()

    def loaded(self) -> list[str]:
        """What is loaded, the least recently used first."""
        return [key for key, entry in self._entries.items() if entry.portable is not None]

    @asynccontextmanager
    async def using(self, key: str, make: Make) -> AsyncIterator[None]:
        """The adapter is loaded, and stays so for the block. Concurrent first uses load once; one that is cancelled
        does not stop the others'.

        Raises:
            what ``make`` and ``load`` raise.
        """
        entry = await self._taken(key, make)
        try:
            await asyncio.shield(entry.task)
            yield
        finally:
            entry.uses -= 1
            self._changed()

    async def drop(self, key: str) -> None:
        """Unload ``key`` as soon as nobody uses it; those that come meanwhile wait, and load it anew."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.leaving:
            while self._entries.get(key) is entry:
                await self._change.wait()
            return
        entry.leaving = True
        try:
            while entry.uses or not entry.task.done():
                await self._change.wait()
        except BaseException:
            entry.leaving = False
            self._changed()
            raise
        await self._let_go(key, entry)

    async def reload(self) -> None:
        """Tell a server that has forgotten everything; what it does not take any more is given up."""
        for key, entry in list(self._entries.items()):
            if (portable := entry.portable) is None or entry.leaving:
                continue
            try:
                await self._load(portable)
            except LorchestraError as error:
                log.warning("%s is not loaded again: %s", key, error)
                del self._entries[key]
                self._changed()

    async def again(self, key: str) -> None:
        """Tell the server once more: it has forgotten ``key``."""
        entry = self._entries.get(key)
        if entry is not None and (portable := entry.portable) is not None:
            await self._load(portable)

    def containing(self, digest: str) -> list[str]:
        """Keys of the adapters and mixtures that these weights are in."""
        found = [(key, entry.portable) for key, entry in self._entries.items()]
        return [key for key, it in found if it and any(served.digest == digest for served, _ in it.members)]

    async def _taken(self, key: str, make: Make) -> _Entry:
        while True:
            entry = self._entries.get(key)
            if entry is not None and not entry.leaving:
                entry.uses += 1
                self._entries.move_to_end(key)
                return entry
            if entry is None and len(self._entries) < self.capacity:
                entry = _Entry(asyncio.create_task(self._brought(make)))
                self._entries[key] = entry
                entry.task.add_done_callback(partial(self._settled, key, entry))
                continue
            idle = None if entry is not None else self._idle()
            if idle is None:
                await self._change.wait()
            else:
                self._entries[idle].leaving = True
                await self._let_go(idle, self._entries[idle])

    def _idle(self) -> str | None:
        """The least recently used one that nobody uses."""
        ready = (k for k, e in self._entries.items() if not e.uses and not e.leaving and e.portable is not None)
        return next(ready, None)

    async def _brought(self, make: Make) -> Portable:
        portable = await make()
        await self._load(portable)
        return portable

    def _settled(self, key: str, entry: _Entry, task: asyncio.Task[Portable]) -> None:
        """A load has ended; one that failed leaves no trace, so that the next use tries again."""
        if entry.portable is None and self._entries.get(key) is entry:
            del self._entries[key]
        self._changed()

    async def _let_go(self, key: str, entry: _Entry) -> None:
        try:
            if (portable := entry.portable) is not None:
                await self._unload(portable)
        finally:
            if self._entries.get(key) is entry:
                del self._entries[key]
            self._changed()

    def _changed(self) -> None:
        """Wake everybody that waits, to look again."""
        self._change.set()
        self._change = asyncio.Event()
