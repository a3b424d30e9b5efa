"""Directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorchestra.errors import StorageError

_WHY = {
    errno.ENOSPC: "the disk is full; free some space and try again",
    errno.EDQUOT: "the disk quota is used up; free some space and try again",
    errno.EFBIG: "a file is larger than allowed here; raise the limit (ulimit -f) or choose another file system",
    errno.EACCES: "no permission; choose a directory that can be written",
    errno.EPERM: "not permitted; choose a directory that can be written",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EBUSY: "it is a mount point or in use; choose a directory inside it",
    errno.ENOTDIR: "a part of the path is a file; choose another directory",
}


@contextmanager
def whole_directory(
    target: Path, what: str, replaces: str | None = None, keeps: str | None = None, synced: bool = True
) -> Iterator[Path]:
    """Yields an empty sibling of ``target`` to fill; it takes ``target``'s name when the block ends without an error.

    Args:
        target: the final place; its parent is created.
        what: is being written, for messages (``"the adapter"``).
        replaces: a directory that holds a file of this name is an earlier one of the same kind and is replaced;
            entries of it that the new one does not have are kept. Any other directory must be empty.
        keeps: a file of this name makes the sibling worth keeping after an error, for the next try, which is then
            given it as it was left (one process at a time: the caller's care). It goes last, when everything stands
            under the final name: whenever the process is killed, the next one knows the sibling for what it is.
        synced: flush it to the disk before it gets its name.

    Raises:
        StorageError: ``target`` is a file or holds something else, or the disk is full or closed. Nothing new stands
            under the final name then.
    """
    target = Path(os.path.realpath(target))
    partial = target.with_name(f".{target.name}.partial") if keeps else _sibling(target, "partial")
    if keeps and (partial.is_symlink() or not _free(partial, keeps)):
        raise StorageError(
            f"cannot write {what} to {target}: {partial} is in the way and was not left by an earlier try; move it"
        )
    try:
        if keeps and target.is_dir():  # killed when all but this was done
            (target / keeps).unlink(missing_ok=True)
        if target.exists() and not target.is_dir():
            raise StorageError(f"cannot write {what} to {target}: a file is there; choose another name")
        if target.is_dir() and any(target.iterdir()) and not (replaces and (target / replaces).is_file()):
            raise StorageError(f"cannot write {what} to {target}: it is not empty; choose another directory")
        partial.mkdir(parents=True, exist_ok=keeps is not None)
        yield partial
        for path in (*partial.rglob("*"), partial) if synced else ():
            _sync(path)
        _swap(partial, target)
        if keeps:
            (target / keeps).unlink(missing_ok=True)
    except OSError as error:
        why = _WHY.get(error.errno or 0) or f"{error.strerror or error} ({error.filename or target})"
        raise StorageError(f"cannot write {what} to {target}: {why}") from error
    finally:
        if keeps is None or not (partial / keeps).is_file():
            shutil.rmtree(partial, ignore_errors=True)


def discard(partial: Path, keeps: str) -> None:
    """Remove what is worth nothing; ``keeps`` last, so that half of it is still known for what it is."""
    for entry in partial.iterdir() if partial.is_dir() else ():
        if entry.name != keeps:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
    (partial / keeps).unlink(missing_ok=True)


def _free(partial: Path, keeps: str) -> bool:
    """Not there, empty but for the beginning of a ``keeps``, or what an earlier try left."""
    if not partial.is_dir():
        return not partial.exists()
    begun = {Path(keeps).with_suffix(".new").name}
    return (partial / keeps).is_file() or {entry.name for entry in partial.iterdir()} <= begun


def _swap(partial: Path, target: Path) -> None:
    """Two renames: between them the name is free, but never on half a directory."""
    old = _sibling(target, "old") if target.exists() else None
    if old is not None:
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    _sync(target.parent)
    if old is not None:
        for entry in old.iterdir():
            if not (target / entry.name).exists():
                entry.rename(target / entry.name)
        shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    """A hidden name beside ``target``, on the same file system, that nobody else uses."""
    return target.with_name(f".{target.name}.{kind}-{uuid.uuid4().hex[:12]}")


def _sync(path: Path) -> None:
    """Make it durable; directories only where they can be synced."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
