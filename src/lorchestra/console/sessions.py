"""Who is at the console: sessions that the server keeps, and how often somebody may try to begin one.

A browser holds a random id of 256 bits, the server its SHA-256 alone. A session is worth what its key is worth now: a
key that was removed, or has another role, is noticed at the next request (the keys file is read again within a second).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lorchestra.registry.access import OPEN, Key

IDLE, LONGEST = 30 * 60.0, 12 * 3600.0  # seconds without a request; seconds in all
MOST = 10_000  # sessions; the one that was idle longest makes room
TRIES, AGAIN = 10, 30.0  # tries that an address has at once; seconds until it has another
ADDRESSES = 10_000  # that are remembered


class KeyRing(Protocol):
    """Knows keys, by themselves and by their hashes."""

    def find(self, secret: str) -> Key | None:
        """The key that ``secret`` is."""
        ...

    def known(self, sha256: str) -> Key | None:
        """The key with that hash, if it is still one."""
        ...


@dataclass
class Session:
    """One browser.

    Args:
        key_hash: of the key it began with; empty on a server without keys.
        began: by the clock.
        seen: at its last request that a person made.
        csrf: the token that every change of it has to show.
    """

    key_hash: str
    began: float
    seen: float
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def shows(self, token: str) -> bool:
        """Whether ``token`` is this session's."""
        return hmac.compare_digest(self.csrf.encode(), token.encode("utf-8", "surrogatepass"))


class Sessions:
    """All of a server's. They belong to one event loop and end with the process.

    Args:
        keys: of the server; ``None`` where there are none.
        clock: seconds.
    """

    def __init__(self, keys: KeyRing | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._clock = keys, clock
        self._held: OrderedDict[str, Session] = OrderedDict()  # by hash of the id, the longest idle first

    def begin(self, key: Key) -> tuple[str, Session]:
        """A session of ``key``, and the id that its browser keeps."""
        now, id = self._clock(), secrets.token_urlsafe(32)
        self._tidy(now)
        session = Session(key.sha256, now, now)
        self._held[_hashed(id)] = session
        return id, session

    def find(self, id: str, *, by_itself: bool = False) -> tuple[Session, Key] | None:
        """The session with that id, and its key as it is now; ``None`` if it has ended.

        Args:
            id: from the browser.
            by_itself: the page asks and no person did: the session grows no younger.
        """
        name, now = _hashed(id), self._clock()
        session = self._held.get(name)
        if session is None:
            return None
        key = self._key(session)
        if key is None or now - session.seen > IDLE or now - session.began > LONGEST:
            del self._held[name]
            return None
        if not by_itself:
            session.seen = now
            self._held.move_to_end(name)
        return session, key

    def end(self, id: str) -> None:
        """The session with that id is over."""
        self._held.pop(_hashed(id), None)

    def __len__(self) -> int:
        return len(self._held)

    def _key(self, session: Session) -> Key | None:
        if self._keys is None:
            return OPEN
        key = self._keys.known(session.key_hash)
        return key if key is not None and key.views else None

    def _tidy(self, now: float) -> None:
        while self._held:
            name, session = next(iter(self._held.items()))
            if len(self._held) < MOST and now - session.seen <= IDLE:
                return
            del self._held[name]


class Attempts:
    """Tries to log in, by address: some at once, then one now and then. A right key gives them back.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address → tries left, when

    def take(self, address: str) -> float:
        """Use one up. Returns the seconds to wait first; 0 if it may be tried now."""
        now = self._clock()
        left, then = self._left.pop(address, (float(TRIES), now))
        left = min(left + (now - then) / AGAIN, float(TRIES))
        allowed = left >= 1
        self._left[address] = (left - 1 if allowed else left, now)
        while len(self._left) > ADDRESSES:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1 - left) * AGAIN

    def forgive(self, address: str) -> None:
        """It was the right key."""
        self._left.pop(address, None)


def _hashed(id: str) -> str:
    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()
