"""Who may do what: API keys, their roles, adapters and limits. The one place where permission is decided.

A keys file holds no key, only SHA-256 of each. A plain hash is enough here, where a password would want a slow one: a
key is 256 random bits (:func:`new_key`), so there is nothing to guess and no dictionary to try, at any speed. Hashes
are compared in constant time, every one of them at each request, so that time tells nothing of what is in the file.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorchestra.base.home import write_whole
from lorchestra.base.lock import locked
from lorchestra.errors import UserError
from lorchestra.registry.reference import check_name

Role = Literal["user", "viewer", "operator"]
ROLES: tuple[Role, ...] = ("user", "viewer", "operator")
PREFIX = "lo-"  # so that a key is known as one where it should not be: in a log, in a repository
ALL = "all"
ANONYMOUS = "anonymous"  # the tenant of a server without keys
LOOKED_AT = 1.0  # seconds between looks at a keys file: a key that was removed is refused from then on
_log = logging.getLogger(__name__)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Key(BaseModel):
    """What is kept of a key.

    Args:
        name: the tenant's.
        sha256: of the key, hexadecimal.
        role: a ``user`` may ask; a ``viewer`` may look at the console, too; an ``operator`` may besides change what it
            shows, load and unload adapters, and read the metrics.
        adapters: names that may be used, or ``all``. The base may be used by everybody.
        rpm: requests a minute; ``None`` for no limit.
        concurrency: requests at a time; ``None`` for no limit.
        created: when, ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    sha256: str
    role: Role = "user"
    adapters: Literal["all"] | list[str] = Field(default_factory=list)
    rpm: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    created: str = ""

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        try:
            check_name(name)
        except UserError as error:
            raise ValueError(str(error).replace("an adapter", "a tenant")) from None
        if name == ANONYMOUS:
            raise ValueError(f"the name {name!r} is the one of a server without keys; choose another")
        return name

    @field_validator("sha256")
    @classmethod
    def _hashed(cls, value: str) -> str:
        if not _HASH.fullmatch(value):
            raise ValueError("sha256 is 64 hexadecimal digits; keys are made by `lorchestra serve keys add`")
        return value

    @field_validator("adapters")
    @classmethod
    def _adapters(cls, adapters: list[str] | str) -> list[str] | str:
        for name in adapters if isinstance(adapters, list) else ():
            try:
                check_name(name)
            except UserError as error:
                raise ValueError(str(error)) from None
        return adapters

    def may_use(self, adapter: str) -> bool:
        """Whether this key may use the adapter of that name."""
        return self.adapters == ALL or adapter in self.adapters

    @property
    def operates(self) -> bool:
        """Whether it may load, unload and read metrics."""
        return self.role == "operator"

    @property
    def views(self) -> bool:
        """Whether it may look at the console: at the registry, the traffic and every tenant's usage."""
        return self.role in ("viewer", "operator")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[Key] = Field(default_factory=list)


# Whoever reaches a server without keys: it is on the machine itself, or was opened on purpose.
OPEN = Key.model_construct(name=ANONYMOUS, sha256="", role="operator", adapters="all")


@dataclass(frozen=True)
class Keys:
    """All keys of a server, as of one reading of their file."""

    keys: tuple[Key, ...]

    def find(self, secret: str) -> Key | None:
        """The key that ``secret`` is; every one is compared, whichever it is."""
        wanted, found = hashed(secret), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, wanted):
                found = key
        return found

    def known(self, sha256: str) -> Key | None:
        """The key with that hash, if it is still one."""
        return next((key for key in self.keys if hmac.compare_digest(key.sha256, sha256)), None)


