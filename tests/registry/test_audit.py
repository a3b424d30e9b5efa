"""The audit log cannot be changed through the database; and whatever is changed past it, anywhere, is found and named.

The oracle of the flips is a dump of the tables: where it is not what it was, ``verify`` must say so.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Float, Integer, delete, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import BigInteger

from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import UserError
from lorchestra.registry.mistakes import RegistryError
from lorchestra.registry.registry import Registry
from lorchestra.registry.sql.audit import Entry
from lorchestra.registry.sql.schema import audit, manifests, metadata, versions

OUTSIDE = {"leases", "rollouts", "feedback", "served", "observations"}  # no part of the history
TABLES = [table for table in metadata.sorted_tables if table.name not in OUTSIDE]


@pytest.fixture
def lived(registry, make):
    """A registry in which something of every kind has happened."""
    return _live(registry, make)


def _live(registry, make):
    one = registry.push(make(1), "clinic", tags=["sft"], note="first", why="begin")
    two = registry.push(make(2, parents=[one.manifest], context=[one.manifest]), "clinic", tags=["dpo"])
    registry.push(make(3), "ward")
    registry.alias("clinic", "production", "clinic@v1")
    registry.promote("clinic@v2", why="better")
    registry.rollback("clinic", why="slow")
    registry.alias("ward", "candidate", "ward@v1")
    registry.unalias("ward", "candidate")
    registry.revoke("ward@v1", "leaks")
    registry.accept("clinic", "template", BaseId("tiny", template="sha256:" + "9" * 64), "mended")
    registry.derive(two.manifest.base.weights, BaseId("awq", "sha256:" + "8" * 64), "awq", {"loss": 0.1}, "measured")
    assert registry.verify() == []
    return registry


def test_the_database_itself_refuses_to_change_the_log(lived):
    before = lived.history()
    connect = lived.catalog.engine.connect
    attempts = [
        update(audit).where(audit.c.id == 1).values(why="another"),
        delete(audit).where(audit.c.id == 1),
        delete(audit),
        text("UPDATE audit SET actor = 'nobody'"),
    ]
    if lived.catalog.engine.dialect.name == "postgresql":
        attempts += [text("TRUNCATE audit"), text("DELETE FROM audit USING meta")]
    else:  # SQLite's REPLACE deletes without asking the triggers for DELETE
        attempts += [
            text("INSERT OR REPLACE INTO audit SELECT id, at, 'nobody', action, name, alias, before, after, why, "
                 "details, hash FROM audit WHERE id = 1"),
            text("UPDATE OR REPLACE audit SET id = 2 WHERE id = 1"),
            text("INSERT INTO audit SELECT 99, at, actor, action, name, alias, before, after, why, details, hash "
                 "FROM audit WHERE id = 1"),
        ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(DBAPIError, match="append-only"), connect() as connection, connection.begin():
            connection.execute(attempt)
    assert lived.history() == before
    assert lived.verify() == []


def test_each_entry_is_sealed_by_the_one_before(lived):
    """By hand, from what the documentation says."""
    entries = lived.history()[::-1]
    assert [entry.id for entry in entries] == list(range(1, len(entries) + 1))
    previous = "sha256:" + hashlib.sha256(f"lorchestra registry {lived.catalog.registry_id()}".encode()).hexdigest()
    for entry in entries:
        own = [entry.id, entry.at, entry.actor, entry.action, entry.name, entry.alias, entry.before, entry.after,
               entry.why, entry.details]  # fmt: skip
        written = json.dumps(own, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert entry.hash == "sha256:" + hashlib.sha256(f"{previous}\n{written}".encode()).hexdigest()
        previous = entry.hash
    assert [entry.action for entry in entries] == [
        "push", "push", "push", "alias", "promote", "rollback", "alias", "unalias", "revoke", "accept", "derive",
    ]  # fmt: skip


def test_what_the_log_cannot_keep_is_refused_and_nothing_is_changed(registry):
    for wrong in (
        {"action": "steal"},
        {"action": "push", "why": "\0"},
        {"action": "push", "why": "x" * 10_001},
        {"action": "push", "details": {"x": float("nan")}},
        {"action": "push", "details": {"x": "\ud800"}},
        {"action": "push", "details": {"x": object()}},
    ):
        with pytest.raises(UserError), registry.catalog.transaction() as held:
            held.audit(**wrong)
    assert registry.history() == []
    with registry.catalog.transaction() as held:
        held.audit("access", why="Käse 药 '; DROP TABLE audit; --", details={"é": [1.5, None, "\0 \\u0000"]})
    (entry,) = registry.history()
    assert (entry.why, entry.details) == ("Käse 药 '; DROP TABLE audit; --", {"é": [1.5, None, "\0 \\u0000"]})
    assert registry.verify() == []


def _tamper(registry):
    """Take away what guards the tables, as whoever has the file (or is the database's owner) can."""
    with registry.catalog.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            for name in (
                connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).scalars().all()
            ):
                connection.execute(text(f"DROP TRIGGER {name}"))
        else:
            for name in ("update", "delete", "truncate"):
                connection.execute(text(f"DROP TRIGGER audit_keeps_{name} ON audit"))


