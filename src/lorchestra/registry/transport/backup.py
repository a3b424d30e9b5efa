"""A whole registry in one file, taken while it is in use, and the way back.

The file is an :mod:`~lorchestra.registry.transport.archive`: the blobs, then every table as lines of JSON, read in one
transaction that sees one state (a WAL reader in SQLite, ``REPEATABLE READ`` in PostgreSQL). A lease holds off whoever
would remove blobs meanwhile. Ids, the audit chain and the generation are as they were, and either database restores
what the other wrote.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sqlalchemy import Connection, Table, func, select, text

from lorchestra.errors import UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.registry.sql.audit import breaks
from lorchestra.registry.sql.catalog import now
from lorchestra.registry.sql.schema import FORMAT as CATALOG_FORMAT
from lorchestra.registry.sql.schema import REVISION, REVISIONS, audit, leases, meta, metadata, version_files, versions
from lorchestra.registry.transport.archive import HEAD, Reader, Writer, canonical, writing

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.store.blobs import Blobs

KIND, FORMAT = "backup", 1
LEASE = 600.0  # seconds; renewed while blobs are copied
ROWS = 500  # of a table in memory at a time
TRANSIENT = {leases.name}  # of one machine's moment; not kept


@dataclass(frozen=True)
class Backup:
    """What is in a backup: versions, entries of the audit log (the last is the generation), blobs and their bytes."""

    registry_id: str
    made: str
    versions: int
    generation: int
    blobs: int
    bytes: int


def backup(registry: Registry, path: Path, reporter: Reporter = SILENT) -> Backup:
    """Write everything to ``path``, as it is at one moment; the registry goes on meanwhile.

    Args:
        registry: to keep.
        path: the new file. It has its name only when it is whole and on the disk.
        reporter: progress.

    Raises:
        UserError: something is at ``path``.
        DamagedError: a blob that a version needs is damaged or missing; the message names it.
        StorageError: the disk is full or closed.
    """
    catalog, made = registry.catalog, now()
    with ExitStack() as stack:
        writer = stack.enter_context(writing(path, KIND))
        lease = stack.enter_context(catalog.lease("backup", LEASE))
        spools = {table.name: stack.enter_context(_spool(path)) for table in _tables()}
        with catalog.reading() as connection:
            for table in _tables():
                _dump(connection, table, spools[table.name])
            blobs = _needed(connection)
            summary = Backup(
                connection.execute(select(meta.c.value).where(meta.c.key == "registry_id")).scalar_one(),
                made,
                connection.execute(select(func.count()).select_from(versions)).scalar_one(),
                connection.execute(select(func.coalesce(func.max(audit.c.id), 0))).scalar_one(),
                len(blobs),
                sum(blobs.values()),
            )
        head = {"kind": KIND, "format": FORMAT, "made": made, "registry_id": summary.registry_id}
        writer.add_json(HEAD, {**head, "catalog": CATALOG_FORMAT, "revision": REVISION})
        with reporter.task("back up", summary.bytes, "B") as task:
            renewed = time.monotonic()
            for digest, size in sorted(blobs.items()):
                with registry.blobs.open(digest) as stream:
                    writer.add_stream(_member(digest), size, stream)
                task.advance(size)
                if time.monotonic() - renewed > LEASE / 4:
                    lease.renew()
                    renewed = time.monotonic()
        for name, spool in spools.items():
            _add_spooled(writer, f"tables/{name}.jsonl", spool)
    return summary


def restore(path: Path, url: str, *, actor: str = "", why: str = "", reporter: Reporter = SILENT) -> Backup:
    """Make the registry of a backup again, at a place where none is, in either database.

    What is there afterwards is what was backed up, and one line more in the audit log, which tells of this. Killed on
    the way it has left no version, and the same command does it again.

    Args:
        path: the backup.
        url: of the new registry; it may be there already if nothing is in it.
        actor: who; by default as :meth:`Registry.open` says.
        why: for the audit log.
        reporter: progress.

    Raises:
        ArchiveError: the backup is damaged, of a newer format, or does not hold together. Nothing was written.
        UserError: the registry at ``url`` is not empty.
    """
    from lorchestra.registry.registry import Registry

    with Reader(path, KIND, FORMAT) as reader:
        with reporter.task("verify the backup", None, "B"):
            summary = _checked(reader)
        with Registry.open(url, create=True, actor=actor) as registry:
            with registry.catalog.reading() as connection:
                _refuse_unless_empty(connection, registry.location.shown)
            _put_blobs(reader, registry.blobs, summary, reporter)
            with registry.catalog.transaction() as held:
                _refuse_unless_empty(held.connection, registry.location.shown)
                held.execute(meta.delete())
                for table in _tables():
                    for rows in _chunks(_rows(reader, table)):
                        held.execute(table.insert(), rows)
                _continue_sequences(held.connection)
                held.audit(
                    "restore-backup",
                    why=why,
                    details={"made": summary.made, "generation": summary.generation, "file": path.name},
                )
    return summary


def _tables() -> list[Table]:
    """Those that are kept; what others refer to comes first."""
    return [table for table in metadata.sorted_tables if table.name not in TRANSIENT]


def _member(digest: str) -> str:
    return f"blobs/{digest.removeprefix('sha256:')}"


# ---- out


def _spool(path: Path) -> IO[bytes]:
    """A file without a name beside ``path``: it goes with its process."""
    return tempfile.TemporaryFile(dir=path.absolute().parent)  # the caller's stack closes it


def _dump(connection: Connection, table: Table, out: IO[bytes]) -> None:
    query = select(table).order_by(*table.primary_key.columns)
    for row in connection.execution_options(yield_per=ROWS).execute(query):
        out.write(canonical(dict(row._mapping)) + b"\n")


def _needed(connection: Connection) -> dict[str, int]:
    """Digest → bytes of every blob that a version has."""
    query = select(version_files.c.blob, version_files.c.size).distinct()
    return {row.blob: row.size for row in connection.execute(query)}


def _add_spooled(writer: Writer, name: str, spool: IO[bytes]) -> None:
    size = spool.seek(0, io.SEEK_END)
    spool.seek(0)
    writer.add_stream(name, size, spool)


# ---- in


def _checked(reader: Reader) -> Backup:
    """Everything in the archive against its seal, its names and itself.

    Raises:
        ArchiveError: something does not hold.
    """
    head = reader.head
    if head.get("catalog") != CATALOG_FORMAT or head.get("revision") not in REVISIONS:
        raise reader.refused(
            f"its catalog is of format {head.get('catalog')!r}, revision {head.get('revision')!r}; this version of "
            f"lorchestra reads format {CATALOG_FORMAT}, revisions {', '.join(REVISIONS)}: update lorchestra"
        )
    reader.verify()
    tables = {f"tables/{table.name}.jsonl" for table in _tables()}
    there = {name for name in reader.members if name.startswith("tables/")}
    if there != tables:
        raise reader.refused(f"its tables are not those of the catalog ({', '.join(sorted(there ^ tables))})")
    blobs = {name: member.size for name, member in reader.members.items() if name.startswith("blobs/")}
    for name in blobs:
        if reader.sealed[name] != "sha256:" + name.removeprefix("blobs/"):
            raise reader.refused(f"{name} does not hold what its name says")
    needed = {_member(str(row["blob"])): row["size"] for row in _rows(reader, version_files)}
    if needed != blobs:
        raise reader.refused(f"its blobs are not those of its versions ({len(blobs)}, expected {len(needed)})")
    values = {str(row["key"]): str(row["value"]) for row in _rows(reader, meta)}
    chain = (_Row(row) for row in _rows(reader, audit))
    broken = next(breaks(chain, values.get("registry_id", ""), values.get("head", "")), None)
    if broken:
        raise reader.refused(f"{broken[0]}: {broken[1]}")
    counts = {table.name: sum(1 for _ in _rows(reader, table)) for table in _tables()}
    generation = int(values["head"].partition(" ")[0] or 0)
    return Backup(
        values["registry_id"],
        str(head.get("made", "")),
        counts[versions.name],
        generation,
        len(blobs),
        sum(blobs.values()),
    )


class _Row:
    """A row as SQLAlchemy gives it, from JSON."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._mapping = values

    def __getattr__(self, name: str) -> Any:
        return self._mapping[name]


