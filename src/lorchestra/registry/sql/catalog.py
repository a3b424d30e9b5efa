"""``Catalog``: what a registry knows, in SQL; and the values that come out of it.

Who changes anything does it in :meth:`Catalog.transaction`, one at a time over all processes, and says so in the audit
log in the same transaction. The id of the last entry is the catalog's *generation*: it grows with every such change,
and with nothing else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lorchestra.registry.manifest import Manifest

if TYPE_CHECKING:
    from sqlalchemy import Connection, CursorResult, Engine
    from sqlalchemy.sql import Executable

    from lorchestra.registry.sql.audit import Entry

PRODUCTION = "production"
State = Literal["ready", "revoked"]


@dataclass(frozen=True)
class Revocation:
    """When a version was revoked, by whom, and why."""

    at: str
    by: str
    why: str


@dataclass(frozen=True)
class Version:
    """A version as it is now.

    Args:
        manifest: what never changes of it.
        id: never given twice.
        state: ``ready`` or ``revoked``.
        revoked: why it is; ``None`` if it is not.
    """

    manifest: Manifest
    id: int
    state: State
    revoked: Revocation | None

    @property
    def reference(self) -> str:
        """``clinic@v2``."""
        return self.manifest.reference

    @property
    def target(self) -> Target:
        """What tells it from others, and how it is."""
        return Target(self.id, self.manifest.name, self.manifest.number, self.manifest.digest, self.state)


class Target(NamedTuple):
    """A version that something leads to, without its manifest."""

    id: int
    name: str
    number: int
    digest: str
    state: str

    @property
    def reference(self) -> str:
        """``clinic@v2``."""
        return f"{self.name}@v{self.number}"


@dataclass(frozen=True)
class AliasState:
    """Where an alias leads.

    Args:
        name: of the adapter.
        alias: the word after its ``@``.
        version: that it leads to.
        since: when it was moved there, ISO 8601 in UTC.
        by: whom.
        generation: of the catalog, then.
    """

    name: str
    alias: str
    version: Target
    since: str
    by: str
    generation: int


class Measured(NamedTuple):
    """A metric of a version, as :class:`lorchestra.registry.manifest.Metric` says."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    better: str
    split: str
    sealed: str


class Summary(NamedTuple):
    """A version without its manifest: what a list shows."""

    id: int
    name: str
    number: int
    digest: str
    base_name: str
    base_weights: str
    made_by: str
    task: str
    rank: int
    parameters: int
    bytes: int
    created: str
    created_by: str
    state: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def reference(self) -> str:
        """``clinic@v2``."""
        return f"{self.name}@v{self.number}"


