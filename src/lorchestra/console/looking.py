"""What the page asks to show: nothing here changes anything."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from lorchestra.console import shown
from lorchestra.console.guard import Asked, NotHereError, Route
from lorchestra.registry import browsing
from lorchestra.registry.sql.finding import Filter

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry
    from lorchestra.serve.following import Follower

PAGE = 50  # rows of a page
FAR = 10**9  # rows that a page may begin after
COMPARISONS = 32  # that are kept
T = TypeVar("T")


class Threads:
    """Where a registry is asked, so that nobody waits for it but who asked. A few at a time, whoever asks."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4, "lorchestra-console")

    async def run(self, work: Callable[[], T]) -> T:
        """``work``, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class Looking:
    """Routes that read a registry.

    Args:
        follower: of it; ``None`` where the server has none.
        threads: to ask it in.
    """

    def __init__(self, follower: Follower | None, threads: Threads) -> None:
        self._follower, self._threads = follower, threads
        self._compared: OrderedDict[tuple[str, str], Mapping[str, Any]] = OrderedDict()
        self._comparing = asyncio.Lock()

    @property
    def routes(self) -> list[Route]:
        """All of them, for every role that the console has."""
        found = {
            "facets": self._facets, "adapters": self._adapters, "versions": self._versions, "version": self._version,
            "lineage": self._lineage, "compare": self._compare, "aliases": self._aliases, "traffic": self._traffic,
            "history": self._history,
        }  # fmt: skip
        return [Route("GET", f"/api/{name}", "viewer", answer) for name, answer in found.items()]

    @property
    def registry(self) -> Registry:
        """The registry that this server follows.

        Raises:
            NotHereError: it follows none.
        """
        if self._follower is None:
            raise NotHereError("this server follows no registry; start it with `lorchestra serve BASE --registry URL`")
        return self._follower.registry

    async def _facets(self, asked: Asked) -> Mapping[str, Any]:
        registry = self.registry
        found = await self._threads.run(lambda: browsing.facets(registry))
        return {"tags": found.tags, "bases": found.bases, "aliases": found.aliases}

    async def _adapters(self, asked: Asked) -> Mapping[str, Any]:
        registry, wanted, text = self.registry, _filter(asked), asked.text("text")
        limit, offset = _window(asked)
        page = await self._threads.run(lambda: browsing.adapters(registry, wanted, text, limit=limit, offset=offset))
        return {"rows": [shown.shelf(row) for row in page.rows], "total": page.total}

    async def _versions(self, asked: Asked) -> Mapping[str, Any]:
        registry, wanted, text = self.registry, _filter(asked), asked.text("text")
        limit, offset = _window(asked)

        def work() -> Mapping[str, Any]:
            page = browsing.versions_in(registry, wanted, text, limit=limit, offset=offset)
            words = browsing.pointing(registry, [version.id for version in page.rows])
            rows = [shown.version_line(version, words.get(version.id, ())) for version in page.rows]
            return {"rows": rows, "total": page.total}

        return await self._threads.run(work)

    async def _version(self, asked: Asked) -> Mapping[str, Any]:
        registry, reference = self.registry, asked.text("reference")

        def work() -> Mapping[str, Any]:
            version = registry.resolve(reference)
            words = browsing.pointing(registry, [version.id])
            return shown.version_whole(version, words.get(version.id, ()))

        return await self._threads.run(work)

    async def _lineage(self, asked: Asked) -> Mapping[str, Any]:
        from lorchestra.registry.lineage import related

        registry, reference = self.registry, asked.text("reference")

        def work() -> Mapping[str, Any]:
            version = registry.resolve(reference)
            return shown.graph(related(registry, version, descendants=True), version.manifest.digest)

        return await self._threads.run(work)

    async def _compare(self, asked: Asked) -> Mapping[str, Any]:
        """One at a time: both adapters' weights are read, and a registry's do not change."""
        registry, before, after = self.registry, asked.text("before"), asked.text("after")

        def exact() -> tuple[str, str]:
            pair = registry.resolve(before), registry.resolve(after)
            return pair[0].reference, pair[1].reference

        def work() -> Mapping[str, Any]:
            from lorchestra.registry.compare import compare_held

            return compare_held(registry, *pair).as_dict()

        pair = await self._threads.run(exact)
        async with self._comparing:
            if pair not in self._compared:
                self._compared[pair] = await self._threads.run(work)
                while len(self._compared) > COMPARISONS:
                    self._compared.popitem(last=False)
            return self._compared[pair]

    async def _aliases(self, asked: Asked) -> Mapping[str, Any]:
        registry, text, name = self.registry, asked.text("text"), asked.text("name")
        limit, offset = _window(asked)
        page = await self._threads.run(lambda: browsing.pointed(registry, text, name=name, limit=limit, offset=offset))
        return {"rows": [shown.pointed(row) for row in page.rows], "total": page.total}

    async def _traffic(self, asked: Asked) -> Mapping[str, Any]:
        registry = self.registry
        running, ended = await self._threads.run(lambda: browsing.canaries(registry))
        assert self._follower is not None  # or there were no registry
        report = self._follower.report()
        server = {key: report[key] for key in ("registry", "generation", "stale_seconds", "down", "hidden")}
        server["failures"] = report["failures"][:PAGE]
        tried = {(found["name"], found["alias"]): found["tried_here"] for found in report["canaries"]}
        return {
            "running": [shown.status(one) | {"tried_here": tried.get((one.rollout.name, one.rollout.alias), False)}
                        for one in running],
            "ended": [shown.status(one) for one in ended],
            "server": server,
        }  # fmt: skip

    async def _history(self, asked: Asked) -> Mapping[str, Any]:
        registry = self.registry
        limit, _ = _window(asked)
        words = {key: asked.text(key) for key in ("name", "alias", "action", "actor", "reference")}
        before = asked.number("before", 0, FAR)
        found = await self._threads.run(lambda: browsing.entries(registry, **words, before=before, limit=limit))
        return {"rows": [shown.entry(one) for one in found], "more": len(found) == limit}


def _filter(asked: Asked) -> Filter:
    return Filter(**{field: asked.text(field) for field in Filter._fields})


def _window(asked: Asked) -> tuple[int, int]:
    return asked.number("limit", PAGE, browsing.MOST) or PAGE, asked.number("offset", 0, FAR)
