"""Finished steps, by what they were made of: one content-addressed cache shared by all recipes.

A step lives in ``<kind>-<digest>``, appears there by one rename, and holds ``done.json`` with the SHA-256 of its
files. Until then it is ``<kind>-<digest>.work``, which stays after a kill, so that a step can go on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorchestra.adapter.digest import json_digest
from lorchestra.errors import StorageError, UserError

SCRATCH = "scratch"  # inside a work directory: checkpoints, gone before the step is finished
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_CLOSED = {errno.EACCES: "no permission", errno.EROFS: "the file system is read-only", errno.EPERM: "not permitted"}


def step_digest(kind: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what a step's outcome depends on.

    Args:
        kind: what the step does.
        version: of its code's format; raised when the same settings would give another outcome.
        settings: those that matter (never logging).
        inputs: digests of what it reads.
    """
    return json_digest({"kind": kind, "version": version, "settings": settings, "inputs": inputs}).removeprefix(
        "sha256:"
    )


@dataclass(frozen=True)
class Step:
    """A finished step: its directory, what it noted about itself, and whether it was there already."""

    directory: Path
    info: Mapping[str, Any]
    digest: str
    cached: bool


@contextmanager
def storage(where: Path) -> Iterator[None]:
    """Turn a full or closed disk into one clear error.

    Raises:
        StorageError: instead of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        why = _FULL.get(error.errno or 0) or _CLOSED.get(error.errno or 0)
        if why is None:
            raise
        advice = (
            "Free some space and run again; finished steps are kept"
            if error.errno in _FULL
            else "Choose a directory that can be written (LORCHESTRA_HOME for the cache, --run-dir for the run)"
        )
        raise StorageError(f"{why}: {error.filename or where}. {advice}") from error


class StepCache:
    """The cache under ``root`` (``home()/steps``)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, digest: str) -> Path:
        """Where the finished step is, or will be."""
        return self.root / f"{kind}-{digest[:24]}"

    def lookup(self, kind: str, digest: str) -> Step | None:
        """The finished step, if it is there."""
        directory = self.path(kind, digest)
        marker = directory / "done.json"
        if not marker.exists():
            return None
        note = json.loads(marker.read_text(encoding="utf-8"))
        if note["digest"] != digest:
            raise StorageError(f"{directory} holds another step ({note['digest'][:24]}…); delete it and run again")
        return Step(directory, note["info"], digest, cached=True)

    def build(
        self,
        kind: str,
        digest: str,
        make: Callable[[Path], Mapping[str, Any]],
        waiting: Callable[[str], None] = lambda text: None,
    ) -> Step:
        """The finished step, made now if it is not there.

        Args:
            kind: of the step.
            digest: of the step (:func:`step_digest`).
            make: fills the work directory it is given and returns notes (JSON). It may find its own unfinished work
                there; what it puts into ``scratch/`` is not kept.
            waiting: hears that another process is making the same step.

        Raises:
            StorageError: the disk is full or closed; nothing stands under the final name then.
        """
        found = self.lookup(kind, digest)
        if found is not None:
            return found
        final = self.path(kind, digest)
        with storage(final):
            self.root.mkdir(parents=True, exist_ok=True)
            with _locked(FileLock(f"{final}.lock"), f"{kind} {digest[:12]}", waiting):
                found = self.lookup(kind, digest)
                if found is not None:
                    return found
                work = final.with_name(final.name + ".work")
                work.mkdir(exist_ok=True)
                info = dict(make(work))
                shutil.rmtree(work / SCRATCH, ignore_errors=True)
                note = {"kind": kind, "digest": digest, "outputs": outputs(work), "info": info}
                write_json(work / "done.json", note)
                shutil.rmtree(final, ignore_errors=True)  # a directory without its marker is nobody's
                os.replace(work, final)
                _sync(final.parent)
        return Step(final, info, digest, cached=False)

    def verify(self, step: Step) -> None:
        """Recompute the digests of the step's files.

        Raises:
            StorageError: a file is missing or was changed.
        """
        note = json.loads((step.directory / "done.json").read_text(encoding="utf-8"))
        (found := outputs(step.directory)).pop("done.json", None)
        for name, digest in note["outputs"].items():
            if found.get(name) != digest:
                raise StorageError(
                    f"{step.directory / name} is missing or was changed; delete {step.directory}, run again"
                )


def outputs(directory: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file under ``directory``."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            found[path.relative_to(directory).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that ``path`` holds all of it or what it held before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


@contextmanager
def run_lock(directory: Path, wait: bool, waiting: Callable[[str], None]) -> Iterator[None]:
    """One run at a time in a run directory. A killed run's lock goes with its process.

    Raises:
        UserError: another run is on, and ``wait`` is false.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    owner = directory / ".lock.owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            who = owner.read_text(encoding="utf-8").strip() or "another process"
        except OSError:
            who = "another process"
        if not wait:
            raise UserError(
                f"{directory} is in use by {who}; wait for it, or use --wait or another --run-dir"
            ) from None
        waiting(f"{directory} is in use by {who}; waiting for it to end")
        lock.acquire()
    try:
        owner.write_text(f"process {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _locked(lock: FileLock, what: str, waiting: Callable[[str], None]) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting(f"another process is making {what}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sync(directory: Path) -> None:
    """Make a rename durable, where directories can be synced."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
