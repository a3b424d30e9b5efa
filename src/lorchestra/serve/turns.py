"""Turns of an engine that queues first come, first served: at most so many run, and a fair queue says who is next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lorchestra.serve.fair import FairQueue


class Turns:
    """The fair queue in front of coroutines of one event loop.

    Args:
        limit: so many run at once.
        queue: of those that wait.
    """

    def __init__(self, limit: int, queue: FairQueue[str] | None = None) -> None:
        self.limit = limit
        self.queue: FairQueue[str] = FairQueue() if queue is None else queue
        self.running = 0
        self._called: dict[str, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def turn(self, tenant: str, item: str) -> AsyncIterator[None]:
        """Wait until it is the turn of ``item`` (any unique id) of ``tenant``; the block is its turn.

        Raises:
            OverloadedError: too many wait.
        """
        self.queue.push(tenant, item)
        called = self._called[item] = asyncio.get_running_loop().create_future()
        self._go_on()
        try:
            await called
            yield
        finally:
            del self._called[item]
            if not self.queue.remove(item):  # it had its turn
                self.running -= 1
                self._go_on()

    def _go_on(self) -> None:
        while self.running < self.limit and (item := self.queue.pop()) is not None:
            self.running += 1
            if not self._called[item].done():
                self._called[item].set_result(None)
