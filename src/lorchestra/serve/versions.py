"""The versions of a registry that this server answers with: found in memory, brought here once, refused when revoked.

A request touches no database and no store, but for the first one of a version that is not here yet. Everything here
belongs to one event loop, but for what :meth:`Versions.prepare` does beside it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lorchestra.errors import AdapterError, LorchestraError, StorageError
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.reference import Reference
from lorchestra.registry.snapshot import Line, Snapshot
from lorchestra.serve.adapter_files import served
from lorchestra.serve.engine import Served, StoppingError
from lorchestra.serve.ports import RevokedModelError

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.registry.registry import Registry

AGAIN, LONGEST = 1.0, 60.0  # seconds until a version that failed is tried again: twice as many each time
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
        clock: seconds.
    """

    def __init__(
        self,
        registry: Registry,
        base: BaseId,
        cache: Path,
        grace: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry, self.base, self.cache, self.grace, self.clock = registry, base, cache, grace, clock
        self.view = View()
        self.seen = clock()  # when the registry was last seen to be there, all of it
        self.here: dict[int, Served] = {}
        self.drift: dict[int, Mapping[str, Any]] = {}
        self.failures: dict[int, Failure] = {}
        self.failed: Callable[[Failure], None] = lambda failure: None  # for the metrics
        self._bringing: dict[int, asyncio.Task[Served]] = {}
        self._threads = ThreadPoolExecutor(4, "lorchestra-versions")

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

    def worth_a_try(self, line: Line) -> bool:
        """Whether nothing is known against a version, or it is time to see whether that still holds."""
        failure = self.failures.get(line.id)
        return failure is None or self._due(failure)

    def unfit(self, line: Line) -> bool:
        """Whether it turned out to be none that this server can use, and it is not time to try again."""
        failure = self.failures.get(line.id)
        return failure is not None and failure.kind != "registry down" and not self._due(failure)

    def close(self) -> None:
        """Bring nothing any more."""
        for task in self._bringing.values():
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _due(self, failure: Failure) -> bool:
        return self.clock() >= failure.again or failure.generation != self.view.snapshot.generation

    async def _prepared(self, line: Line) -> Served:
        if line.id in self.here:
            return self.here[line.id]
        loop = asyncio.get_running_loop()
        try:
            here, drift = await loop.run_in_executor(self._threads, self._brought, line)
        except Exception as error:
            raise _told(self.fail(line, error)) from error
        self.here[line.id] = here
        if drift:
            self.drift[line.id] = drift
        self.failures.pop(line.id, None)
        return here

    def _settled(self, line: Line, task: asyncio.Task[Served]) -> None:
        self._bringing.pop(line.id, None)
        if not task.cancelled():
            task.exception()  # it was told of; nobody may be waiting any more

    def _brought(self, line: Line) -> tuple[Served, Mapping[str, Any]]:
        """On a thread."""
        version = self.registry.by_ids([line.id]).get(line.id)
        if version is None:
            raise RegistryError(f"{line.reference} is not in the registry any more")
        check = self.registry.allowed_base(version.manifest, self.base)
        if not check.ok:
            raise OtherBaseError(check.why)
        if check.why:
            _log.info("%s: %s%s", line.reference, check.why, f", drift {dict(check.drift)}" if check.drift else "")
        directory = self.registry.materialise(version, self.cache)
        found = served(line.name, directory)
        if found.digest != line.digest:
            raise AdapterError(f"{line.reference} holds the weights {found.digest}, not {line.digest} as it was pushed")
        own = version.manifest.base.weights
        sibling = own if own and self.base.weights and own != self.base.weights else ""
        return replace(found, reference=line.reference, version=line.id, sibling_of=sibling), check.drift


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
