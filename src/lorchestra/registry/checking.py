"""``verify``: is everything what was written? Every blob, manifest, row, alias and link of the chain, by name.

Three witnesses are held against each other: the manifest (hashed), the columns that repeat parts of it, and the audit
log (chained), which is replayed: what it says of versions, aliases, revocations and bases must be what is there. What a
killed process leaves behind (blobs that nothing names, half-written ones) is no damage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Table, select, text

from lorchestra.errors import LorchestraError
from lorchestra.registry.changing import beside, fingerprint, version_row
from lorchestra.registry.manifest import Manifest, digest_of
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.sql.audit import breaks
from lorchestra.registry.sql.catalog import Catalog
from lorchestra.registry.sql.database import explained
from lorchestra.registry.sql.schema import (
    FORMAT,
    accepts,
    aliases,
    audit,
    derivations,
    manifests,
    meta,
    names,
    rollouts,
    version_files,
    version_metrics,
    version_parents,
    version_tags,
    versions,
)
from lorchestra.registry.store.stored import CHUNK
from lorchestra.registry.transport.replaying import State, replay

if TYPE_CHECKING:
    from lorchestra.registry.store.blobs import Blobs

LEASE = 3600.0  # seconds for which nothing is removed while it looks
_BESIDE = (version_files, version_parents, version_tags, version_metrics)
_MUTABLE = ("state", "revoked_at", "revoked_by", "revoked_why")
_TRIGGERS = {
    "sqlite": (
        "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'audit'",
        {"audit_keeps_update", "audit_keeps_delete", "audit_keeps_insert"},
    ),
    "postgresql": (
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'audit'::regclass AND tgenabled IN ('O', 'A')",
        {"audit_keeps_update", "audit_keeps_delete", "audit_keeps_truncate"},
    ),
}


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written.

    Args:
        kind: ``database``, ``meta``, ``chain``, ``manifest``, ``row``, ``alias``, ``base``, ``rollout`` or ``blob``.
        subject: what: ``clinic@v2``, ``clinic@production``, a digest, ``audit entry 7``.
        what: is wrong with it.
    """

    kind: str
    subject: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: {self.what}"


def verify(catalog: Catalog, blobs: Blobs, *, deep: bool = True) -> list[Finding]:
    """Everything that is not as it was written.

    Args:
        catalog: to look at; it may be in use.
        blobs: its store.
        deep: read every blob; else only see that those that are needed are there, and as long as they should be.

    Raises:
        RegistryError: the catalog or the store cannot be reached.
    """
    lease = catalog.lease("verify", LEASE)
    held = False
    with suppress(RegistryError):  # a damaged catalog, or one that cannot be written, is looked at all the same
        lease.__enter__()
        held = True
    try:
        look = _Look(catalog.shown)
        with catalog.reading() as connection:
            look.at_catalog(connection)
        look.at_blobs(blobs, deep=deep)
        return look.found
    finally:
        if held:
            with suppress(RegistryError):
                lease.__exit__(None, None, None)


