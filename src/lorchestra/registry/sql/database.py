"""Connections to a catalog's database, SQLite or PostgreSQL, with its tables brought to this version.

SQLite runs in WAL with ``synchronous=FULL``: readers never wait for a writer, and what was committed survives a power
cut. Every mutating transaction is alone: ``BEGIN IMMEDIATE`` there, one advisory lock here. A process that dies in
one leaves nothing of it.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from lorchestra.errors import UserError
from lorchestra.registry.mistakes import DamagedError, NoRegistryError, RegistryError
from lorchestra.registry.sql.schema import FORMAT, REVISION, REVISIONS, meta

MIGRATIONS = "lorchestra.registry.sql:migrations"
WAIT = 30  # seconds for another's transaction to end
CONNECT = 5  # seconds for a database to answer
LOCK = 0x10C4E57A  # PostgreSQL's advisory lock of whoever changes the catalog
_IMMEDIATE = "lorchestra_immediate"
_log = logging.getLogger(__name__)


def connect(url: str) -> Engine:
    """A pool of connections; nothing is opened yet.

    Args:
        url: SQLAlchemy's, of SQLite or PostgreSQL.

    Raises:
        UserError: PostgreSQL's driver is not installed.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed.render_as_string(hide_password=False))
    parsed = parsed.set(drivername="postgresql+psycopg")
    if find_spec("psycopg") is None:
        raise UserError("a registry in PostgreSQL needs psycopg: pip install 'lorchestra[postgres]'")
    return create_engine(
        parsed,
        pool_pre_ping=True,  # a server that was restarted is found again
        # A server that vanishes without a word is noticed, and its threads go on: probes after 10 s of silence.
        connect_args={
            "connect_timeout": CONNECT,
            "application_name": "lorchestra",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 1000 * WAIT,
        },
    )


def _sqlite(url: str) -> Engine:
    file = Path(make_url(url).database or "").absolute()

    def opened() -> sqlite3.Connection:  # SQLite makes a file that is not there, also for who only reads
        return sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=WAIT, check_same_thread=False)

    engine = create_engine(url, creator=opened)

    @event.listens_for(engine, "connect")
    def _opened(connection: Any, record: object) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        for pragma in ("foreign_keys=ON", "synchronous=FULL", f"busy_timeout={WAIT * 1000}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(_IMMEDIATE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def changing(engine: Engine, shown: str, *, alone: bool = True) -> Iterator[Connection]:
    """A transaction that writes: committed at the end of the block, or nothing of it.

    Args:
        engine: of the catalog.
        shown: how messages call it.
        alone: no other that is alone runs at the same time; else it may be beside others (PostgreSQL).
    """
    with explained(shown), engine.connect().execution_options(**{_IMMEDIATE: True}) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT}s'"))
            if alone:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        yield connection


