"""The core in a process of its own: the event loop and the steps then never wait for each other."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from lorchestra.base.load import load_tokenizer
from lorchestra.errors import LorchestraError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.serve.embedded.core import Core, Ended, Hear, Setup
from lorchestra.serve.embedded.generation import Generation
from lorchestra.serve.embedded.messages import (
    Drop,
    Leave,
    Load,
    Order,
    Push,
    Ready,
    See,
    Stop,
    packed,
    receive,
    send,
    until_ready,
)
from lorchestra.serve.engine import Served

CHILD = "lorchestra.serve.embedded.child"
STOPS_IN = 20.0  # seconds that a step may take, when it is to be the last
log = logging.getLogger(__name__)


class ProcessCore:
    """Implements :class:`~lorchestra.serve.embedded.core.Core`. The process ends with this one, however that ends.

    It begins to load at once; :meth:`wait` for it before anything else.

    Args:
        setup: what it loads, and how.

    Raises:
        UserError: no process can be started.
    """

    def __init__(self, setup: Setup) -> None:
        self._ready: Ready | None = None
        self._orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # an empty one is the last
        self._threads: list[threading.Thread] = []
        self._stopping = False
        # It finds what this process finds, wherever that has its modules from.
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [sys.executable, "-P", "-m", CHILD]
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
        except OSError as error:
            raise UserError(
                f"the engine's process cannot be started ({error.strerror}); set engine_process: false"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        with suppress(OSError):  # it has ended; wait() says so
            send(self._in, packed(setup))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def max_length(self) -> int:
        """Positions of a sequence."""
        return self._known.max_length

    @property
    def rows(self) -> int:
        """Of the model's output."""
        return self._known.rows

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._known.end_ids

    @property
    def _known(self) -> Ready:
        if self._ready is None:
            raise RuntimeError("wait() first")
        return self._ready

    def wait(self, reporter: Reporter = SILENT) -> None:
        """Until the base is loaded.

        Raises:
            UserError: as of :func:`~lorchestra.base.load.load_base` and
                :class:`~lorchestra.serve.embedded.local.LocalCore`.
            LorchestraError: the process failed, or ended.
        """
        with self._ended_by_failure():
            try:
                self._ready = until_ready(self._out, reporter)
            except EOFError:
                self._await_end(1.0)
                how = _how_it_ended(self._process.returncode)
                raise LorchestraError(
                    f"the engine's process {how} while it loaded the base; where it was killed, memory was short: "
                    "take a smaller base or dtype, or another --device"
                ) from None

    def start(self, hear: Hear) -> None:
        """Begin."""
        work = {"lorchestra-engine-hears": lambda: self._read(hear), "lorchestra-engine-asks": self._write}
        self._threads = [threading.Thread(target=do, name=name, daemon=True) for name, do in work.items()]
        for thread in self._threads:
            thread.start()

    def push(self, number: int, generation: Generation) -> None:
        """Let a sequence wait."""
        members = tuple((_plain(served), c) for served, c in generation.members)
        self._order(Push(number, replace(generation, members=members)))

    def leave(self, number: int) -> None:
        """Nobody waits for it any more."""
        self._order(Leave(number))

    def see(self, number: int, prompt: tuple[int, ...], layers: int, last: bool) -> None:
        """What a gate sees of it."""
        self._order(See(number, prompt, layers, last))

    def load(self, number: int, adapter: Served) -> None:
        """Make it resident."""
        self._order(Load(number, _plain(adapter)))

    def drop(self, number: int, key: str) -> None:
        """Put it out of memory."""
        self._order(Drop(number, key))

    def stop(self) -> None:
        """Let go of everything: the process ends, by force if it must."""
        self._stopping = True
        self._order(Stop())
        self._orders.put(b"")
        if not self._threads:  # it was never started
            self._process.kill()
        self._await_end(STOPS_IN)
        for thread in self._threads:
            thread.join()
        self._close()

    def _order(self, order: Order) -> None:
        self._orders.put(packed(order))

    def _write(self) -> None:
        """A thread: whoever orders does not wait until the other side reads it."""
        with suppress(OSError):  # it has ended, which the other thread hears
            while data := self._orders.get():
                send(self._in, data)

    def _read(self, hear: Hear) -> None:
        """A thread: what happened there."""
        while True:
            try:
                events = receive(self._out)
            except EOFError:
                break
            hear(events)
        self._await_end(STOPS_IN if self._stopping else 1.0)
        if not self._stopping:
            how = _how_it_ended(self._process.returncode)
            log.error("the engine's process (%d) %s; nothing is answered until the server is restarted", self.pid, how)
            self._orders.put(b"")
        hear((Ended("the engine's process has ended; the server has to be restarted"),))

    def _await_end(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("the engine's process (%d) does not end, so it is killed", self.pid)
            self._process.kill()
            self._process.wait()

    def _close(self) -> None:
        for pipe in (self._in, self._out):
            with suppress(OSError):  # what was not written yet has no reader any more
                pipe.close()

    @contextmanager
    def _ended_by_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._close()
            raise


def loaded(setup: Setup, reporter: Reporter = SILENT) -> tuple[Core, Any]:
    """A core on the base that ``setup`` names, and the base's tokenizer, which is read here meanwhile.

    Raises:
        UserError, LorchestraError: as of :class:`ProcessCore` and its ``wait``.
    """
    core = ProcessCore(setup)
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(load_tokenizer, setup.directory)
        core.wait(reporter)
        return core, reading.result()


def _plain(served: Served) -> Served:
    """Without what a core does not need of it, so that it is small."""
    return replace(served, parents={}, chat_template=None, system_prompt=None, defaults={})


def _how_it_ended(code: int) -> str:
    """``was killed by SIGKILL``, or ``ended with code 1``."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
