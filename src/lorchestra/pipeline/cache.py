"""Finished steps, by what they were made of: one content-addressed cache shared by all recipes.

A step lives in ``<kind>-<digest>``, appears there by one rename, and holds ``done.json`` with the SHA-256 of its
files. Until then it is ``<kind>-<digest>.work``, beside the lock of whoever is at it. What a killed step needs to go
on lies in ``scratch/`` there; the rest of an unfinished directory is cleared before the step is tried again.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorchestra.adapter.digest import json_digest
from lorchestra.base.lock import locked
from lorchestra.errors import LorchestraError, StorageError, UserError

SCRATCH = "scratch"  # inside a work directory: checkpoints, gone before the step is finished
MARKER = "done.json"
LINKED_FROM = 1 << 20  # bytes
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than allowed here (ulimit -f, or the file system's limit)",
}
_CLOSED = {errno.EACCES: "no permission", errno.EROFS: "the file system is read-only", errno.EPERM: "not permitted"}
_FOREIGN = re.compile(r"\(os error (\d+)\)")  # how Rust writers (safetensors) tell the number


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
        StorageError: instead of the error of the operating system or of safetensors.
    """
    try:
        yield
    except LorchestraError:
        raise
    except Exception as error:
        number = _error_number(error)
        why = _FULL.get(number) or _CLOSED.get(number)
        if why is None:
            raise
        advice = (
            "Free some space and run again; finished steps are kept"
            if number in _FULL
            else "Choose a directory that can be written (LORCHESTRA_HOME for the cache, --run-dir or --output_dir for "
            "the results)"
        )
        raise StorageError(f"{why}: {getattr(error, 'filename', None) or where}. {advice}") from error