class Transaction:
    """The one transaction that changes the catalog now.

    Args:
        connection: SQLAlchemy's, inside the transaction.
        actor: who changes.
    """

    def __init__(self, connection: Connection, actor: str) -> None:
        self.connection, self.actor = connection, actor
        self.at = now()

    def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        """As SQLAlchemy's ``Connection.execute``."""
        return self.connection.execute(statement, parameters)

    @property
    def next_id(self) -> int:
        """The id that the next audit entry will have."""
        from lorchestra.registry.sql.audit import head_of

        return head_of(self.connection)[0] + 1

    def audit(
        self,
        action: str,
        *,
        name: str = "",
        alias: str = "",
        before: str = "",
        after: str = "",
        why: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Say what this transaction does; it is committed with it. See :class:`~lorchestra.registry.sql.audit.Entry`.

        Raises:
            UserError: an action that is none, or a text that cannot be kept.
        """
        from lorchestra.registry.sql.audit import append

        return append(
            self.connection,
            at=self.at,
            actor=self.actor,
            action=action,
            name=name,
            alias=alias,
            before=before,
            after=after,
            why=why,
            details=details or {},
        )


class Catalog:
    """The catalog of one registry. Threads may share it; a process that forks opens its own.

    Args:
        engine: connections to its database.
        shown: how messages call it, without secrets.
        actor: who changes, for the audit log.
    """

    def __init__(self, engine: Engine, shown: str, actor: str) -> None:
        self.engine, self.shown, self.actor = engine, shown, actor
        self.checked = True

    @classmethod
    def open(cls, url: str, *, shown: str, actor: str, create: bool = False) -> Catalog:
        """The catalog in the database ``url``.

        Args:
            url: SQLAlchemy's.
            shown: the same for messages, without secrets.
            actor: who changes.
            create: make it where there is none.

        Raises:
            NoRegistryError: there is none.
            RegistryError: it cannot be reached, or a newer lorchestra made it.
        """
        from lorchestra.registry.sql.database import connect, prepare

        engine = connect(url)
        try:
            prepare(engine, shown, create=create)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, shown, actor)

    @classmethod
    def later(cls, url: str, *, shown: str, actor: str) -> Catalog:
        """The catalog in a database that cannot be reached now; whoever reaches it calls :meth:`check` first."""
        from lorchestra.registry.sql.database import connect

        made = cls(connect(url), shown, actor)
        made.checked = False
        return made

    def check(self) -> None:
        """See that its tables are there and of this version.

        Raises:
            NoRegistryError, RegistryError: as :meth:`open`.
        """
        from lorchestra.registry.sql.database import prepare

        prepare(self.engine, self.shown, create=False)
        self.checked = True

    def close(self) -> None:
        """Close its connections."""
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change the catalog: nobody else does at the same time, and all of it is kept or nothing.

        Raises:
            RegistryError: the database is full, locked for long, or not there; nothing is changed then.
        """
        from lorchestra.registry.sql.database import changing

        with changing(self.engine, self.shown) as connection:
            yield Transaction(connection, self.actor)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Write what is no part of the catalog's history (observations, feedback): not audited, no new generation.

        Raises:
            RegistryError: as :meth:`transaction`.
        """
        from lorchestra.registry.sql.database import changing

        with changing(self.engine, self.shown, alone=False) as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read one state, however many queries it takes.

        Raises:
            RegistryError: the database is not there.
            DamagedError: it is no database any more.
        """
        from lorchestra.registry.sql.database import looking

        with looking(self.engine, self.shown) as connection:
            yield connection

    def generation(self) -> int:
        """The id of the last audit entry; it grows with every change of the catalog."""
        from sqlalchemy import func, select

        from lorchestra.registry.sql.schema import audit

        with self.reading() as connection:
            return int(connection.execute(select(func.coalesce(func.max(audit.c.id), 0))).scalar_one())

    def registry_id(self) -> str:
        """What tells this registry from others; a restored backup has that of its origin."""
        from sqlalchemy import select

        from lorchestra.registry.sql.schema import meta

        with self.reading() as connection:
            return str(connection.execute(select(meta.c.value).where(meta.c.key == "registry_id")).scalar_one())

    def history(self, name: str = "", alias: str = "", limit: int = 0) -> list[Entry]:
        """The audit log, the newest first.

        Args:
            name: of an adapter alone.
            alias: of an alias alone.
            limit: how many at most; 0 for all.
        """
        from sqlalchemy import select

        from lorchestra.registry.sql.audit import entry_of
        from lorchestra.registry.sql.schema import audit

        query = select(audit).order_by(audit.c.id.desc())
        if name:
            query = query.where(audit.c.name == name)
        if alias:
            query = query.where(audit.c.alias == alias)
        if limit:
            query = query.limit(limit)
        with self.reading() as connection:
            return [entry_of(row) for row in connection.execute(query)]

    @contextmanager
    def lease(self, kind: str, seconds: float = 600.0) -> Iterator[Lease]:
        """While the block runs, nothing is removed from the registry (:meth:`Registry.gc` says who holds it off).

        Args:
            kind: what for: ``backup``.
            seconds: after which it ends unless it is renewed: its holder may have died.
        """
        lease = Lease(self, f"{kind}-{secrets.token_hex(8)}", kind, seconds)
        lease.renew()
        try:
            yield lease
        finally:
            lease.end()

    def leases(self, connection: Connection) -> Sequence[tuple[str, str]]:
        """Kind and holder of the leases that have not run out."""
        from sqlalchemy import select

        from lorchestra.registry.sql.schema import leases

        query = select(leases.c.kind, leases.c.by).where(leases.c.until > time.time())
        return [(row.kind, row.by) for row in connection.execute(query)]


@dataclass(frozen=True)
class Lease:
    """A hold on what the registry keeps; see :meth:`Catalog.lease`."""

    catalog: Catalog
    id: str
    kind: str
    seconds: float

    def renew(self) -> None:
        """It lasts from now on again."""
        from lorchestra.registry.sql.schema import leases

        row = {"id": self.id, "kind": self.kind, "by": self.catalog.actor, "until": time.time() + self.seconds}
        with self.catalog.transaction() as held:  # not audited: nothing of the catalog changes
            held.execute(leases.delete().where((leases.c.id == self.id) | (leases.c.until < time.time() - 86400)))
            held.execute(leases.insert(), row)

    def end(self) -> None:
        """It lasts no longer."""
        from lorchestra.registry.sql.schema import leases

        with self.catalog.transaction() as held:
            held.execute(leases.delete().where(leases.c.id == self.id))


def now() -> str:
    """ISO 8601 in UTC, milliseconds: as texts they sort by time."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
