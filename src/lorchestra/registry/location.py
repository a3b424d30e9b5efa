"""Where a registry is: one URL that names its database and its store of blobs.

- a path, or ``file:///dir``: SQLite in ``dir/catalog.db``, blobs in ``dir/blobs``;
- ``sqlite:///dir/catalog.db?blobs=URL``: as SQLAlchemy has it, three slashes before a path from here, four before one
  from the root; without ``blobs=`` they are in ``blobs`` beside the database;
- ``postgresql://user:password@host/db?blobs=URL``, with psycopg 3; other parameters (``sslmode=require``) go to it.

Blobs are at a path, or at any URL that fsspec knows (``s3://bucket/prefix``). A ``&`` or ``%`` inside ``blobs=`` is
written as ``%26`` or ``%25``.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self
from urllib.parse import quote, unquote, urlsplit

from lorchestra.errors import UserError

CATALOG, BLOBS = "catalog.db", "blobs"
EXAMPLES = (
    "a directory (/srv/adapters), sqlite:////srv/adapters/catalog.db?blobs=s3://bucket/prefix, or "
    "postgresql://user:password@host/db?blobs=s3://bucket/prefix"
)
_FILE, _SQLITE = "file", "sqlite"
_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):", re.ASCII)  # one letter is a drive
_USER = re.compile(r"(?<=://)[^/?#]*@")
_SECRET = re.compile(r"(?i)([?&][^=&]*(?:pass|pwd|secret|token|key|sig|credential)[^=&]*=)[^&]*")


@dataclass(frozen=True, repr=False)
class Location:
    """A registry's place.

    Args:
        database: SQLAlchemy's URL; it may hold a password.
        blobs: a path from the root, or fsspec's URL; it may hold a password.
        shown: the whole, fit to be printed: passwords are ``***``.
    """

    database: str = field(repr=False)
    blobs: str = field(repr=False)
    shown: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a URL or path.

        Raises:
            UserError: it names no registry; the message has examples and no password.
        """
        if not url or "\0" in url or any(letter in url for letter in "\r\n"):
            _refuse(url, "it is empty" if not url else "it holds a line break or NUL")
        scheme, directory = _scheme(url), local_path(url)
        if directory is not None:
            if "?blobs=" in url:
                _refuse(url, "blobs= goes with a database; write sqlite:///DIRECTORY/catalog.db?blobs=…")
            return cls(sqlite_url(directory / CATALOG), str(directory / BLOBS), str(directory))
        if scheme == _SQLITE:
            return cls._sqlite(url)
        if scheme in _POSTGRES:
            return cls._postgres(url)
        if scheme.startswith(("postgresql+", "sqlite+")):
            _refuse(url, f"the driver of {scheme} is chosen here; write {scheme.partition('+')[0]}://")
        if scheme in ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "sftp", "ftp", "http", "https"):
            _refuse(url, f"{scheme} can keep blobs, not the catalog, which needs a database; put it behind ?blobs=")
        near = difflib.get_close_matches(scheme, (_FILE, _SQLITE, *_POSTGRES), 1)
        raise _refusal(url, f"{scheme!r} is no kind of registry" + (f"; did you mean {near[0]}?" if near else ""))

    @classmethod
    def _sqlite(cls, url: str) -> Self:
        head, blobs, others = _without_blobs(url)
        path = unquote(head[len(f"{_SQLITE}:///") :])
        if not head.startswith(f"{_SQLITE}:///") or path in ("", "/", ":memory:") or path.endswith("/"):
            _refuse(url, "a registry in SQLite needs a file, as in sqlite:////srv/adapters/catalog.db")
        if others:
            _refuse(url, f"SQLite takes no parameter but blobs=, not {others[0].partition('=')[0]!r}")
        file = _absolute(path)
        store = _store(blobs, url) if blobs else str(file.parent / BLOBS)
        database = sqlite_url(file)
        return cls(database, store, f"{database}?blobs={masked(store)}" if blobs else database)

    @classmethod
    def _postgres(cls, url: str) -> Self:
        head, blobs, others = _without_blobs(url)
        try:
            parts = urlsplit(head, allow_fragments=False)
            _ = parts.port
        except ValueError:
            _refuse(url, "its host or port cannot be read; in a password write @ as %40, / as %2F, : as %3A, # as %23")
        if not head.partition(":")[2].startswith("//") or not parts.path.strip("/"):
            _refuse(url, "it names no database, as /adapters does in postgresql://user:password@host/adapters")
        if "@" in parts.path or "/" in parts.path.strip("/"):
            _refuse(url, "its password is not quoted; write @ as %40, / as %2F, : as %3A, # as %23")
        if not blobs:
            _refuse(url, "it does not say where the blobs are; add ?blobs=s3://bucket/prefix, or ?blobs=/a/directory")
        store = _store(blobs, url)
        rest = ("?" + "&".join(others)) if others else ""
        plain = f"//{parts.netloc}{parts.path}{rest}"
        joined = "&" if others else "?"
        return cls(
            f"postgresql+psycopg:{plain}", store, f"{masked(f'postgresql:{plain}')}{joined}blobs={masked(store)}"
        )

    def __repr__(self) -> str:
        return f"<Location {self.shown}>"

    def __str__(self) -> str:
        return self.shown