def _rows(reader: Reader, table: Table) -> Iterator[dict[str, Any]]:
    """A table's rows, each with exactly its columns.

    Raises:
        ArchiveError: a line that is no such row.
    """
    name, columns = f"tables/{table.name}.jsonl", {column.name: column for column in table.columns}
    for number, line in enumerate(reader.lines(name), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise reader.refused(f"{name}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict) or row.keys() != columns.keys():
            raise reader.refused(f"{name}, line {number}: it does not have the columns of {table.name}")
        yield row


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _refuse_unless_empty(connection: Connection, shown: str) -> None:
    if connection.execute(select(audit.c.id).limit(1)).first() is not None:
        raise UserError(
            f"the registry {shown} is not empty, and a backup is restored into an empty one alone: name a new place. "
            "Single versions are brought over by `lorchestra registry export` and `import`"
        )


def _put_blobs(reader: Reader, blobs: Blobs, summary: Backup, reporter: Reporter) -> None:
    """Every blob of the archive into the store, through a file of its own: stores take files, whole."""
    with (
        reporter.task("restore", summary.bytes, "B") as task,
        tempfile.TemporaryDirectory(prefix="lorchestra-restore-") as place,
    ):
        passing = Path(place) / "blob"
        for name, member in reader.members.items():
            if not name.startswith("blobs/"):
                continue
            with passing.open("wb") as out:
                reader.copy(name, out)
            digest, _ = blobs.put_file(passing)
            if _member(digest) != name:
                raise reader.refused(f"{name} changed while it was read")
            task.advance(member.size)


def _continue_sequences(connection: Connection) -> None:
    """Ids that PostgreSQL gives go on after those that were brought; SQLite sees to it itself."""
    if connection.dialect.name != "postgresql":
        return
    for table in _tables():
        column = table.autoincrement_column
        if column is None:
            continue
        highest = connection.execute(select(func.max(column))).scalar()
        if highest is not None:
            connection.execute(
                text("SELECT setval(pg_get_serial_sequence(:table, :column), :highest)"),
                {"table": table.name, "column": column.name, "highest": highest},
            )
