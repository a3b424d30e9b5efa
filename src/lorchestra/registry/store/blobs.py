"""``Blobs``: bytes under the SHA-256 of what they are, in a directory or at any URL that fsspec knows.

The same bytes are kept once. What is put is there whole or not at all, what is read is checked as it is read. A local
store is :mod:`lorchestra.registry.store.disk`, every other one :mod:`lorchestra.registry.store.objects` (S3 asks for
the extra ``s3``).
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, cast

from lorchestra.errors import LorchestraError
from lorchestra.registry.location import local_path, masked
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.store.disk import Disk
from lorchestra.registry.store.stored import CHUNK, HEX, Leftover, Store, Stored

LIMIT = 64 << 20  # bytes that :meth:`Blobs.read` takes into memory unless told otherwise
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Blobs:
    """The blobs of a registry. It holds nothing open and may be used by many threads.

    Args:
        url: a path, ``file:///dir``, or fsspec's URL (``s3://bucket/prefix``). Nothing is made or asked for yet.

    Raises:
        UserError: it names no store, or one that needs a package which is not there.
    """

    def __init__(self, url: str) -> None:
        path = local_path(url)
        self._store: Store
        if path is not None:
            self._store = Disk(path)
        else:
            from lorchestra.registry.store.objects import Objects

            self._store = Objects(url)
        self.shown = self._store.shown

    def __repr__(self) -> str:
        return f"<Blobs {self.shown}>"

    def put_file(self, path: Path) -> tuple[str, int]:
        """Keep what is in ``path``. It counts as put now, whether it was there already or not.

        Returns:
            Digest (``sha256:…``) and bytes of what is kept, also where the file changes meanwhile.

        Raises:
            RegistryError: it cannot be read, or the store is full, closed or down; nothing is half there then.
        """
        with self._doing(f"put {path.name}"), _source(path) as source:
            sha, size = hashlib.sha256(), 0
            while chunk := source.read(CHUNK):
                sha.update(chunk)
                size += len(chunk)
            if self._store.keep(sha.hexdigest()):
                return f"sha256:{sha.hexdigest()}", size
            source.seek(0)
            name, size = self._store.put(source)
        return f"sha256:{name}", size

    def put_bytes(self, data: bytes) -> tuple[str, int]:
        """Keep ``data``; as :meth:`put_file`."""
        name = hashlib.sha256(data).hexdigest()
        with self._doing(f"put {len(data):,} bytes"):
            if not self._store.keep(name):
                self._store.put(io.BytesIO(data))
        return f"sha256:{name}", len(data)

    def open(self, digest: str) -> BinaryIO:
        """A stream of the blob. That it is whole is known when its end is read, and not before.

        Raises:
            DamagedError: it is not there; while reading, at the end: it is not what its name says.
            RegistryError: the store is down, here or while reading.
        """
        name = _name(digest)
        with self._doing(f"read {digest}"):
            try:
                source = self._store.open(name)
            except FileNotFoundError:
                self._store.sizes([name])  # tells where the store itself is not there
                raise DamagedError(
                    f"blob {digest} is missing from {self.shown}; restore it from a backup", digest
                ) from None
        return cast(BinaryIO, io.BufferedReader(_Verified(source, digest, self), CHUNK))

    def read(self, digest: str, limit: int = LIMIT) -> bytes:
        """The whole blob, checked.

        Args:
            digest: of it.
            limit: bytes.

        Raises:
            DamagedError: it is not there, or not what its name says.
            RegistryError: it is larger than ``limit``, or the store is down.
        """
        with self.open(digest) as stream:
            data = stream.read(limit + 1)
            if len(data) > limit:
                raise RegistryError(f"blob {digest} in {self.shown} is larger than {limit:,} bytes; it is not read")
        return data

    def fetch(self, digest: str, path: Path) -> int:
        """Write the blob to ``path``, checked before it has that name; what stood there is replaced.

        Returns:
            Bytes.

        Raises:
            DamagedError: it is not there, or not what its name says.
            RegistryError: ``path`` cannot be written, or the store is down. Nothing new stands at ``path`` then.
        """
        partial, size = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:12]}.partial"), 0
        try:
            with self.open(digest) as stream, partial.open("xb") as out:
                while chunk := stream.read(CHUNK):
                    size += out.write(chunk)
            partial.replace(path)
        except OSError as error:
            raise RegistryError(f"cannot write {path}: {_why(error)}") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return size

    def has(self, digest: str) -> bool:
        """Whether there is such a blob, whole or damaged.

        Raises:
            RegistryError: the store is down.
        """
        return bool(self.sizes([digest]))

    def sizes(self, digests: Iterable[str]) -> dict[str, int]:
        """Digest → bytes, of those that are there, whole or damaged.

        Raises:
            RegistryError: the store is down.
        """
        names = list(dict.fromkeys(_name(digest) for digest in digests))
        with self._doing("look for blobs"):
            return {f"sha256:{name}": size for name, size in self._store.sizes(names).items()}

    def all(self) -> Iterator[Stored]:
        """Every blob, by digest.

        Raises:
            RegistryError: the store is down, here or while iterating.
        """
        with self._doing("list the blobs"):
            yield from self._store.all()

    def delete(self, digest: str) -> None:
        """Take a blob away; none there is no mistake.

        Raises:
            RegistryError: the store is down or closed.
        """
        with self._doing(f"delete {digest}"):
            self._store.delete(_name(digest))

    def leftovers(self, older_than: timedelta) -> list[Leftover]:
        """What was being written when a process was killed, untouched for so long; it is no damage, only bytes.

        Raises:
            RegistryError: the store is down.
        """
        now = datetime.now(UTC)
        with self._doing("list what is half written"):
            return [left for left in self._store.leftovers() if now - left.modified >= older_than]

    def discard(self, leftover: Leftover) -> None:
        """Take a leftover away; none there is no mistake.

        Raises:
            RegistryError: the store is down or closed.
        """
        with self._doing(f"delete {leftover.name}"):
            self._store.discard(leftover)

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Whatever a store raises becomes one sentence that names it: they have no errors in common."""
        try:
            yield
        except LorchestraError:
            raise
        except Exception as error:
            raise RegistryError(
                f"cannot {what}: the store {self.shown} says: {_why(error)}. Check that it is up, that its URL is "
                "right, that it has room and that you may use it"
            ) from error


