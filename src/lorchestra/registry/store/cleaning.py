"""Local copies of versions kept within a bound: the least recently used go, and never one that any process holds.

    cache/<content>            a copy, with <content>.verified and <content>.lock beside it
    cache/holders/<id>.json    the copies that one process holds; its lock is held for as long as the process lives

Who was killed holds nothing: its lock went with it. When a copy was last used is the time of its ``.verified``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lorchestra.base.home import write_whole

_COPY = re.compile("[0-9a-f]{64}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """A copy in the cache: its name, its bytes, and when it was last used (seconds since 1970)."""

    name: str
    size: int
    used: float


class Copies:
    """The copies that this process holds, in a cache that other processes have copies in too. Threads may share it.

    Args:
        cache: the directory.
        most: bytes that all copies may take together; ``None`` for no bound.
    """

    def __init__(self, cache: Path, most: int | None) -> None:
        self.cache, self.most = cache, most
        self._held = Counter[str]()
        self._own: FileLock | None = None
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()

    def hold(self, name: str) -> None:
        """From now on nobody removes the copy ``name``; it need not be there yet. As often held, as often let go.

        In a cache that cannot be written nobody is told; nothing can be removed there either.
        """
        with self._lock:
            self._held[name] += 1
            if self._held[name] == 1:
                with contextlib.suppress(OSError):
                    self._say()

    def let_go(self, name: str, used: float | None = None) -> None:
        """It may be removed, as far as this process goes.

        Args:
            name: of the copy.
            used: when it was last used, seconds since 1970; by default now.
        """
        with self._lock:
            self._held[name] -= 1
            if self._held[name] > 0:
                return
            del self._held[name]
            at = time.time() if used is None else used
            with contextlib.suppress(OSError):
                self._say()
                os.utime(self.cache / f"{name}.verified", (at, at))

    def over(self) -> int:
        """Bytes of all copies beyond the bound; 0 within it."""
        return 0 if self.most is None else max(sum(copy.size for copy in self._there()) - self.most, 0)

    def clean(self) -> list[Copy]:
        """Remove copies that no process holds, the least recently used first, until the rest is within the bound.

        Returns:
            What is gone.
        """
        if self.most is None or not self.cache.is_dir():
            return []
        with self._alone():
            there = sorted(self._there(), key=lambda copy: copy.used)
            size, held = sum(copy.size for copy in there), self._held_by_all()
            gone = []
            for copy in there:
                if size <= self.most:
                    break
                if copy.name not in held and self._removed(copy.name):
                    gone.append(copy)
                    size -= copy.size
        return gone

    def close(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            self._held.clear()
            if self._own is not None:
                self._file.unlink(missing_ok=True)
                self._own.release()
                self._own = None

    @property
    def _file(self) -> Path:
        return self.cache / "holders" / f"{self._id}.json"

    def _say(self) -> None:
        """Write down what is held. While others clean they are waited for: they may have looked already."""
        if self._own is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._own = FileLock(self._file.with_suffix(".lock"), thread_local=False)
            self._own.acquire()
        with self._alone():
            write_whole(self._file, json.dumps(sorted(self._held)))

    def _alone(self) -> FileLock:
        return FileLock(self.cache / "holders" / "cleaning.lock", thread_local=False)

    def _there(self) -> Iterable[Copy]:
        if not self.cache.is_dir():
            return
        for directory in self.cache.iterdir():
            if not _COPY.fullmatch(directory.name):
                continue
            with contextlib.suppress(OSError):  # another process removes it just now
                marker = self.cache / f"{directory.name}.verified"
                used = (marker if marker.exists() else directory).stat().st_mtime
                yield Copy(directory.name, sum(file.stat().st_size for file in directory.iterdir()), used)

    def _held_by_all(self) -> set[str]:
        found = set(self._held)
        for file in (self.cache / "holders").glob("*.json"):
            if file == self._file:
                continue
            with _unless_held(file.with_suffix(".lock")) as dead:
                if dead:
                    file.unlink(missing_ok=True)
                else:
                    with contextlib.suppress(OSError, ValueError):
                        found |= set(json.loads(file.read_text(encoding="utf-8")))
            if dead:
                file.with_suffix(".lock").unlink(missing_ok=True)
        return found

    def _removed(self, name: str) -> bool:
        """Whether it is gone; not one that another process makes or verifies at this moment."""
        with _unless_held(self.cache / f"{name}.lock") as free:
            if not free:
                return False
            try:
                (self.cache / f"{name}.verified").unlink(missing_ok=True)
                shutil.rmtree(self.cache / name)
            except OSError as error:
                _log.warning("the copy %s cannot be removed: %s", self.cache / name, error.strerror or error)
                return False
        return True


@contextlib.contextmanager
def _unless_held(path: Path) -> Iterator[bool]:
    """Holds the lock file ``path`` if nobody else does; yields whether."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
