"""Ctrl-C during training: a step that has begun is finished, so that what is checkpointed is exact."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """Holds Ctrl-C back while a step runs.

    Args:
        held_back: called when a Ctrl-C has to wait for the end of the step; a second one does not wait.
    """

    def __init__(self, held_back: Callable[[], None]) -> None:
        self._held_back = held_back
        self._inside, self._waiting = False, False
        self.whole = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Answer Ctrl-C as described, where it is this process's to answer: in the main thread, if nobody else does."""
        mine = threading.current_thread() is threading.main_thread()
        if not (mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            yield
            return
        signal.signal(signal.SIGINT, self._received)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside happens as a whole: :attr:`whole` is false if it was left by an exception."""
        self.whole, self._inside = False, True
        try:
            yield
        finally:
            self._inside = False
        self.whole = True

    def answer(self) -> None:
        """Raises ``KeyboardInterrupt`` if Ctrl-C was held back."""
        if self._waiting:
            raise KeyboardInterrupt

    def _received(self, number: int, frame: Any) -> None:
        if not self._inside or self._waiting:
            raise KeyboardInterrupt
        self._waiting = True
        self._held_back()