class _Look:
    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.found: list[Finding] = []
        self.needed: dict[str, int] = {}  # blob → size
        self.users: dict[str, str] = {}  # blob → a version that needs it

    def say(self, kind: str, subject: str, what: str) -> None:
        self.found.append(Finding(kind, subject, what))

    @contextmanager
    def part(self, subject: str) -> Iterator[None]:
        """What cannot even be read is a finding; the rest is looked at all the same."""
        try:
            with explained(self.shown):
                yield
        except LorchestraError as error:
            self.say("database", subject, str(error))
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # a value of another type than was written
            self.say("database", subject, f"it cannot be read: {error}")

    def at_catalog(self, connection: Connection) -> None:
        state = State()
        with self.part("the file"):
            self._integrity(connection)
        with self.part("meta"):
            self._meta(connection)
        with self.part("audit"):
            self._log(connection, state)
        with self.part("versions"):
            self._versions(connection, state)
        with self.part("aliases"):
            self._aliases(connection, state)
        with self.part("names"):
            rows = connection.execute(select(names)).all()
            self._compare("row", "name {0}", {(row.name,): {"last": row.last} for row in rows}, state.names)
        with self.part("accepts"):
            rows = connection.execute(select(accepts)).all()
            self._compare("base", "accept {0}", {(row.id,): _plain(row) for row in rows}, state.accepts)
        with self.part("derivations"):
            rows = connection.execute(select(derivations)).all()
            self._compare("base", "derivation {0}", {(row.id,): _plain(row) for row in rows}, state.derivations)
        with self.part("rollouts"):
            self._rollouts(connection)

    def _integrity(self, connection: Connection) -> None:
        dialect = connection.dialect.name
        if dialect == "sqlite":
            for (told,) in connection.execute(text("PRAGMA integrity_check")):
                if told != "ok":
                    self.say("database", "the file", str(told))
            for row in connection.execute(text("PRAGMA foreign_key_check")):
                self.say("database", f"table {row[0]}", f"row {row[1]} points to a row of {row[2]} that is not there")
        query, expected = _TRIGGERS[dialect]
        missing = expected - set(connection.execute(text(query)).scalars())
        if missing:
            self.say("chain", "audit log", f"what keeps it append-only is gone: {', '.join(sorted(missing))}")

    def _meta(self, connection: Connection) -> None:
        found = {row.key: row.value for row in connection.execute(select(meta))}
        if found.get("format") != FORMAT:
            self.say("meta", "format", f"it is {found.get('format')!r}; it should be {FORMAT!r}")
        for key in {"format", "registry_id", "head"} ^ found.keys():
            self.say("meta", str(key), "it is missing" if key not in found else "nothing of that name is kept there")

    def _log(self, connection: Connection, state: State) -> None:
        told = {row.key: row.value for row in connection.execute(select(meta))}
        rows = connection.execute(select(audit).order_by(audit.c.id)).all()
        for subject, what in breaks(rows, str(told.get("registry_id")), str(told.get("head", ""))):
            self.say("chain", subject, what)
        for subject in replay(rows, state):
            self.say("chain", subject, "what it tells cannot be followed")

    def _versions(self, connection: Connection, state: State) -> None:
        rows = {table: _by_version(connection, table) for table in _BESIDE}
        seen = set()
        whole = select(versions, manifests.c.text).outerjoin(manifests).order_by(versions.c.id)
        for row in connection.execute(whole):
            reference = f"{row.name}@v{row.number}"
            seen.add(reference)
            with self.part(reference):
                self._version(row._mapping, reference, {table: rows[table].pop(row.id, []) for table in _BESIDE}, state)
        for reference in state.versions.keys() - seen:
            self.say("row", reference, "the audit log tells of it, and it is not in the catalog")
        for table, left in rows.items():
            for version in left:
                self.say("row", f"{table.name} of version {version}", "there is no such version")
        stray = select(manifests.c.version_id).where(manifests.c.version_id.not_in(select(versions.c.id)))
        for version in connection.execute(stray).scalars():
            self.say("row", f"manifest of version {version}", "there is no such version")

    def _version(self, row: Mapping[Any, Any], reference: str, near: Mapping[Table, list[Any]], state: State) -> None:
        logged = state.versions.get(reference)
        if logged is None:
            self.say("row", reference, "the audit log does not tell of it")
        if row["text"] is None:
            self.say("manifest", reference, "it is missing")
            return
        bare = row["text"].encode("utf-8", "surrogatepass")
        digest = digest_of(bare)
        if digest != row["manifest_digest"] or (logged and digest != logged.told.get("manifest")):
            self.say("manifest", reference, "it, or its digest, is not what was written")
        try:
            manifest = Manifest.parse(bare)
        except LorchestraError as error:
            self.say("manifest", reference, str(error))
            return
        if manifest.canonical() != bare:
            self.say("manifest", reference, "it is not in canonical form")
        if logged and (logged.id != row["id"] or fingerprint(manifest) != logged.told):
            self.say("row", reference, "it is not the version that the audit log tells of")
        own = version_row(manifest, row["id"])
        expected = {**own, **(logged.state if logged else {key: row[key] for key in _MUTABLE})}
        for column, value in expected.items():
            if row[column] != value and column != "manifest_digest":
                self.say("row", reference, f"column {column} holds {_short(row[column])}, it should be {_short(value)}")
        for table, wanted in beside(manifest, row["id"]).items():
            if _sorted(near[table]) != _sorted(wanted):
                self.say("row", reference, f"its rows in {table.name} are not those of its manifest")
        for entry in manifest.files.values():
            self.needed[entry.sha256] = entry.size
            self.users[entry.sha256] = reference

    def _aliases(self, connection: Connection, state: State) -> None:
        there = {
            row.id: f"{row.name}@v{row.number}"
            for row in connection.execute(select(versions.c.id, versions.c.name, versions.c.number))
        }
        found = {}
        for row in connection.execute(select(aliases)):
            if row.version_id not in there:
                self.say(
                    "alias", f"{row.name}@{row.alias}", f"it leads to version {row.version_id}, which is not there"
                )
            held = {"to": there.get(row.version_id), "since": row.since, "by": row.by, "generation": row.generation}
            found[row.name, row.alias] = held
        self._compare("alias", "{0}@{1}", found, state.aliases)

    def _rollouts(self, connection: Connection) -> None:
        there = set(connection.execute(select(versions.c.id)).scalars())
        for row in connection.execute(select(rollouts).where(rollouts.c.ended.is_(None))):
            for column in ("stable_version", "candidate_version"):
                if getattr(row, column) not in there:
                    self.say("rollout", f"{row.name}@{row.alias}", f"its {column} {getattr(row, column)} is not there")

    def _compare(
        self, kind: str, subject: str, found: Mapping[Any, Mapping[str, Any]], logged: Mapping[Any, Mapping[str, Any]]
    ) -> None:
        for key in sorted({*found, *logged}, key=str):
            named = subject.format(*key)
            if key not in logged:
                self.say(kind, named, "the audit log does not tell of it")
            elif key not in found:
                self.say(kind, named, "the audit log tells of it, and it is not there")
            else:
                for column, value in logged[key].items():
                    if found[key].get(column) != value:
                        told = f"it should be {_short(value)} by the audit log"
                        self.say(kind, named, f"{column} is {_short(found[key].get(column))}; {told}")

    def at_blobs(self, blobs: Blobs, *, deep: bool) -> None:
        sizes = blobs.sizes(self.needed)
        for digest, size in self.needed.items():
            if digest not in sizes:
                self.say("blob", digest, f"it is missing; {self.users[digest]} needs it")
            elif sizes[digest] != size:
                used = self.users[digest]
                self.say("blob", digest, f"it has {sizes[digest]:,} bytes, it should have {size:,}; {used} needs it")
        if not deep:
            return
        for stored in blobs.all():
            try:
                with blobs.open(stored.digest) as stream:
                    while stream.read(CHUNK):
                        pass
            except DamagedError as error:
                used = self.users.get(stored.digest, "nothing")
                self.say("blob", stored.digest, f"{error} ({used} needs it)")


def _by_version(connection: Connection, table: Table) -> dict[Any, list[Any]]:
    found = defaultdict(list)
    for row in connection.execute(select(table)):
        found[row.version_id].append(_plain(row))
    return found


def _plain(row: Any) -> dict[str, Any]:
    return dict(row._mapping)


def _sorted(rows: list[dict[str, Any]]) -> list[Any]:
    return sorted((sorted(row.items()) for row in rows), key=repr)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"
