"""What a key may ask for: requests a minute, and at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorchestra.errors import counted
from lorchestra.serve.engine import OverloadedError

SOON = 1.0  # seconds to wait for one of one's own requests to end: nobody knows when


@dataclass
class _State:
    running: int = 0
    tokens: float = 0.0
    seen: float | None = None


class Limits:
    """One event loop's: a token bucket and a count for each tenant.

    The bucket of ``rpm`` requests a minute holds ``rpm`` and fills evenly: a minute's worth may come at once, and in
    any t seconds at most ``rpm · (1 + t/60)`` get through.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}

    @contextmanager
    def admitted(self, tenant: str, rpm: int | None, concurrency: int | None) -> Iterator[None]:
        """A request of ``tenant`` runs inside.

        Raises:
            OverloadedError: too many of theirs do, or did within the minute. Nothing is used up then.
        """
        state = self._states.setdefault(tenant, _State())
        if concurrency is not None and state.running >= concurrency:
            raise OverloadedError(
                f"{counted(state.running, 'request')} of yours run, which is as many as this key may have at a time; "
                "send the next when one is answered",
                SOON,
            )
        if rpm is not None:
            self._take(state, rpm)
        state.running += 1
        try:
            yield
        finally:
            state.running -= 1

    def _take(self, state: _State, rpm: int) -> None:
        now = self._clock()
        gained = float(rpm) if state.seen is None else (now - state.seen) * rpm / 60
        state.tokens, state.seen = min(state.tokens + gained, float(rpm)), now
        if state.tokens < 1:
            raise OverloadedError(
                f"this key may send {counted(rpm, 'request')} a minute, and has; wait a moment",
                (1 - state.tokens) * 60 / rpm,
            )
        state.tokens -= 1
