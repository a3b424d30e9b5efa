"""Local copies of versions: a directory that somebody asked for, and a cache that many processes share.

A copy in the cache is verified when it is made, and again when it is opened, unless a marker beside it says that it was
verified since this machine started and that no file has another size, time or place on the disk since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.base.home import write_whole
from lorchestra.base.lock import locked
from lorchestra.errors import StorageError
from lorchestra.registry.changing import check_ready
from lorchestra.registry.sql.catalog import Version
from lorchestra.registry.store.contents import write

if TYPE_CHECKING:
    from lorchestra.registry.manifest import FileEntry
    from lorchestra.registry.store.blobs import Blobs

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger(__name__)


def pull(version: Version, blobs: Blobs, directory: Path) -> None:
    """Write the version's files into ``directory``, bit-identical, whole or not at all.

    Raises:
        RevokedError: it was revoked.
        StorageError: the directory is not empty, or cannot be written.
        DamagedError: a blob is missing or damaged.
        RegistryError: the store is down.
    """
    check_ready(version)
    write(version.manifest.files, blobs, directory)


def materialise(version: Version, blobs: Blobs, cache: Path) -> Path:
    """A verified copy of the version's files, ``cache/<digest of the files>``; made if it is not there.

    Many processes may ask at once; one of them makes it. A copy that is damaged is made anew. With one that is whole
    the store is not asked, and may be down.

    Raises:
        RevokedError: it was revoked.
        StorageError: the cache cannot be written.
        DamagedError: a blob is missing or damaged.
        RegistryError: the store is down.
    """
    check_ready(version)
    name = version.manifest.content.removeprefix("sha256:")
    directory, marker = cache / name, cache / f"{name}.verified"
    files = version.manifest.files
    if _marked(directory, marker, files):
        with contextlib.suppress(OSError):  # it was used: see :mod:`lorchestra.registry.store.cleaning`
            os.utime(marker)
        return directory
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{name}.lock", f"a copy of {version.reference}", _log.info):
            if not _marked(directory, marker, files):
                if not _whole(directory, files):
                    marker.unlink(missing_ok=True)
                    shutil.rmtree(directory, ignore_errors=True)
                    write(files, blobs, directory)
                write_whole(marker, json.dumps(_state(directory, files)))
    except OSError as error:
        raise StorageError(
            f"cannot keep a copy of {version.reference} in {cache}: {error.strerror or error}"
        ) from error
    return directory


def _marked(directory: Path, marker: Path, files: Mapping[str, FileEntry]) -> bool:
    try:
        told = json.loads(marker.read_text(encoding="utf-8"))
        return bool(told["boot"]) and told == _state(directory, files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _state(directory: Path, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """What is cheap to see of a directory: boot, and size, time and place of every file."""
    seen = {}
    for name in sorted(files):
        found = (directory / name).lstat()
        seen[name] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return {"boot": _boot(), "files": seen}


def _whole(directory: Path, files: Mapping[str, FileEntry]) -> bool:
    """Whether it holds these very files, and no others."""
    try:
        if {path.name for path in directory.iterdir()} != set(files):
            return False
        for name, entry in files.items():
            path = directory / name
            if path.is_symlink() or path.stat().st_size != entry.size:
                return False
            with path.open("rb") as stream:
                if "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                    return False
    except OSError:
        return False
    return True


def _boot() -> str:
    """What this start of the machine is called; empty where it cannot be told, and then no marker is believed."""
    with contextlib.suppress(OSError):
        return _BOOT.read_text(encoding="ascii").strip()
    return ""