class KeysFile:
    """The keys in a file as it is now: it is read again when it changes, without a restart.

    While the file is not there or cannot be read, nobody is known: a key that should have been revoked is not.

    Args:
        path: of the file.
        clock: seconds.

    Raises:
        UserError: as :func:`read_keys`, at the beginning.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._state, self._looked = _state(path), clock()
        self._keys = read_keys(path)

    def find(self, secret: str) -> Key | None:
        """The key that ``secret`` is, by the file as it is now."""
        return self.current().find(secret)

    def known(self, sha256: str) -> Key | None:
        """The key with that hash, by the file as it is now."""
        return self.current().known(sha256)

    def current(self) -> Keys:
        """The keys, no older than a second."""
        if self._clock() - self._looked >= LOOKED_AT:
            self._looked = self._clock()
            state = _state(self.path)
            if state != self._state:
                self._state = state
                try:
                    self._keys = read_keys(self.path)
                    _log.info("%s has changed: %d keys", self.path, len(self._keys.keys))
                except UserError as error:
                    self._keys = Keys(())
                    _log.error("no key is valid until this is mended: %s", error)
        return self._keys


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def hashed(secret: str) -> str:
    """What is kept of a key: SHA-256, hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """A key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> Keys:
    """The keys in ``path``, YAML or JSON.

    Raises:
        UserError: it is not there, cannot be read, or is no keys file; the message names the entry.
    """
    return Keys(tuple(_checked(_plain(path), path).keys))


def add_key(
    path: Path,
    name: str,
    *,
    adapters: Collection[str] | Literal["all"] = (),
    role: Role = "user",
    rpm: int | None = None,
    concurrency: int | None = None,
) -> str:
    """Enter a new key for ``name`` in ``path``, which is made where it is not there.

    Returns:
        The key. It is seen now and never again.

    Raises:
        UserError: the name has one already or is none, or the file is no keys file.
        StorageError, OSError: it cannot be written.
    """
    secret = new_key()
    entry: dict[str, Any] = {
        "name": name,
        "sha256": hashed(secret),
        "role": role,
        "adapters": ALL if adapters == ALL else sorted(adapters),
        "rpm": rpm,
        "concurrency": concurrency,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    entry = {key: value for key, value in entry.items() if value is not None}
    with _writing(path):
        document = _plain(path) if path.exists() else {"keys": []}
        known = _checked(document, path)
        if any(key.name == name for key in known.keys):
            raise UserError(
                f"{path} has a key of {name!r} already; remove it first (`lorchestra serve keys remove {name}`), or "
                "choose another name"
            )
        document["keys"] = [*(document.get("keys") or ()), entry]
        _checked(document, path)
        _write(document, path)
    return secret


def remove_key(path: Path, name: str) -> None:
    """Revoke the key of ``name``; a server that runs sees it within a second.

    Raises:
        UserError: there is none, or the file is no keys file.
        StorageError, OSError: it cannot be written.
    """
    with _writing(path):
        document = _plain(path)
        known = [key.name for key in _checked(document, path).keys]
        if name not in known:
            raise UserError(f"{path} has no key of {name!r}; it has {', '.join(known) or 'none'}")
        document["keys"] = [entry for entry in document["keys"] if entry["name"] != name]
        _write(document, path)


def _writing(path: Path) -> AbstractContextManager[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return locked(path.with_name(f".{path.name}.lock"), f"the keys in {path}", _log.warning)


def _plain(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"there is no keys file {path}; `lorchestra serve keys add NAME --keys {path}` makes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the keys file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"the keys file {path} is not YAML or JSON: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"the keys file {path} holds {type(value).__name__}; it should be a mapping with 'keys:'")
    return value


def _checked(document: dict[str, Any], path: Path) -> _File:
    try:
        found = _File.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
    names = [key.name for key in found.keys]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {name!r} has two keys; each has a name of its own")
    return found


def _write(document: dict[str, Any], path: Path) -> None:
    if path.suffix == ".json":
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    else:
        from ruamel.yaml import YAML

        stream = io.StringIO()
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(document, stream)
        text = stream.getvalue()
    write_whole(path, text)
    path.chmod(0o600)