def _said(findings):
    """Without what is said of the guards that a test took away."""
    return [found for found in findings if "append-only is gone" not in found.what]


def test_guards_that_are_gone_are_told(lived):
    _tamper(lived)
    (found,) = lived.verify()
    assert (found.kind, found.subject) == ("chain", "audit log")
    assert "append-only is gone" in found.what


def test_a_change_of_any_column_is_found(lived):
    """Of every table of the history, every column, one row at a time; afterwards it is put back."""
    _tamper(lived)
    missed, seen = [], 0
    with _unguarded(lived.catalog.engine) as connection:
        for column in [column for table in TABLES for column in table.columns]:
            table = column.table
            with connection.begin():
                row = connection.execute(select(table).order_by(*table.primary_key.columns)).first()
            assert row is not None, f"nothing happened in {table.name}"
            old = row._mapping[column]
            new = _flipped(column, old)
            others = [key == row._mapping[key] for key in table.primary_key.columns if key is not column]
            try:
                with connection.begin():
                    where = column.is_(None) if old is None else column == old
                    connection.execute(update(table).where(where, *others).values({column: new}))
            except DBAPIError:
                continue  # the database itself refuses: a key that others point to
            seen += 1
            if not _said(lived.verify(deep=False)):
                missed.append(f"{table.name}.{column.name}")
            with connection.begin():
                connection.execute(update(table).where(column == new, *others).values({column: old}))
    assert missed == []
    assert seen > 60
    assert _said(lived.verify()) == []


