"""Transactions, migrations and formats, over both databases; a database that is full, closed, foreign or gone."""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, text

from lorchestra.errors import UserError
from lorchestra.registry.location import Location
from lorchestra.registry.mistakes import DamagedError, NoRegistryError, RegistryError
from lorchestra.registry.registry import Registry
from lorchestra.registry.sql import database
from lorchestra.registry.sql.catalog import Catalog
from lorchestra.registry.sql.schema import (
    REVISION,
    REVISIONS,
    audit,
    feedback,
    metadata,
    names,
    observations,
    rollouts,
    served,
)


def test_the_migrations_make_the_tables_that_the_code_knows(registry):
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with registry.catalog.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert MigrationContext.configure(connection).get_current_revision() == REVISION
    config = Config()
    config.set_main_option("script_location", database.MIGRATIONS)
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == REVISION
    assert [script.revision for script in scripts.walk_revisions()][::-1] == list(REVISIONS)


def test_sqlite_is_set_up_to_survive_a_power_cut(local):
    with local.catalog.reading() as connection:
        told = {
            pragma: connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert told == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_many_make_the_same_catalog_at_the_same_moment(tmp_path):
    for turn in range(8):
        together, catalogs = threading.Barrier(8), []

        def begin(url, together=together, catalogs=catalogs):
            together.wait()
            catalogs.append(Catalog.open(url, shown="the registry", actor="somebody", create=True))

        threads = [threading.Thread(target=begin, args=(f"sqlite:///{tmp_path}/{turn}.db",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(catalogs) == 8


def test_a_transaction_is_kept_whole_or_not_at_all(registry):
    def broken_off():
        with registry.catalog.transaction() as held:
            held.audit("access", why="never")
            held.execute(names.insert(), {"name": "clinic", "last": 1})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    assert (registry.generation(), registry.history()) == (0, [])
    with registry.catalog.reading() as connection:
        assert connection.execute(select(names)).all() == []
    with registry.catalog.transaction() as held:
        assert held.next_id == 1
        entry = held.audit("access", why="yes")
    assert registry.history() == [entry]
    assert registry.generation() == entry.id == 1


def test_what_is_no_history_is_written_without_a_new_generation(registry):
    with registry.catalog.transaction() as held:
        held.execute(names.insert(), {"name": "clinic", "last": 0})
        row = {
            "name": "clinic", "alias": "production", "stable_version": 1, "candidate_version": 2, "salt": "s",
            "share": 0.1, "step": 0, "state": "running", "plan": {"steps": [1]}, "guards": [], "started": "",
            "stepped": "", "by": "", "why": "",
        }  # fmt: skip
        number = held.execute(rollouts.insert(), row).inserted_primary_key[0]
    generation = registry.generation()
    with registry.catalog.writing() as connection:
        counted = dict.fromkeys(
            ("requests", "errors", "latency_sum", "latency_sq", "latency_n", "score_sum", "score_sq", "score_n"), 1
        )
        connection.execute(
            observations.insert(), {"rollout_id": number, "arm": "stable", "gateway": "g", "updated": "", **counted}
        )
        request = {"request_id": "r", "name": "clinic", "version_id": 1, "arm": "", "tenant_hash": "t", "user_hash": ""}
        connection.execute(served.insert(), {"at": "", **request})
        connection.execute(feedback.insert(), {"at": "", "score": 1.0, "comment": "", **request})
    assert registry.generation() == generation
    with pytest.raises(RegistryError, match="would break"), registry.catalog.writing() as connection:
        connection.execute(feedback.insert(), {"at": "", "score": 0.0, "comment": "", **request})
    with registry.catalog.reading() as connection:
        assert connection.execute(select(rollouts.c.plan)).scalar() == {"steps": [1]}
        assert connection.execute(select(feedback.c.score)).scalars().all() == [1.0]


def test_a_reader_sees_one_state(registry):
    with registry.catalog.reading() as connection:
        before = connection.execute(select(audit.c.id)).all()
        with registry.catalog.transaction() as held:
            held.audit("access")
        assert connection.execute(select(audit.c.id)).all() == before
    assert registry.generation() == 1


def test_threads_share_a_registry(registry):
    failed = []

    def work(number):
        try:
            for turn in range(5):
                with registry.catalog.transaction() as held:
                    held.audit("access", why=f"{number}-{turn}")
                registry.history(limit=1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(entry.why for entry in registry.history()) == sorted(f"{n}-{t}" for n in range(6) for t in range(5))
    assert registry.verify() == []


@pytest.fixture
def next_release(tmp_path, monkeypatch):
    """A lorchestra with one more migration, which adds a table."""
    migrations = Path(database.__file__).parent / "migrations"
    place = tmp_path / "migrations"
    (place / "versions").mkdir(parents=True)
    for file in (*migrations.glob("*.py"), *migrations.glob("versions/*.py")):
        (place / file.relative_to(migrations)).write_text(file.read_text())
    (place / "versions" / "v0002_more.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n\nrevision = '0002'\ndown_revision = '0001'\n\n\n"
        "def upgrade():\n    op.create_table('more', sa.Column('x', sa.Integer))\n"
    )

    def release():
        monkeypatch.setattr(database, "MIGRATIONS", str(place))
        monkeypatch.setattr(database, "REVISION", "0002")
        monkeypatch.setattr(database, "REVISIONS", ("0001", "0002"))

    return release


def test_an_older_catalog_is_upgraded_after_saying_so_and_a_newer_one_is_refused(
    registry, registry_url, next_release, make, monkeypatch, caplog
):
    version = registry.push(make(1), "clinic")
    with monkeypatch.context():
        next_release()
        with caplog.at_level(logging.WARNING), Registry.open(registry_url) as newer:
            assert "revision 0001; upgrading it to 0002" in caplog.text
            assert newer.resolve("clinic") == version
            assert newer.verify() == []
            with newer.catalog.reading() as connection:
                assert connection.execute(text("SELECT count(*) FROM more")).scalar() == 0
        caplog.clear()
        Registry.open(registry_url).close()
        assert caplog.text == ""
    monkeypatch.undo()
    with pytest.raises(RegistryError, match=r"revision 0002, .* update this one"):
        Registry.open(registry_url, create=True)


def test_many_who_upgrade_at_once_upgrade_once(registry, registry_url, next_release):
    next_release()
    failed = []

    def work():
        try:
            Registry.open(registry_url).close()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with registry.catalog.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM more")).scalar() == 0


def test_a_catalog_of_a_newer_format_is_refused(registry, registry_url):
    with registry.catalog.engine.begin() as connection:
        connection.execute(text("UPDATE meta SET value = '2' WHERE key = 'format'"))
    with pytest.raises(RegistryError, match=r"format 2; this lorchestra reads 1. Update"):
        Registry.open(registry_url)


def test_a_catalog_of_format_1_keeps_opening(tmp_path):
    """As SQLite wrote it by the first release, in ``.dump``'s words; never made again. Its blobs are in the backup."""
    told = (Path(__file__).parent / "fixtures" / "format-1.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(tmp_path / "catalog.db")) as connection:
        connection.executescript(told)
    with Registry.open(str(tmp_path)) as registry:
        assert sorted(line.reference for line in registry.summaries()) == ["clinic@v1", "terms@v1", "terms@v2"]
        assert registry.resolve("terms@v2").revoked.why == "wrong"
        assert registry.measured([registry.resolve("clinic@v1").id])
        assert {found.kind for found in registry.verify(deep=False)} == {"blob"}, "the rest is as it was written"
        registry.alias("terms", "beta", "terms@v1")
        assert registry.history(limit=1)[0].action == "alias"


def test_whoever_only_reads_makes_no_catalog_where_there_is_none(tmp_path):
    with Registry.open(str(tmp_path), create=True, actor="tester"):
        pass
    later = Registry.later(str(tmp_path), actor="tester")
    assert later.summaries() == []
    later.close()
    (tmp_path / "catalog.db").rename(tmp_path / "away.db")
    for ask in (later.summaries, later.generation, later.catalog.check):
        with pytest.raises((RegistryError, NoRegistryError)):
            ask()
    assert not (tmp_path / "catalog.db").exists()
    (tmp_path / "away.db").rename(tmp_path / "catalog.db")
    later.catalog.check()
    assert later.catalog.checked


def test_somebody_else_s_tables_are_left_alone(registry_url):
    url = Location.parse(registry_url).database
    if url.startswith("sqlite"):
        Path(registry_url).mkdir()
        Path(registry_url, "catalog.db").touch()
    engine = database.connect(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (x INTEGER)"))
    for create in (True, False):
        with pytest.raises((RegistryError, NoRegistryError)) as told:
            Registry.open(registry_url, create=create)
    with pytest.raises(RegistryError, match=r"tables of something else .orders"):
        Registry.open(registry_url, create=True)
    assert told.type is NoRegistryError
    with engine.begin() as connection:
        assert connection.execute(text("SELECT * FROM orders")).all() == []
    engine.dispose()


def test_what_is_no_database_is_told_as_damaged(tmp_path):
    (tmp_path / "catalog.db").write_bytes(b"no database at all, for sure" * 100)
    for create in (True, False):
        with pytest.raises(DamagedError, match=r"damaged: .*Restore it from a backup") as told:
            Registry.open(str(tmp_path), create=create)
        assert told.value.subject == str(tmp_path)


def test_a_creation_that_was_killed_is_begun_again(tmp_path):
    (tmp_path / "catalog.db").touch()
    with pytest.raises(NoRegistryError):
        Registry.open(str(tmp_path))
    with Registry.open(str(tmp_path), create=True) as opened:
        assert opened.verify() == []


def test_a_full_disk_is_told_and_leaves_the_registry_as_it_was(tmp_path, small_disk, make):
    small_disk(4000)
    with Registry.open(str(tmp_path / "small" / "registry"), create=True, actor="tester") as registry:
        registry.push(make(1), "clinic", alias="production")
        before = registry.history(), registry.versions()
        free = tmp_path / "small" / "fill"
        with pytest.raises(OSError, match="No space"):
            _fill(free)
        with pytest.raises(RegistryError, match=r"(?i)space"):
            registry.push(make(2), "clinic")
        with pytest.raises(RegistryError, match="disk is full"):
            _write_on(registry)
        assert registry.verify() == []
        assert registry.resolve("clinic").id == 1
        assert before[0][0] in registry.history()
        free.unlink()
        registry.push(make(2), "clinic")
        assert len(registry.versions()) == len(before[1]) + 1
        assert registry.verify() == []


def _fill(path):
    with path.open("wb", buffering=0) as out:
        while True:
            out.write(b"x" * 4096)


def _write_on(registry):
    """What room is left inside its files is soon used."""
    for turn in range(100):
        registry.alias("clinic", f"a{turn}", "clinic@v1", why="x" * 10_000)


def test_a_database_that_went_away_is_told_without_secrets_and_found_again(postgres, tmp_path):
    name = postgres.database()
    url = f"postgresql://{postgres.user}:hunter2@/{name}?host={postgres.root}&blobs={tmp_path / 'blobs'}"
    with Registry.open(url, create=True) as registry:
        assert "hunter2" not in repr(registry.location)
        postgres.stop()
        try:
            for use in (registry.names, lambda: registry.unalias("clinic", "x"), lambda: Registry.open(url)):
                with pytest.raises(RegistryError, match="cannot be reached") as told:
                    use()
                assert "hunter2" not in str(told.value)
        finally:
            postgres.start()
        assert registry.names() == [], "the same object goes on"
    postgres.done(name)


def test_a_catalog_that_cannot_be_written_is_told(local, monkeypatch):
    path = Path(str(local.location)) / "catalog.db"
    local.close()
    with closing(sqlite3.connect(path)) as connection:  # what a read-only file gives, also to root
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    monkeypatch.setattr(database, "WAIT", 0)
    with Registry.open(str(local.location)) as registry:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert registry.names() == [], "readers do not wait"
            with pytest.raises(RegistryError, match="others have been writing"):
                registry.unalias("clinic", "production")
            other.execute("ROLLBACK")
        with pytest.raises(UserError):
            registry.unalias("clinic", "production")


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be made"):
        Registry.open(str(tmp_path / "file" / "registry"), create=True)
    with pytest.raises(NoRegistryError):
        Catalog.open(f"sqlite:///{tmp_path}/none.db", shown="none", actor="")
    assert not (tmp_path / "none.db").exists()


def test_postgresql_without_its_driver_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(database, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lorchestra\[postgres\]'"):
        Registry.open(f"postgresql://me@localhost/adapters?blobs={tmp_path}")