def _error_number(error: Exception) -> int:
    """The operating system's number of a failed write, whoever reports it; 0 for anything else."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _FOREIGN.search(str(error))
    return int(found[1]) if found else 0


class StepCache:
    """The cache under ``root`` (``home()/steps``)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, digest: str) -> Path:
        """Where the finished step is, or will be."""
        return self.root / f"{kind}-{digest[:24]}"

    def work(self, kind: str, digest: str) -> Path:
        """Where an unfinished step is made."""
        final = self.path(kind, digest)
        return final.with_name(final.name + ".work")

    def _lock(self, kind: str, digest: str) -> Path:
        return _lock_of(self.path(kind, digest))

    def abandon(self, kind: str, digest: str) -> None:
        """Remove what an unfinished step would go on from; not while another process is at it."""
        work = self.work(kind, digest)
        if not work.exists():
            return
        lock = FileLock(self._lock(kind, digest))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        try:
            discard(work)
        finally:
            lock.release()

    def lookup(self, kind: str, digest: str) -> Step | None:
        """The finished step, if it is there."""
        directory = self.path(kind, digest)
        marker = directory / MARKER
        if not marker.exists():
            return None
        note = _note(directory)
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
            make: fills the work directory it is given and returns notes (JSON). The directory is empty but for
                ``scratch/``, where it finds what it left there before a kill, and which is not kept.
            waiting: hears that another process is making the same step.

        Raises:
            StorageError: the disk is full or closed (nothing stands under the final name then), or the finished step
                was damaged.
        """
        found = self.lookup(kind, digest)
        if found is not None:
            self.verify(found)
            return found
        final = self.path(kind, digest)
        with storage(final):
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self._lock(kind, digest), f"{kind} {digest[:12]}", waiting):
                found = self.lookup(kind, digest)
                if found is not None:
                    _unlock(final)
                    return found
                work = self.work(kind, digest)
                if not (work / MARKER).exists():  # else killed between the marker and the rename: all is there
                    (work / SCRATCH).mkdir(parents=True, exist_ok=True)
                    _clear(work)
                    info = dict(make(work))
                    note = {"kind": kind, "digest": digest, "outputs": outputs(work), "info": info}
                    write_json(work / MARKER, note)
                shutil.rmtree(work / SCRATCH, ignore_errors=True)
                shutil.rmtree(final, ignore_errors=True)  # a directory without its marker is nobody's
                os.replace(work, final)
                _sync(final.parent)
                _unlock(final)
        return Step(final, _note(final)["info"], digest, cached=False)

    def verify(self, step: Step) -> None:
        """Recompute the digests of the step's files; a run does so for every step that it reuses.

        A lock file that is left beside it goes.

        Raises:
            StorageError: a file is missing or was changed.
        """
        found = outputs(step.directory)
        for name, digest in _note(step.directory)["outputs"].items():
            if found.get(name) != digest:
                raise StorageError(
                    f"{step.directory / name} is missing or was changed; delete {step.directory}, run again"
                )
        _unlock(step.directory)


def _lock_of(directory: Path) -> Path:
    return directory.with_name(directory.name + ".lock")


def _unlock(directory: Path) -> None:
    """Remove the lock file of a finished step: who holds it, or waits for it, finds the step there."""
    with suppress(OSError):  # a cache that is read only, or a system that does not remove open files
        _lock_of(directory).unlink(missing_ok=True)


def _note(directory: Path) -> dict[str, Any]:
    """What a finished step noted of itself."""
    marker = directory / MARKER
    try:
        note: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        if not {"digest", "outputs", "info"} <= set(note):
            raise ValueError("it lacks an entry")
    except (ValueError, TypeError) as error:
        raise StorageError(f"{marker} is damaged ({error}); delete {directory}, run again") from error
    return note


def _clear(work: Path) -> None:
    """Remove what an unfinished try left behind, its scratch excepted."""
    for path in work.iterdir():
        if path.name != SCRATCH:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def outputs(directory: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file under ``directory``, made durable; ``scratch/`` is no output."""
    found = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory)
        if name.parts[0] == SCRATCH:
            continue
        with path.open("rb") as stream:
            found[name.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that ``path`` holds all of it or what it held before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(_json(value))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def place(source: Path, target: Path, told: Mapping[str, Any] | None = None) -> None:
    """Put a copy of ``source`` at ``target``, in place of what is there; what is there and equal stays untouched.

    Weights are hard links where the file system allows; small files, which people edit, are copies. ``told``: name of
    a JSON file → what it says at ``target``, where that differs from the source's. A kill leaves hidden siblings at
    most, never half a directory under the name; the next call removes them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _hidden(target, "partial"), _hidden(target, "old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    rewritten = {Path(name): value for name, value in (told or {}).items()}
    if _is_placed(source, target, rewritten):
        return
    partial.mkdir()
    for path in sorted(source.rglob("*")):  # parents come before what is in them
        name = path.relative_to(source)
        if path.is_dir():
            (partial / name).mkdir()
        elif name in rewritten:
            write_json(partial / name, rewritten[name])
        else:
            _link_or_copy(path, partial / name)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _is_placed(source: Path, target: Path, rewritten: Mapping[Path, Any]) -> bool:
    names = {path.relative_to(source) for path in source.rglob("*")}
    if names != {path.relative_to(target) for path in target.rglob("*")}:
        return False
    files = [name for name in sorted(names) if (source / name).is_file()]
    return all(
        (target / name).is_file()
        and (
            (target / name).read_bytes() == _json(rewritten[name]).encode()
            if name in rewritten
            else (target / name).samefile(source / name) or filecmp.cmp(source / name, target / name, shallow=False)
        )
        for name in files
    )


def discard(target: Path) -> None:
    """Remove a directory; at no moment half of it stands under its name."""
    old = _hidden(target, "old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _link_or_copy(source: Path, target: Path) -> None:
    if source.stat().st_size >= LINKED_FROM:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
    else:
        shutil.copyfile(source, target)


def sweep(directory: Path) -> None:
    """Remove the half-written files that a killed run left in its directory; call it under :func:`run_lock`."""
    for path in directory.glob(".*.partial"):
        if path.is_file():
            path.unlink(missing_ok=True)


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
                f"{directory} is in use by {who}; wait for it, or use --wait or another --run-dir (of a sweep, "
                "--output_dir)"
            ) from None
        waiting(f"{directory} is in use by {who}; waiting for it to end")
        lock.acquire()
    try:
        owner.write_text(f"process {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _sync(directory: Path) -> None:
    """Make a rename durable, where directories can be synced."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
