"""One process at a time, and a word to whoever has to wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, what: str, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``; a killed holder's lock goes with its process.

    Args:
        path: the lock file; its directory exists.
        what: is made under the lock, for the message (``"stage 3f2a…"``).
        waiting: hears once that another process holds it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting(f"another process is making {what}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