class _Verified(io.RawIOBase):
    """Reads ``source`` and hashes along; its end is reached only where the digest is right."""

    def __init__(self, source: BinaryIO, digest: str, blobs: Blobs) -> None:
        self._source, self._digest, self._blobs = source, digest, blobs
        self._sha = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what BufferedReader gives
        with self._blobs._doing(f"read {self._digest}"):
            data = self._source.read(len(buffer))
        if data:
            self._sha.update(data)
            buffer[: len(data)] = data
        elif len(buffer) and f"sha256:{self._sha.hexdigest()}" != self._digest:
            raise DamagedError(
                f"blob {self._digest} in {self._blobs.shown} is damaged: its bytes have the digest "
                f"sha256:{self._sha.hexdigest()[:12]}…. Push the version again, or restore a backup",
                self._digest,
            )
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


@contextmanager
def _source(path: Path) -> Iterator[BinaryIO]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        stream = os.fdopen(descriptor, "rb")
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {_why(error)}") from error
    with stream:
        if not path.is_file():
            raise RegistryError(f"cannot put {path}: it is no regular file")
        yield stream


def _name(digest: str) -> str:
    name = digest.removeprefix("sha256:")
    if name == digest or not HEX.fullmatch(name):
        raise RegistryError(f"{digest[:80]!r} is no digest of a blob: sha256: and 64 hexadecimal digits are expected")
    return name


def _why(error: Exception) -> str:
    """In one line, without secrets."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL:
        return f"{os.strerror(number)}. Free some space and try again; nothing is half there"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = masked(" ".join(text.split()))[:300] or "no reason"
    return f"{text} ({type(error).__name__})"