@contextmanager
def _unguarded(engine):
    """A connection for which SQLite does not look after foreign keys."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            yield connection
            return
        driver = connection.connection.driver_connection
        driver.execute("PRAGMA foreign_keys=OFF")
        yield connection
        driver.execute("PRAGMA foreign_keys=ON")


def _flipped(column, old):
    if isinstance(column.type, Integer | BigInteger):
        return (old or 0) ^ (1 << 20)
    if isinstance(column.type, Float):
        return (old or 0.0) + 2.0**-30
    if not old:
        return "x"
    place = len(old) // 2
    return old[:place] + chr(ord(old[place]) ^ 1) + old[place + 1 :]


def test_a_row_that_is_gone_is_found(local, make):
    """Of every table of the history, each row by itself; afterwards it is put back."""
    _tamper(_live(local, make))
    with _unguarded(local.catalog.engine) as connection:
        for table in TABLES:
            with connection.begin():
                rows = [dict(row._mapping) for row in connection.execute(select(table))]
            for row in rows:
                mark = [key == row[key.name] for key in table.primary_key.columns]
                with connection.begin():
                    connection.execute(delete(table).where(*mark))
                assert _said(local.verify(deep=False)), f"{table.name}: {row}"
                with connection.begin():
                    connection.execute(table.insert(), row)
    assert _said(local.verify()) == []


def test_the_log_s_end_cannot_be_cut_off_nor_rewritten_alone(lived):
    _tamper(lived)
    with lived.catalog.engine.begin() as connection:
        connection.execute(delete(audit).where(audit.c.id == lived.generation()))
    assert any("last entry is 10; it should be entry 11" in found.what for found in lived.verify())
    with lived.catalog.engine.begin() as connection:
        connection.execute(update(audit).where(audit.c.id == 3).values(why="another"))
    assert any(found.subject == "audit entry 3" for found in lived.verify())


def test_a_forged_entry_needs_the_whole_chain(lived):
    """One who rewrites an entry with a fresh hash breaks the next."""
    _tamper(lived)
    entries = lived.history()[::-1]
    forged = Entry(**{**vars(entries[3]), "after": "clinic@v2"})
    seal = forged.sealed(entries[2].hash)
    with lived.catalog.engine.begin() as connection:
        connection.execute(update(audit).where(audit.c.id == 4).values(after="clinic@v2", hash=seal))
    assert any(found.subject == "audit entry 5" for found in lived.verify())


def test_a_version_that_nobody_pushed_is_found(lived):
    with lived.catalog.engine.begin() as connection:
        row = dict(connection.execute(select(versions).where(versions.c.number == 2)).first()._mapping)
        connection.execute(versions.insert(), {**row, "id": 99, "number": 9, "content": "x"})
    subjects = {(found.kind, found.subject) for found in lived.verify()}
    assert ("row", "clinic@v9") in subjects


def test_a_manifest_that_was_changed_is_found_named_and_never_read(lived):
    with lived.catalog.engine.begin() as connection:
        told = connection.execute(select(manifests.c.text).where(manifests.c.version_id == 1)).scalar_one()
        changed = told.replace("first", "fir5t")
        connection.execute(update(manifests).where(manifests.c.version_id == 1).values(text=changed))
    assert ("manifest", "clinic@v1") in {(found.kind, found.subject) for found in lived.verify()}
    with pytest.raises(RegistryError, match="manifest of clinic@v1 is not what was written"):
        lived.resolve("clinic@v1")
    with lived.catalog.engine.begin() as connection:  # its digest too, and the columns: the log still knows better
        digest = "sha256:" + hashlib.sha256(changed.encode()).hexdigest()
        connection.execute(update(versions).where(versions.c.id == 1).values(manifest_digest=digest))
    assert ("manifest", "clinic@v1") in {(found.kind, found.subject) for found in lived.verify()}


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_in_any_blob_is_found_and_named(lived, place):
    paths = [path for path in Path(lived.blobs.shown).rglob("*") if path.is_file()]
    assert len(paths) > 5
    for path in paths:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[int(place * (len(good) - 1))] ^= 1 << random.Random(path.name).randrange(8)
        path.write_bytes(bad)
        (found,) = lived.verify()
        assert (found.kind, found.subject) == ("blob", f"sha256:{path.name}")
        assert lived.verify(deep=False) == [], "the bytes are not read"
        path.write_bytes(good[:-1])
        assert [found.subject for found in lived.verify(deep=False)] == [f"sha256:{path.name}"]
        path.unlink()
        (found,) = lived.verify(deep=False)
        assert "is missing" in found.what
        path.write_bytes(good)
    assert lived.verify() == []


def test_flipped_bits_of_the_database_file_are_found_or_harmless(local, make, tmp_path):
    """Anywhere in the file: a registry that verifies clean still says what it said."""
    lived = _live(local, make)
    lived.close()
    root = Path(str(local.location))
    with closing(sqlite3.connect(root / "catalog.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    good = (root / "catalog.db").read_bytes()
    before = _dump(root / "catalog.db")
    chance, found, harmless = random.Random(6), 0, 0
    for turn in range(40):
        bad = bytearray(good)
        bad[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        copy = tmp_path / f"flip-{turn}"
        copy.mkdir()
        (copy / "blobs").symlink_to(root / "blobs")
        (copy / "catalog.db").write_bytes(bad)
        told = _verified(copy)
        if not told:
            assert _dump(copy / "catalog.db") == before
        assert all(told), "it says which registry"
        found, harmless = found + bool(told), harmless + (not told)
    assert found > 0
    assert harmless > 0


def _verified(root):
    try:
        with Registry.open(str(root)) as registry:
            return [str(finding) for finding in registry.verify(deep=False)]
    except RegistryError as error:
        return [str(error) if str(root) in str(error) else ""]


def _dump(path):
    with closing(sqlite3.connect(path)) as connection:
        return {
            table.name: connection.execute(f'SELECT * FROM "{table.name}" ORDER BY 1, 2').fetchall() for table in TABLES
        }


def test_where_removals_cannot_be_held_off_it_looks_all_the_same(lived):
    with lived.catalog.engine.begin() as connection:
        connection.execute(text("DROP TABLE leases"))
    assert lived.verify() == []


def test_a_manifest_or_a_tag_that_is_gone_is_found_and_named(lived):
    with lived.catalog.engine.begin() as connection:
        connection.execute(manifests.delete().where(manifests.c.version_id == 1))
        connection.execute(update(versions).where(versions.c.number == 2).values(tags="[no"))
    found = {(one.kind, one.subject): one.what for one in lived.verify()}
    assert found["manifest", "clinic@v1"] == "it is missing"
    assert "column tags" in found["row", "clinic@v2"]
    with pytest.raises(RegistryError, match="manifest of clinic@v1 is missing"):
        lived.resolve("clinic@v1")
    with pytest.raises(RegistryError, match="the tags of a version are not what was written"):
        lived.summaries()
