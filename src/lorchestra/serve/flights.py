"""Requests that are being answered by versions of a registry, so that a revocation can end them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lorchestra.serve.engine import Target
from lorchestra.serve.ports import WithdrawnError


class Flight:
    """One request. It belongs to one event loop, and may go from task to task."""

    def __init__(self) -> None:
        self._why = ""
        self._task: asyncio.Task[object] | None = None

    def end(self, why: str) -> None:
        """It ends now, or when it is asked for its next part."""
        self._why = self._why or why
        if self._task is not None:
            self._task.cancel()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, the present task waits for the engine; :meth:`end` interrupts it.

        Raises:
            WithdrawnError: it was ended.
        """
        if self._why:
            raise WithdrawnError(self._why)
        task = asyncio.current_task()
        assert task is not None
        before, self._task = task.cancelling(), task
        try:
            yield
        except asyncio.CancelledError:
            # Ours, and nobody else's: a client that left at the same moment has its own way.
            if self._why and task.uncancel() <= before:
                raise WithdrawnError(self._why) from None
            raise
        finally:
            self._task = None


class Flights:
    """All that run, by version."""

    def __init__(self) -> None:
        self._by_version: dict[int, set[Flight]] = {}

    @contextmanager
    def of(self, target: Target) -> Iterator[Flight]:
        """Inside, a request is answered by ``target``."""
        flight = Flight()
        versions = {served.version for served, _ in target.members if served.version is not None}
        for version in versions:
            self._by_version.setdefault(version, set()).add(flight)
        try:
            yield flight
        finally:
            for version in versions:
                self._by_version[version].discard(flight)
                if not self._by_version[version]:
                    del self._by_version[version]

    def running(self, version: int) -> int:
        """How many a version answers just now."""
        return len(self._by_version.get(version, ()))

    def end(self, version: int, why: str) -> int:
        """End those that a version has to do with; how many there were."""
        found = list(self._by_version.get(version, ()))
        for flight in found:
            flight.end(why)
        return len(found)
