"""Blobs in a local directory.

``sha256/ab/abcdef…`` are the blobs, ``partial/`` what is being written. A blob is copied into ``partial/``, flushed,
renamed to its final name, and the directory flushed: whenever a process is killed or the power fails, what stands under
a final name is whole. No link inside the store is followed; one that stands where a blob should is no blob.
"""

from __future__ import annotations

import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.store.stored import CHUNK, HEX, SHARDS, Leftover, Stored

PARTIAL = "partial"
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class Disk:
    """A store in ``root``, which is made when the first blob is put.

    Args:
        root: a directory; it may be a link itself.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.shown = str(root)

    def open(self, name: str) -> BinaryIO:
        """The blob as it lies there.

        Raises:
            FileNotFoundError: there is none.
            DamagedError: something else stands in its place.
        """
        return os.fdopen(self._descriptor(name), "rb", buffering=0)

    def size(self, name: str) -> int | None:
        """Bytes; ``None`` where there is no such blob, or no file in its place."""
        try:
            found = os.lstat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) and self._is_inside(name) else None

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Name → bytes, of those that are there."""
        return {name: size for name in names if (size := self.size(name)) is not None}

    def keep(self, name: str) -> bool:
        """Whether the blob is there and whole; if so it counts as put just now, and is flushed."""
        try:
            descriptor = self._descriptor(name)
        except (OSError, DamagedError):
            return False
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            if _hashed(stream) != name:
                return False
            try:
                os.utime(self._path(name), follow_symlinks=False)
            except OSError:  # somebody else's file, or gone this moment: it is put anew
                return False
        _flush(self._path(name).parent)
        return True

    def put(self, source: BinaryIO) -> tuple[str, int]:
        """Copy all of ``source``, whatever stands there already; name and size are those of what was copied."""
        partial = self._made(PARTIAL) / uuid.uuid4().hex
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            sha, size = hashlib.sha256(), 0
            with os.fdopen(descriptor, "wb", buffering=0) as out:
                while chunk := source.read(CHUNK):
                    sha.update(chunk)
                    size += len(chunk)
                    _write(out.fileno(), chunk)
                os.fsync(out.fileno())
            name = sha.hexdigest()
            shard = self._made(SHARDS, name[:2])
            partial.replace(shard / name)
            _flush(shard)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        return name, size

    def delete(self, name: str) -> None:
        """Take it away; none there is no mistake."""
        if self._is_inside(name):
            self._path(name).unlink(missing_ok=True)

    def all(self) -> Iterator[Stored]:
        """Every blob, by name."""
        for shard in _listed(self._root / SHARDS):
            if len(shard.name) == 2 and shard.is_dir(follow_symlinks=False):
                for entry in _listed(Path(shard.path)):
                    if HEX.fullmatch(entry.name) and entry.name.startswith(shard.name):
                        found = _state(entry)
                        if found is not None:
                            yield Stored(f"sha256:{entry.name}", found.st_size, _time(found))

    def leftovers(self) -> Iterator[Leftover]:
        """What is being written, or was when a process was killed."""
        for entry in _listed(self._root / PARTIAL):
            found = _state(entry)
            if found is not None:
                yield Leftover(entry.name, found.st_size, _time(found))

    def discard(self, leftover: Leftover) -> None:
        """Take it away; none there is no mistake."""
        if os.sep not in leftover.name and not (self._root / PARTIAL).is_symlink():
            (self._root / PARTIAL / leftover.name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._root / SHARDS / name[:2] / name

    def _is_inside(self, name: str) -> bool:
        return not any(path.is_symlink() for path in (self._root / SHARDS, self._path(name).parent))

    def _descriptor(self, name: str) -> int:
        path = self._path(name)
        if self._is_inside(name):
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode):
                descriptor = os.open(path, _READ)
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return descriptor
                os.close(descriptor)
        raise DamagedError(
            f"blob sha256:{name}: a link or special file stands in its place in {self.shown}; nothing outside the "
            "store is read. Put it again, or restore a backup",
            f"sha256:{name}",
        )

    def _made(self, *parts: str) -> Path:
        """A directory of the store, made and flushed where it is not there."""
        path = self._root
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            _flush(path.parent)
        for part in parts:
            path = path / part
            try:
                path.mkdir()
                _flush(path.parent)
            except FileExistsError:
                if path.is_symlink() or not path.is_dir():
                    raise RegistryError(
                        f"cannot put a blob into {self.shown}: {path} is a link or a file, a directory is expected; "
                        "nothing outside the store is written. Move it away"
                    ) from None
        return path


def _hashed(stream: BinaryIO | object) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # a raw file will do


def _write(descriptor: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _listed(directory: Path) -> list[os.DirEntry[str]]:
    """Sorted by name; nothing where there is no such directory, or a link to one."""
    if directory.is_symlink():
        return []
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _state(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of a file; ``None`` for anything else, and for what has gone in the meantime."""
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _time(found: os.stat_result) -> datetime:
    return datetime.fromtimestamp(found.st_mtime, UTC)


def _flush(directory: Path) -> None:
    """Make its entries durable, where a directory can be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