@contextmanager
def looking(engine: Engine, shown: str) -> Iterator[Connection]:
    """A transaction that reads, and sees one state however many queries it makes."""
    options = (
        {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        if engine.dialect.name == "postgresql"
        else {}
    )
    with explained(shown), engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


@contextmanager
def explained(shown: str) -> Iterator[None]:
    """Errors of the database in our words, without its URL's secrets.

    Raises:
        DamagedError: the file is no database any more.
        RegistryError: it is full, locked, closed or not there.
    """
    try:
        yield
    except SQLAlchemyError as error:
        told = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
        if "malformed" in told or "not a database" in told or "disk image" in told or "invalid page" in told:
            raise DamagedError(
                f"the catalog {shown} is damaged: {told}. Restore it from a backup (`lorchestra registry restore`)",
                shown,
            ) from error
        raise RegistryError(f"the catalog {shown}: {_why(error, told)}") from error


def _why(error: SQLAlchemyError, told: str) -> str:
    lowered = told.lower()
    if "disk is full" in lowered or "no space left" in lowered:
        return "the disk is full, and nothing was changed. Free some space and try again"
    if "locked" in lowered or "lock timeout" in lowered or "locknotavailable" in lowered:
        return f"others have been writing for more than {WAIT} seconds, and nothing was changed. Try again"
    if "readonly" in lowered or "read-only" in lowered or "permission denied" in lowered:
        return f"it cannot be written ({told}). Ask for the right to, or use another registry"
    if isinstance(error, IntegrityError):
        return f"this would break what is there, and nothing was changed ({told})"
    if isinstance(error, PoolTimeoutError):
        return "all its connections are in use; ask for less at a time"
    if isinstance(error, OperationalError | DBAPIError) and (
        error.connection_invalidated or isinstance(error, OperationalError)
    ):
        return f"it cannot be reached or used ({told}). See that the database runs and --registry names it"
    return told


def prepare(engine: Engine, shown: str, *, create: bool) -> None:
    """See that the tables are there and of this version; those of an earlier one are upgraded, after saying so.

    Args:
        engine: of the catalog.
        shown: how messages call it.
        create: make them where there are none.

    Raises:
        NoRegistryError: there are none.
        RegistryError: they are of a newer version, somebody else's, or cannot be reached.
    """
    file = engine.url.database if engine.dialect.name == "sqlite" else None
    if file and not Path(file).is_file():
        if not create:
            raise _none(shown)
        with explained(shown):
            _make_place(Path(file))
    with looking(engine, shown) as connection:
        found = _revision(connection)
    if found == REVISION:
        with looking(engine, shown) as connection:
            _check_format(connection, shown)
        return
    if found is None and not create:
        raise _none(shown)
    if found is not None:
        _check_known(found, shown)
    if file:
        with explained(shown), engine.connect() as connection:  # outside a transaction, and once for the file
            _write_ahead(connection.connection.driver_connection)
    with changing(engine, shown) as connection:
        found = _revision(connection)  # another may have been before us
        if found == REVISION:
            return
        if found is None:
            _check_empty(connection, shown)
        else:
            _check_known(found, shown)
            _log.warning("the catalog %s is of revision %s; upgrading it to %s", shown, found, REVISION)
        upgrade(connection)
        if found is None:
            rows = [{"key": "format", "value": FORMAT}, {"key": "registry_id", "value": secrets.token_hex(16)}]
            connection.execute(meta.insert(), [*rows, {"key": "head", "value": ""}])


def _write_ahead(driver: Any) -> None:
    """Turn the file to WAL. Where several do so at once, SQLite tells all but one at once that the file is locked,
    whatever ``busy_timeout`` says, since each reads before it writes; so the waiting is done here."""
    until = time.monotonic() + WAIT
    while True:
        try:
            driver.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the migrations up to ``revision`` inside the transaction of ``connection``."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _none(shown: str) -> NoRegistryError:
    return NoRegistryError(
        f"there is no registry at {shown}; make one with `lorchestra registry init --registry URL`, or name the right "
        "one (--registry, LORCHESTRA_REGISTRY)"
    )


def _make_place(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise RegistryError(
            f"the registry's directory {file.parent} cannot be made: {error.strerror}; choose another place"
        ) from error


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _check_known(found: str, shown: str) -> None:
    if found not in REVISIONS:
        raise RegistryError(
            f"the catalog {shown} is of revision {found}, which this lorchestra does not know (it knows up to "
            f"{REVISION}). A newer lorchestra made it: update this one"
        )


def _check_format(connection: Connection, shown: str) -> None:
    found = connection.execute(select(meta.c.value).where(meta.c.key == "format")).scalar()
    if found is None:
        raise DamagedError(f"the catalog {shown} does not say its format; restore it from a backup", "meta")
    if found != FORMAT:
        raise RegistryError(
            f"the catalog {shown} is of format {found}; this lorchestra reads {FORMAT}. Update lorchestra"
        )


def _check_empty(connection: Connection, shown: str) -> None:
    there = sorted(set(inspect(connection).get_table_names()) - {"alembic_version"})
    if there:
        raise RegistryError(
            f"the database {shown} holds tables of something else ({', '.join(there[:3])}); give the registry a "
            "database (or a schema) of its own"
        )
