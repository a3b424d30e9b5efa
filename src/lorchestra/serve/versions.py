"""The versions of a registry that this server answers with: found in memory, brought here once, refused when revoked.

A request touches no database and no store, but for the first one of a version that is not here yet. Everything here
belongs to one event loop, but for what :meth:`Versions.prepare` does beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from lorchestra.errors import AdapterError, LorchestraError, StorageError, counted
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.reference import Reference
from lorchestra.registry.snapshot import Line, Snapshot
from lorchestra.registry.store.cleaning import Copies, Copy
from lorchestra.serve.adapter_files import served
from lorchestra.serve.engine import Served, StoppingError
from lorchestra.serve.keeping import Kept
from lorchestra.serve.ports import RevokedModelError

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.registry.bases import BaseCheck
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Version

AGAIN, LONGEST = 1.0, 60.0  # seconds until a version that failed is tried again: twice as many each time
RECENT = 60.0  # seconds for which a copy stays that was asked for: a request may be about to use it
_log = logging.getLogger("lorchestra.serve.registry")

Kind = Literal["other base", "damaged", "unusable", "registry down"]


class StaleError(StoppingError):
    """The registry has not been seen for so long that what it said last is not believed any more: HTTP 503."""


class OtherBaseError(AdapterError):
    """A version of another base, or with another tokenizer or template that nobody has accepted."""


class Pointer(NamedTuple):
    """A name (with an alias, or empty) whose version may change; of a canary, its candidate."""

    name: str
    alias: str
    candidate: bool = False

    def __str__(self) -> str:
        shown = f"{self.name}@{self.alias}" if self.alias else self.name
        return f"the canary of {shown}" if self.candidate else shown


@dataclass(frozen=True)
class View:
    """What is answered with at one moment; swapped whole.

    Args:
        snapshot: what the registry says.
        serving: pointer → id of the version that it leads to *here*: the one before, as long as the one that the
            registry names cannot be loaded.
    """

    snapshot: Snapshot = field(default_factory=Snapshot)
    serving: Mapping[Pointer, int] = field(default_factory=dict)


class Found(NamedTuple):
    """Who answers to a reference; ``arm`` and ``rollout`` as in :class:`~lorchestra.serve.engine.Target`."""

    line: Line
    arm: Literal["", "stable", "candidate"] = ""
    rollout: int | None = None


@dataclass
class Failure:
    """A version that cannot be served here.

    Args:
        reference: of it.
        kind: of failure.
        why: for the operator.
        since: seconds since 1970.
        generation: of the registry, at the last try.
        tries: so far.
        again: when it is tried again, by the clock.
    """

    reference: str
    kind: Kind
    why: str
    since: float
    generation: int
    tries: int
    again: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for the operator."""
        return {"version": self.reference, "kind": self.kind, "why": self.why, "since": self.since,
                "tries": self.tries}  # fmt: skip


class ColdError(LorchestraError):
    """The version is not here yet: :meth:`Versions.prepare` brings it, and then the request can be resolved."""

    def __init__(self, line: Line) -> None:
        super().__init__(f"{line.reference} is not here yet")
        self.line = line