def sqlite_url(file: Path) -> str:
    """SQLAlchemy's URL of the database in ``file``, a path from the root."""
    return f"{_SQLITE}:///{quote(file.as_posix(), safe='/: ')}"


def local_path(url: str) -> Path | None:
    """The path from the root that ``url`` (a path or ``file:``) names; ``None`` where it names something elsewhere.

    Raises:
        UserError: a ``file:`` URL of another machine.
    """
    scheme = _scheme(url)
    if not scheme:
        return _absolute(url)
    if scheme != _FILE:
        return None
    rest = url[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise UserError(f"{masked(url)}: {host!r} is taken for a machine; write file:///srv/adapters, or the path")
        rest = f"/{path}"
    return _absolute(unquote(rest))


def masked(url: str) -> str:
    """The URL with its password, and what else looks like a secret, as ``***``."""
    return _SECRET.sub(r"\1***", _USER.sub(_without_password, url))


def _without_password(found: re.Match[str]) -> str:
    user, sign, _ = found[0].removesuffix("@").partition(":")
    return f"{user}:***@" if sign else f"{user}@"


def _scheme(url: str) -> str:
    """In small letters; empty for a path."""
    found = _SCHEME.match(url)
    if found is None:
        return ""
    scheme, rest = found[1].lower(), url[found.end() :]
    known = scheme in (_FILE, _SQLITE, *_POSTGRES)
    return scheme if known or rest.startswith("//") else ""


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _without_blobs(url: str) -> tuple[str, str, list[str]]:
    """What stands before the parameters, the value of ``blobs``, the other parameters as they are written."""
    head, _, query = url.partition("?")
    parameters = [parameter for parameter in query.split("&") if parameter]
    blobs = [parameter.partition("=")[2] for parameter in parameters if parameter.partition("=")[0] == "blobs"]
    if len(blobs) > 1:
        _refuse(url, "blobs= stands in it twice")
    if blobs and not blobs[0]:
        _refuse(url, "nothing follows blobs=")
    return head, unquote(blobs[0]) if blobs else "", [p for p in parameters if p.partition("=")[0] != "blobs"]


def _store(blobs: str, url: str) -> str:
    if "::" in blobs or "\0" in blobs or _scheme(blobs) in (_SQLITE, *_POSTGRES):
        _refuse(url, "blobs= names no store of files; write a directory, or a URL that fsspec knows")
    host = re.split(r"[/?#]", blobs.partition("://")[2], maxsplit=1)[0]
    if ":" in host and "@" not in host and "@" in blobs:
        _refuse(url, "the password of blobs= is not quoted; write @ as %40, / as %2F, : as %3A, # as %23")
    path = local_path(blobs)
    return blobs if path is None else str(path)


def _refuse(url: str, why: str) -> NoReturn:
    raise _refusal(url, why)


def _refusal(url: str, why: str) -> UserError:
    """Whatever is wrong with it may be the password: nothing up to the last @ is quoted."""
    scheme, sign, rest = url.partition("://")
    quoted = f"{scheme}://***@{rest.rpartition('@')[2]}" if sign and "@" in rest else url
    quoted = _SECRET.sub(r"\1***", quoted)
    quoted = quoted if len(quoted) <= 200 else quoted[:197] + "…"
    return UserError(f"{quoted!r} is no registry: {why}. Write {EXAMPLES}")
