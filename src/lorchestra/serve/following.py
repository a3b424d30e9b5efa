"""Follows a registry: what its names lead to is read again when anything has changed, and loaded before it answers.

the registry says v2 ──bring v2──► the engine has it ──► v2 answers, v1 is unloaded when nobody uses it
                        └── it cannot be loaded: v1 goes on, the reason is told, and it is tried again
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorchestra.errors import LorchestraError, counted
from lorchestra.registry.mistakes import NoRegistryError, RegistryError
from lorchestra.registry.snapshot import Line, Snapshot
from lorchestra.serve.engine import Engine, StoppingError
from lorchestra.serve.flights import Flights
from lorchestra.serve.metrics import PARTS
from lorchestra.serve.versions import Pointer, Versions, View

if TYPE_CHECKING:
    from lorchestra.serve.metrics import RegistryMetrics

HERE, AWAY = 0.25, 1.0  # seconds between two looks at a catalog on this machine, and on another
STORE = 5.0  # seconds between two looks at the store
REREAD = 600.0  # seconds after which everything is read again, whatever the generation says
PATIENCE = 10.0  # seconds for an answer of the registry
UNREADY = 0.9  # of the grace: balancers look elsewhere before requests are refused
_log = logging.getLogger("lorchestra.serve.registry")
T = TypeVar("T")


class Follower:
    """Keeps a server's :class:`~lorchestra.serve.versions.Versions` as the registry has them. One event loop's.

    Args:
        versions: to be kept.
        engine: loads them.
        metrics: are told.
        hidden: names and aliases of the registry that something else here has.
        every: seconds between two looks at the catalog; by default a quarter for SQLite, one for PostgreSQL.
    """

    def __init__(
        self,
        versions: Versions,
        engine: Engine,
        metrics: RegistryMetrics,
        hidden: Callable[[], Sequence[str]] = tuple,
        every: float | None = None,
    ) -> None:
        self.versions, self.registry, self.flights = versions, versions.registry, Flights()
        self._engine, self._metrics = engine, metrics
        database = self.registry.catalog.engine
        self._file = Path(database.url.database or "") if database.dialect.name == "sqlite" else None
        self._inode = _inode(self._file) if self._file else None
        self._every = every if every is not None else (HERE if self._file else AWAY)
        self._threads = ThreadPoolExecutor(len(PARTS), "lorchestra-registry")  # one for each part
        self._asked: dict[str, Future[Any]] = {}
        self._read_at = self._store_at = float("-inf")
        self.failing: dict[str, str] = {}  # which part of the registry cannot be used, and why
        self.down = ""  # the same in words; empty while all of it can
        self._hidden, self._told = hidden, set[str]()
        self._kept_at: float | None = None  # when what is kept was last said to hold; None: it does not
        self._wanted: Mapping[Pointer, Line] = {}
        self._unsettled = True
        self._wake = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._leaving: dict[int, asyncio.Task[None]] = {}
        metrics.watch(
            lambda: versions.stale, lambda: self.snapshot.generation, lambda: self.failing, versions.unservable
        )
        versions.failed = lambda failure: metrics.failures.labels(failure.kind).inc()

    @property
    def snapshot(self) -> Snapshot:
        """What the registry said last."""
        return self.versions.view.snapshot

    @property
    def ready(self) -> bool:
        """Whether the registry was seen lately enough."""
        return self.versions.stale <= UNREADY * self.versions.grace

    def read(self) -> None:
        """Read the registry now, in the foreground: before the event loop runs, or before anybody asks.

        Raises:
            RegistryError, NoRegistryError: it cannot be reached, or is none.
        """
        began = self.versions.clock()
        if not self.registry.catalog.checked:
            self.registry.catalog.check()
        snapshot = Snapshot.read(self.registry.catalog)
        self.versions.seen = self._read_at = began
        self._take(snapshot, at_once=True)
        self._keep(snapshot)

    def resume(self) -> None:
        """Go on from what the registry said last, while it is away: before the event loop runs."""
        self._take(self.snapshot, at_once=True)

    def start(self) -> None:
        """Begin to follow, on the running event loop; what is pointed at is brought here in the background."""
        try:
            self.read()
        except (RegistryError, NoRegistryError) as error:
            self._away({"database": str(error)})
        self._following = asyncio.ensure_future(self._follow())

    async def stop(self) -> None:
        """Follow no longer."""
        own = [task for task in (self._following, self._tidying) if task is not None]
        tasks = [*own, *self._loading.values(), *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.versions.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def look(self) -> None:
        """Look at the registry at once, and not when it is time."""
        self._wake.set()

    def report(self) -> dict[str, Any]:
        """Everything that an operator may want to know, as plain JSON."""
        versions, snapshot, serving = self.versions, self.snapshot, self.versions.view.serving
        names: dict[str, dict[str, Any]] = {}
        for pointer, line in self._wanted.items():
            here = snapshot.by_id.get(serving.get(pointer, -1))
            said: dict[str, Any] = {"serving": here.reference if here else None}
            if here is None or here.id != line.id:
                said["wanted"] = line.reference
            if here is not None:
                said |= {"digest": here.digest, "revoked": here.revoked, "requests": self.flights.running(here.id)}
            if not pointer.candidate:
                names.setdefault(pointer.name, {})[pointer.alias or "(name alone)"] = said
        canaries = [
            {"name": name, "alias": alias, "rollout": split.rollout, "share": split.share,
             "stable": snapshot.by_id[split.stable].reference, "candidate": snapshot.by_id[split.candidate].reference,
             "tried_here": serving.get(Pointer(name, alias, True)) == split.candidate
             and split.candidate not in versions.failures}
            for name, found in snapshot.names.items() for alias, split in found.splits.items() if alias
        ]  # fmt: skip
        return {
            "registry": self.registry.location.shown,
            "generation": snapshot.generation,
            "stale_seconds": round(versions.stale, 3),
            "grace_seconds": versions.grace,
            "down": self.down or None,
            "failing": dict(self.failing),
            "hidden": list(self._hidden()),
            "names": names,
            "failures": [failure.as_dict() for failure in versions.failures.values()],
            "canaries": canaries,
        }

    async def _follow(self) -> None:
        while True:
            await self._looked()
            self._settle()
            if self.versions.untidy and (self._tidying is None or self._tidying.done()):
                self._tidying = asyncio.ensure_future(self.versions.tidy(self._busy))
            try:
                await asyncio.wait_for(self._wake.wait(), self._every)
            except TimeoutError:
                continue
            self._wake.clear()

    async def _looked(self) -> None:
        began, failing = self.versions.clock(), {}
        if why := await self._why_not(self._look_at_database):
            failing["database"] = why
        if began - self._store_at >= (AWAY if "store" in self.failing else STORE):
            self._store_at = began
            if why := await self._why_not(self._look_at_store):
                failing["store"] = why
        elif "store" in self.failing:
            failing["store"] = self.failing["store"]
        if not failing:
            self.versions.seen = began
            if self._kept_at is not None and began - self._kept_at >= STORE:
                self._kept_at = began
                with contextlib.suppress(OSError):
                    self.versions.kept.seen()
        self._away(failing)

    async def _why_not(self, look: Callable[[], Awaitable[None]]) -> str:
        """Why that part of the registry cannot be used; empty if it can."""
        try:
            await look()
        except (RegistryError, NoRegistryError, StoppingError, TimeoutError, OSError) as error:
            return str(error) or "it does not answer"
        except Exception:  # a fault of ours must not stop what revocations depend on
            _log.exception("following the registry failed; it is tried again")
            return "following it failed; the log says how"
        return ""

    async def _look_at_database(self) -> None:
        began = self.versions.clock()
        generation = await self._off("database", self._generation)
        whole = began - self._read_at >= REREAD
        if whole or generation != self.snapshot.generation:
            before = None if whole else self.snapshot
            snapshot = await self._off("database", lambda: Snapshot.read(self.registry.catalog, before))
            self._read_at = began if whole else self._read_at
            self._take(snapshot)
            await self._off("database", lambda: self._keep(snapshot))

    def _away(self, failing: dict[str, str]) -> None:
        """These parts of the registry cannot be used; none, if all can."""
        for part in failing.keys() - self.failing.keys():
            _log.error(
                "the registry's %s cannot be used: %s. What is here goes on for %s",
                part, failing[part], counted(int(max(self.versions.grace - self.versions.stale, 0)), "second"),
            )  # fmt: skip
        if self.failing and not failing:
            _log.warning("the registry %s is back", self.registry.location.shown)
        self.failing, self.down = failing, "; ".join(failing[part] for part in PARTS if part in failing)

    def _keep(self, snapshot: Snapshot) -> None:
        """On the thread: have it on this machine too, for a start while the registry is away."""
        self._kept_at = None
        try:
            self.versions.kept.keep(snapshot)
        except OSError as error:
            _log.warning("what the registry says cannot be kept in %s: %s", self.versions.cache, error)
        else:
            self._kept_at = self.versions.clock()

    def _generation(self) -> int:
        """On the thread."""
        if self._file is not None:
            found = _inode(self._file)
            if found is None:
                raise RegistryError(f"the registry {self.registry.location.shown} is not there any more")
            if found != self._inode:  # it was restored: connections that are open still see the one before
                self.registry.close()
                self._inode, self._read_at = found, float("-inf")
        if not self.registry.catalog.checked:
            self.registry.catalog.check()
        return self.registry.generation()

    async def _look_at_store(self) -> None:
        sample = self.snapshot.sample
        there = await self._off("store", lambda: self.registry.blobs.sizes(sample))
        if sample and not there:
            raise RegistryError(f"the store {self.registry.blobs.shown} holds none of the blobs it should")

    async def _off(self, part: str, work: Callable[[], T]) -> T:
        """``work`` on a thread of that part of the registry; one that hangs is asked nothing more until it answers."""
        asked = self._asked.get(part)
        if asked is not None and not asked.done():
            raise RegistryError("it does not answer")
        running = self._threads.submit(work)
        self._asked[part] = running
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(running)), PATIENCE)

    def _take(self, snapshot: Snapshot, at_once: bool = False) -> None:
        """From now on ``snapshot`` holds; what it points at is loaded before it answers, if another did before.

        Args:
            snapshot: as the registry is.
            at_once: nothing answers yet, so nothing goes on answering.
        """
        before, self._wanted, self._unsettled = self.versions.view, _pointers(snapshot), True
        serving: dict[Pointer, int] = {}
        for pointer, line in self._wanted.items():
            present = before.serving.get(pointer)
            if present not in snapshot.by_id:  # new, or removed
                present = None
            if at_once or line.revoked is not None or (present is None and not pointer.candidate):
                present = line.id
            if present is not None:
                serving[pointer] = present
        for id, line in snapshot.by_id.items():
            known = before.snapshot.by_id.get(id)
            if line.revoked is not None and known is not None and known.revoked is None:
                ended = self.flights.end(id, f"{line.reference} was revoked while it answered")
                _log.warning("%s was revoked (%s); %s ended", line.reference, line.revoked, counted(ended, "answer"))
        self._publish(View(snapshot, serving))
        hidden = set(self._hidden())
        for name in sorted(hidden - self._told):
            _log.warning("%s: the server's own name wins; what the registry calls so is not served", name)
        self._told = hidden

    def _settle(self) -> None:
        """Load what is pointed at and does not answer yet, and what failed and may be tried again."""
        if not self._unsettled:
            return
        view, versions = self.versions.view, self.versions
        self._unsettled = False
        for pointer, line in self._wanted.items():
            moved = view.serving.get(pointer) != line.id
            if line.revoked is not None or not (moved or line.id not in versions.here):
                continue
            self._unsettled = True
            if line.id in self._loading or not versions.worth_a_try(line):
                continue
            if moved:
                self._loading[line.id] = asyncio.ensure_future(self._load(line))
            elif not self._loading:  # one after the other: nobody waits for these
                self._loading[line.id] = asyncio.ensure_future(self._warm(line))

    def _busy(self, version: int) -> bool:
        """Whether it answers somebody, or is about to."""
        return (
            self.flights.running(version) > 0
            or version in self._loading
            or version in self._leaving
            or any(line.id == version for line in self._wanted.values())
        )

    async def _warm(self, line: Line) -> None:
        """Bring a version here before anybody asks for it."""
        try:
            await self.versions.prepare(line)
        except LorchestraError:
            return  # it was told of
        finally:
            self._loading.pop(line.id, None)
            self.look()

    async def _load(self, line: Line) -> None:
        """Have the engine load a version, and let it answer where the registry says so."""
        versions = self.versions
        try:
            served = await versions.prepare(line)
            try:
                await self._engine.load(served)
            except StoppingError:
                return  # the engine starts or ends
            except Exception as error:
                versions.fail(line, error)
                return
        except LorchestraError:
            return  # it was told of
        finally:
            self._loading.pop(line.id, None)
        versions.failures.pop(line.id, None)
        view = versions.view
        moved = [p for p, to in self._wanted.items() if to.id == line.id and view.serving.get(p) != line.id]
        if moved:
            _log.warning("%s from now on: %s", line.reference, ", ".join(map(str, moved)))
            self._metrics.switches.inc(len(moved))
        self._publish(View(view.snapshot, {**view.serving, **dict.fromkeys(moved, line.id)}))

    def _publish(self, view: View) -> None:
        """Swap the view, and unload what answered before and does not any more."""
        before, versions = self.versions.view, self.versions
        versions.view = view
        pointed = {id for id in view.serving.values() if view.snapshot.by_id[id].revoked is None}
        for id in pointed & self._leaving.keys():
            self._leaving.pop(id).cancel()
        keys = {versions.here[id].key for id in pointed if id in versions.here}
        for id in set(before.serving.values()) - pointed:
            served = versions.here.get(id)
            if (
                served is not None
                and served.key not in keys
                and id not in self._leaving
                and self._following is not None
            ):
                self._leaving[id] = asyncio.ensure_future(self._unload(id))

    async def _unload(self, id: int) -> None:
        try:
            await self._engine.unload(self.versions.here[id])
        except LorchestraError as error:
            _log.warning("%s is not unloaded: %s", self.versions.here[id].reference, error)
        finally:
            if self._leaving.get(id) is asyncio.current_task():
                del self._leaving[id]


def _pointers(snapshot: Snapshot) -> Mapping[Pointer, Line]:
    """What the registry says of every pointer."""
    found = {Pointer(name, alias): line for name, alias, line in snapshot.pointers()}
    for name, known in snapshot.names.items():
        for alias, split in known.splits.items():
            found[Pointer(name, alias, True)] = snapshot.by_id[split.candidate]
    return found


def _inode(file: Path | None) -> tuple[int, int] | None:
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found else None