class Versions:
    """See the module.

    Args:
        registry: that they are in.
        base: of this server.
        cache: directory of local copies.
        grace: seconds that go on without the registry.
        most: bytes that the copies may take; ``None`` for no bound.
        clock: seconds.
    """

    def __init__(
        self,
        registry: Registry,
        base: BaseId,
        cache: Path,
        grace: float = 3600.0,
        most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry, self.base, self.cache, self.grace, self.clock = registry, base, cache, grace, clock
        self.copies, self.kept = Copies(cache, most), Kept(cache, registry.location.shown, base)
        self.view = View()
        self.seen = clock()  # when the registry was last seen to be there, all of it
        self.here: dict[int, Served] = {}
        self.drift: dict[int, Mapping[str, Any]] = {}
        self.failures: dict[int, Failure] = {}
        self.failed: Callable[[Failure], None] = lambda failure: None  # for the metrics
        self._contents: dict[int, str] = {}  # of what is here: name of the copy
        self._asked: dict[int, float] = {}  # when it was last asked for, seconds since 1970
        self._tidy_at = float("inf")  # when the copies are looked at, by the clock
        self._full = False
        self._bringing: dict[int, asyncio.Task[Served]] = {}
        self._threads = ThreadPoolExecutor(4, "lorchestra-versions")
        self._tidier = ThreadPoolExecutor(1, "lorchestra-copies")

    @property
    def stale(self) -> float:
        """Seconds since the registry was last seen."""
        return max(self.clock() - self.seen, 0.0)

    def find(self, reference: Reference, tenant: str, user: str) -> Found | None:
        """The version that ``reference`` leads to for this user, revoked or not; ``None`` if it leads nowhere."""
        snapshot, serving = self.view.snapshot, self.view.serving
        name = snapshot.names.get(reference.name)
        if name is None:
            return None
        if reference.selector and not reference.alias:
            line = name.exact(reference)
            return Found(line) if line else None
        alias = reference.alias
        id = serving.get(Pointer(reference.name, alias))
        if id is None:
            if alias:
                return None
            return Found(max(name.versions.values(), key=lambda line: line.number))  # all of them are revoked
        line = snapshot.by_id[id]
        split = name.splits.get(alias)
        if split is None or split.stable != id:
            return Found(line)
        candidate = serving.get(Pointer(reference.name, alias, True))
        if candidate != split.candidate or candidate in self.failures:
            return Found(line)  # it cannot be tried here: everybody has the stable version, and nothing is counted
        arm = split.arm(tenant, user)
        return Found(snapshot.by_id[candidate] if arm == "candidate" else line, arm, split.rollout)

    def served(self, found: Found, asked: str) -> Served:
        """What an engine takes of a version.

        Args:
            found: from :meth:`find`.
            asked: as the request calls it.

        Raises:
            RevokedModelError: it was revoked.
            StaleError: the registry has been away for longer than the grace.
            AdapterError, StoppingError: it cannot be served here, or not now.
            ColdError: it is not here yet.
        """
        line = found.line
        if self.stale > self.grace:
            raise StaleError(
                f"the registry that {asked!r} is in has not been seen for {self.stale:,.0f} seconds, and what it said "
                "then is not believed any more; try again later"
            )
        if line.revoked is not None:
            raise RevokedModelError(f"{asked!r} is {line.reference}, which was revoked; ask for another version", asked)
        here = self.here.get(line.id)
        if here is not None:
            self._asked[line.id] = time.time()
            return here
        failure = self.failures.get(line.id)
        if failure is not None and not self._due(failure):
            raise _told(failure)
        raise ColdError(line)

    async def prepare(self, line: Line) -> Served:
        """Bring a version here: base checked, files verified. Many may ask at once; one who leaves stops nobody else.

        Raises:
            AdapterError: it cannot be served on this base, or is damaged.
            StoppingError: the registry cannot be reached.
        """
        task = self._bringing.get(line.id)
        if task is None:
            task = asyncio.ensure_future(self._prepared(line))
            self._bringing[line.id] = task
            task.add_done_callback(lambda task: self._settled(line, task))
        return await asyncio.shield(task)

    def fail(self, line: Line, error: BaseException) -> Failure:
        """Remember that a version cannot be served, and say so once."""
        kind, before = _kind(error), self.failures.get(line.id)
        tries = before.tries + 1 if before else 1
        wait = min(AGAIN * 2 ** min(tries - 1, 10), LONGEST)
        since = before.since if before else time.time()
        generation = self.view.snapshot.generation
        failure = Failure(line.reference, kind, str(error), since, generation, tries, self.clock() + wait)
        self.failures[line.id] = failure
        if before is None or before.why != failure.why:
            level = logging.INFO if kind == "other base" else logging.ERROR
            _log.log(level, "%s cannot be served (%s): %s", line.reference, kind, error)
            self.failed(failure)
        return failure

    def unservable(self) -> Mapping[str, int]:
        """Kind of failure → versions that cannot be served now."""
        kinds = [failure.kind for failure in self.failures.values()]
        return {kind: kinds.count(kind) for kind in get_args(Kind)}

    def worth_a_try(self, line: Line) -> bool:
        """Whether nothing is known against a version, or it is time to see whether that still holds."""
        failure = self.failures.get(line.id)
        return failure is None or self._due(failure)

    @property
    def untidy(self) -> bool:
        """Whether it is time to :meth:`tidy`."""
        return self.copies.most is not None and self.clock() >= self._tidy_at

    async def tidy(self, busy: Callable[[int], bool]) -> None:
        """Keep the copies within their bound: those may go that nothing leads to and nobody has asked for lately, the
        least recently used first.

        Args:
            busy: whether a version answers somebody, or is about to.
        """
        self._tidy_at, loop = float("inf"), asyncio.get_running_loop()
        if not await loop.run_in_executor(self._tidier, self.copies.over):
            return
        pointed, recent = set(self.view.serving.values()), time.time() - RECENT
        for id in list(self.here):
            if id not in pointed and self._asked.get(id, 0.0) < recent and not busy(id):
                del self.here[id]
                self.copies.let_go(self._contents.pop(id), self._asked.pop(id, None))
        gone = await loop.run_in_executor(self._tidier, self._cleaned)
        if gone:
            _log.info("%s left %s, which was full", counted(len(gone), "copy", "copies"), self.cache)
        over = await loop.run_in_executor(self._tidier, self.copies.over)
        if over and not self._full:
            _log.warning(
                "what is in use takes %s bytes more of %s than registry_cache_size allows; it stays",
                f"{over:,}",
                self.cache,
            )
        self._full = over > 0
        if over:
            self._tidy_at = self.clock() + RECENT

    def unfit(self, line: Line) -> bool:
        """Whether it turned out to be none that this server can use, and it is not time to try again."""
        failure = self.failures.get(line.id)
        return failure is not None and failure.kind != "registry down" and not self._due(failure)

    def close(self) -> None:
        """Bring nothing any more."""
        for task in self._bringing.values():
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._tidier.shutdown(wait=True, cancel_futures=True)
        self.copies.close()

    def _due(self, failure: Failure) -> bool:
        return self.clock() >= failure.again or failure.generation != self.view.snapshot.generation

    async def _prepared(self, line: Line) -> Served:
        if line.id in self.here:
            return self.here[line.id]
        loop = asyncio.get_running_loop()
        try:
            here, drift, content = await loop.run_in_executor(self._threads, self._brought, line)
        except Exception as error:
            raise _told(self.fail(line, error)) from error
        self.here[line.id], self._contents[line.id], self._asked[line.id] = here, content, time.time()
        self._tidy_at = min(self._tidy_at, self.clock())
        if drift:
            self.drift[line.id] = drift
        self.failures.pop(line.id, None)
        return here

    def _settled(self, line: Line, task: asyncio.Task[Served]) -> None:
        self._bringing.pop(line.id, None)
        if not task.cancelled():
            task.exception()  # it was told of; nobody may be waiting any more

    def _cleaned(self) -> Sequence[Copy]:
        """On a thread."""
        gone = self.copies.clean()
        if gone:
            self.kept.forget({copy.name for copy in gone})
        return gone

    def _brought(self, line: Line) -> tuple[Served, Mapping[str, Any], str]:
        """On a thread: it, its drift, and the name of its copy, which is held."""
        version, check = self._allowed(line)
        if not check.ok:
            raise OtherBaseError(check.why)
        if check.why:
            _log.info("%s: %s%s", line.reference, check.why, f", drift {dict(check.drift)}" if check.drift else "")
        content = version.manifest.content.removeprefix("sha256:")
        self.copies.hold(content)
        try:
            directory = self.registry.materialise(version, self.cache)
            found = served(line.name, directory)
            if found.digest != line.digest:
                raise AdapterError(
                    f"{line.reference} holds the weights {found.digest}, not {line.digest} as it was pushed"
                )
        except BaseException:
            self.copies.let_go(content)
            raise
        own = version.manifest.base.weights
        sibling = own if own and self.base.weights and own != self.base.weights else ""
        return replace(found, reference=line.reference, version=line.id, sibling_of=sibling), check.drift, content

    def _allowed(self, line: Line) -> tuple[Version, BaseCheck]:
        """A version and whether it may be served on this base; while the catalog is away, what was noted of that."""
        try:
            version = self.registry.by_ids([line.id]).get(line.id)
            check = None if version is None else self.registry.allowed_base(version.manifest, self.base)
        except RegistryError as error:
            its_own = isinstance(error, DamagedError) and error.subject == line.reference
            noted = None if its_own else self.kept.noted(line)
            if noted is None:
                raise
            return noted
        if version is None or check is None:
            raise RegistryError(f"{line.reference} is not in the registry any more")
        if check.ok:
            with contextlib.suppress(OSError):  # then it is asked for again
                self.kept.note(version, check)
        return version, check


def _kind(error: BaseException) -> Kind:
    if isinstance(error, OtherBaseError):
        return "other base"
    if isinstance(error, DamagedError):
        return "damaged"
    return "registry down" if isinstance(error, RegistryError | StorageError | OSError) else "unusable"


def _told(failure: Failure) -> LorchestraError:
    """What clients hear: never a place, and no word of what is kept there."""
    said = {
        "other base": "it belongs to another base than this server's, or to another tokenizer or chat template",
        "damaged": "what is kept of it is damaged",
        "unusable": "it is no adapter that this server can use",
    }.get(failure.kind)
    if said is None:
        return StoppingError(f"{failure.reference} cannot be fetched at the moment; try again in a while")
    return AdapterError(f"{failure.reference} cannot be served here: {said}; the server's log says more")
