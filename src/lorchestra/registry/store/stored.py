"""What a store of blobs tells of what it holds, and what every kind of store can do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, Protocol

CHUNK = 1 << 20  # bytes read at a time
SHARDS = "sha256"  # the directory of the blobs
HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)  # a blob's name in it: the digest without "sha256:"


@dataclass(frozen=True)
class Stored:
    """A blob that is there.

    Args:
        digest: ``sha256:…``, by its name; what it holds is known when it is read.
        size: bytes.
        modified: when it was put last, by the store's clock; UTC.
    """

    digest: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class Leftover:
    """Something half written.

    Args:
        name: the store's own.
        size: bytes, 0 where the store does not say.
        modified: when something was written to it last; UTC.
    """

    name: str
    size: int
    modified: datetime


class Store(Protocol):
    """Where the bytes lie; names are 64 hexadecimal digits. It raises what its file system raises."""

    shown: str

    def open(self, name: str) -> BinaryIO: ...
    def sizes(self, names: list[str]) -> dict[str, int]: ...
    def keep(self, name: str) -> bool: ...
    def put(self, source: BinaryIO) -> tuple[str, int]: ...
    def delete(self, name: str) -> None: ...
    def all(self) -> Iterator[Stored]: ...
    def leftovers(self) -> Iterator[Leftover]: ...
    def discard(self, leftover: Leftover) -> None: ...
