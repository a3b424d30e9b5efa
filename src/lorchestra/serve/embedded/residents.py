"""The adapters in memory: read in the background, once for all who ask at the same time, the least recently used out
first.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Generic, Protocol, TypeVar

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError, LorchestraError
from lorchestra.serve.adapter_files import WEIGHTS
from lorchestra.serve.engine import Observer, Served, StoppingError

log = logging.getLogger(__name__)


class Sized(Protocol):
    """Something that knows how much memory it takes."""

    @property
    def bytes(self) -> int:
        """Of memory."""
        ...


T = TypeVar("T", bound=Sized)


class Residents(Generic[T]):
    """What was made of adapters, by their keys. Any thread may use it.

    Who was given a value may keep it: putting it out of memory here only forgets it.

    Args:
        read: makes the value of an adapter; it runs on one thread in the background, one adapter at a time.
        budget: bytes that all values together may take.
        observer: hears of every value that is kept and of every one that is put out again.
    """

    def __init__(self, read: Callable[[Served], T], budget: int, observer: Observer | None = None) -> None:
        self.budget = budget
        self._read, self._observer = read, observer
        self._lock = Lock()
        self._kept: OrderedDict[str, tuple[Served, T]] = OrderedDict()  # the least recently used first
        self._used = 0
        self._reading: dict[str, Future[T]] = {}
        self._thread = ThreadPoolExecutor(1, "lorchestra-residents")
        self._closed = False

    @property
    def used(self) -> int:
        """Bytes of what is in memory, at most ``budget``."""
        return self._used

    def keys(self) -> tuple[str, ...]:
        """Of what is in memory, the least recently used first."""
        with self._lock:
            return tuple(self._kept)

    def get(self, adapter: Served) -> T | None:
        """Its value if that is in memory; this is a use of it."""
        with self._lock:
            return self._use(adapter.key)

    def start(self, adapter: Served) -> Future[T]:
        """Its value, from memory or as soon as it is read. Cancelling the future does nothing: others may wait for it.

        The future raises:
            AdapterError: it is larger than the whole budget, or cannot be read; the next call reads again.
            StoppingError: this was closed.
        """
        with self._lock:
            under_way = self._reading.get(adapter.key)
            if under_way is not None:
                return under_way
            future: Future[T] = Future()
            future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
            kept = self._use(adapter.key)
            if kept is not None:
                future.set_result(kept)
            elif self._closed:
                future.set_exception(_closed())
            else:
                self._reading[adapter.key] = future
                self._thread.submit(self._bring, adapter, future)
            return future

    def drop(self, key: str) -> bool:
        """Put ``key`` out of memory; a value that is being read just now goes to those who wait and is not kept.

        Returns:
            Whether it was in memory.
        """
        with self._lock:
            self._reading.pop(key, None)
            gone = self._forget(key) if key in self._kept else None
        if gone is not None:
            self._evicted(gone)
        return gone is not None

    def close(self) -> None:
        """Forget everything; those who wait get a ``StoppingError``, but for the one whose read is under way."""
        with self._lock:
            self._closed = True
            self._reading.clear()
            self._kept.clear()
            self._used = 0
        self._thread.shutdown(wait=True)  # what is queued still runs, to tell those who wait

    def _bring(self, adapter: Served, future: Future[T]) -> None:
        """On the thread: read it, make room, keep it, tell all who wait."""
        try:
            if self._closed:
                raise _closed()
            begun = time.perf_counter()
            value = self._read(adapter)
            seconds = time.perf_counter() - begun
            if value.bytes > self.budget:
                raise AdapterError(
                    f"adapter {adapter.name!r} takes {value.bytes:,} bytes in memory, more than the {self.budget:,} "
                    "that this server has for all adapters; give it more with --memory"
                )
            self._keep(adapter, value, future, seconds)
        except LorchestraError as error:
            self._fail(adapter, future, error)
        except BaseException as error:  # whatever it was, nobody may wait for ever
            log.exception("reading %s failed", adapter.key)
            kind = type(error).__name__
            said = f"adapter {adapter.name!r} cannot be read ({kind}); the server's log says why"
            self._fail(adapter, future, AdapterError(said))
        else:
            future.set_result(value)

    def _fail(self, adapter: Served, future: Future[T], error: LorchestraError) -> None:
        with self._lock:
            self._settled(adapter.key, future)
        future.set_exception(error)

    def _keep(self, adapter: Served, value: T, future: Future[T], seconds: float) -> None:
        out: list[Served] = []
        with self._lock:
            if not self._settled(adapter.key, future):
                return  # dropped meanwhile
            while self._used + value.bytes > self.budget:
                out.append(self._forget(next(iter(self._kept))))
            self._kept[adapter.key] = adapter, value
            self._used += value.bytes
        for other in out:
            self._evicted(other)
        if self._observer is not None:
            self._observer.loaded(adapter, seconds)

    def _settled(self, key: str, future: Future[T]) -> bool:
        """Nobody joins this read any more; whether it was still wanted."""
        wanted = self._reading.get(key) is future
        if wanted:
            del self._reading[key]
        return wanted

    def _use(self, key: str) -> T | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def _forget(self, key: str) -> Served:
        adapter, value = self._kept.pop(key)
        self._used -= value.bytes
        return adapter

    def _evicted(self, adapter: Served) -> None:
        if self._observer is not None:
            self._observer.evicted(adapter)


def read_verified(served: Served, base: BaseId | None, largest: int | None = None) -> Adapter:
    """Read an adapter, and make sure that it is the one that was registered and belongs to this base.

    Args:
        served: which; its directory is read.
        base: that it is to run on; ``None`` or without a digest: any.
        largest: bytes of weights on the disk; a larger file is refused unread.

    Raises:
        AdapterError: it cannot be read, its weights are not those of ``served.digest``, it is of another base (which
            this one is not on record as derived from), or too large. Clients are told, so the message names the adapter
            and never a place on this server.
    """
    name = served.name
    try:
        size = (served.directory / WEIGHTS).stat().st_size
        adapter = Adapter.load(served.directory) if largest is None or size <= largest else None
    except OSError as error:
        raise AdapterError(f"adapter {name!r} cannot be read: {error.strerror}; load it again") from None
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {_without_place(str(error), served.directory)}") from None
    if adapter is None:
        raise AdapterError(
            f"adapter {name!r} has {size:,} bytes of weights, more than the {largest:,} that this server reads; give "
            "it more memory with --memory"
        )
    if adapter.digest != served.digest:
        raise AdapterError(
            f"adapter {name!r} has other weights than when it was registered (digest {adapter.digest[:23]}…, expected "
            f"{served.digest[:23]}…); unload it, and load it again"
        )
    ours, theirs = (base.weights if base else ""), adapter.base.weights
    if ours and theirs and theirs not in (ours, served.sibling_of):
        raise AdapterError(
            f"adapter {name!r} was trained on a base with weights {theirs[:23]}…, this server has {ours[:23]}…; serve "
            "it on the base it belongs to"
        )
    return adapter


def _without_place(message: str, directory: Path) -> str:
    """The message; what lies inside the adapter's directory keeps its own name."""
    return message.replace(f"{directory}/", "").replace(f"{directory}: ", "").replace(str(directory), "its directory")


def _closed() -> StoppingError:
    return StoppingError("the server is stopping; no adapter is loaded any more")
