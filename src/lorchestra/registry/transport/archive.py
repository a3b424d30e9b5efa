"""The one file that bundles and backups are: a plain tar archive, written whole or not at all, read without trust.

The first member says what the file is (``kind``, ``format``) and the last seals it: the SHA-256 of every other member.
Any tar lists and unpacks one, but the reader here takes only what the writer here makes: regular files with plain
relative names, uncompressed. So links, devices, sparse files and long-name records never reach any code that would
act on them, an archive cannot be larger unpacked than it is, and what cannot be is refused by its header alone.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tarfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self

from lorchestra.errors import StorageError, UserError
from lorchestra.registry.mistakes import DamagedError

HEAD, SEAL = "head.json", "seal.json"
LARGEST_TEXT = 64 << 20  # bytes of a member that is read into memory
MOST_MEMBERS = 400_000
CHUNK = 1 << 20  # bytes
STALE = 3600.0  # seconds without a write, after which a hidden partial file is nobody's
_BLOCK = 512
_NAME = re.compile(r"[a-z0-9_]+(?:[.-][a-z0-9_]+)*(?:/[a-z0-9_]+(?:[.-][a-z0-9_]+)*){0,3}", re.ASCII)
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


class ArchiveError(UserError):
    """A file that is no bundle or backup, or one that nobody should read."""


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> Any:
        """Take them."""


class Writer:
    """Members, one after another; :func:`writing` makes one."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.digests: dict[str, str] = {}

    def add_json(self, name: str, value: Any) -> None:
        """A value, in canonical form."""
        self.add(name, canonical(value))

    def add(self, name: str, data: bytes) -> None:
        """A small member."""
        self.add_stream(name, len(data), io.BytesIO(data))

    def add_stream(self, name: str, size: int, stream: IO[bytes]) -> None:
        """A member of exactly ``size`` bytes.

        Raises:
            DamagedError: the stream holds more or fewer.
        """
        if name in self.digests or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no new member's name")
        info = tarfile.TarInfo(name)  # mtime 0, nobody's: the same content makes the same bytes
        info.size, info.mode = size, 0o644
        self._out.write(info.tobuf(tarfile.GNU_FORMAT))
        sha, left = hashlib.sha256(), size
        while chunk := stream.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            sha.update(chunk)
            self._out.write(chunk)
        if left:
            raise DamagedError(
                f"{name} should have {size:,} bytes and has {'more' if left < 0 else f'{size - left:,}'}; run "
                "`lorchestra registry verify`",
                name,
            )
        self._out.write(b"\0" * (-size % _BLOCK))
        self.digests[name] = "sha256:" + sha.hexdigest()

    def seal(self) -> None:
        """The last member, and the end of the archive."""
        self.add_json(SEAL, {"members": dict(self.digests)})
        self._out.write(b"\0" * (2 * _BLOCK))


@contextmanager
def writing(path: Path, kind: str) -> Iterator[Writer]:
    """A new archive; it has its name when the block ends without an error, and only then.

    Args:
        path: the file. Nothing may be there.
        kind: of archive (``bundle``), for messages.

    Raises:
        UserError: something is there already.
        StorageError: the disk is full or closed.
    """
    path = path.absolute()
    if path.exists() or path.is_symlink():
        raise UserError(f"cannot write the {kind} to {path}: something is there; choose another name")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with partial.open("xb") as out:
            writer = Writer(out)
            yield writer
            writer.seal()
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"cannot write the {kind} to {path}: {error.strerror or error}. Nothing was kept; free some space, or "
            "choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in the file."""

    first: int
    size: int


class Reader:
    """An archive from anywhere: its members are listed, bounded and known to fill the file; their bytes are checked
    as they are read.

    Args:
        path: the file.
        kind: that it has to be (``bundle``).
        newest: format that is understood.

    Raises:
        ArchiveError: it is no such archive, is of a newer format, is cut off, or holds anything but plain files.
    """

    def __init__(self, path: Path, kind: str, newest: int) -> None:
        self.path, self.kind = path, kind
        if not path.is_file():
            raise ArchiveError(f"{path} is no file; give a {kind} that lorchestra wrote")
        self._file = path.open("rb")
        try:
            self._whole = os.fstat(self._file.fileno()).st_size
            self.sealed: Mapping[str, Any] = {}
            self.members = self._survey()
            self.head = self.json(HEAD)
            self._check_head(newest)
            sealed = self.json(SEAL).get("members")
            if not isinstance(sealed, dict) or sealed.keys() != self.members.keys() - {SEAL}:
                raise self.refused("its seal names other members than it holds")
            self.sealed = sealed
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def refused(self, why: str) -> ArchiveError:
        """The error that says why this file is not read."""
        return ArchiveError(f"{self.path} is refused: {why}. Nothing of it was kept; have the {self.kind} made again")

    def text(self, name: str) -> bytes:
        """A member that fits into memory, checked against the seal where that has been read.

        Raises:
            ArchiveError: it is not there, too large, or damaged.
        """
        if name not in self.members:
            raise self.refused(f"it has no {name}")
        if self.members[name].size > LARGEST_TEXT:
            raise self.refused(f"{name} has {self.members[name].size:,} bytes; at most {LARGEST_TEXT:,} may be")
        out = io.BytesIO()
        self._checked(name, self.copy(name, out))
        return out.getvalue()

    def json(self, name: str) -> dict[str, Any]:
        """An object.

        Raises:
            ArchiveError: as :meth:`text`, or it is none.
        """
        try:
            value = json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise self.refused(f"{name} is no JSON ({error})") from error
        if not isinstance(value, dict):
            raise self.refused(f"{name} should hold a JSON object; it holds {type(value).__name__}")
        return value

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of a member, each of which fits into memory; checked against the seal at the end.

        Raises:
            ArchiveError: as :meth:`text`.
        """
        member, sha, done = self.members[name], hashlib.sha256(), 0
        while done < member.size:
            self._file.seek(member.first + done)
            line = self._file.readline(min(member.size - done, LARGEST_TEXT))
            if not line.endswith(b"\n"):
                raise self.refused(f"{name} has a line that does not end")
            sha.update(line)
            done += len(line)
            yield line
        self._checked(name, "sha256:" + sha.hexdigest())

    def copy(self, name: str, out: Sink) -> str:
        """A member's bytes to ``out``; their SHA-256, for the caller to compare.

        Raises:
            ArchiveError: the file has become shorter.
        """
        member, sha = self.members[name], hashlib.sha256()
        self._file.seek(member.first)
        left = member.size
        while left:
            chunk = self._file.read(min(left, CHUNK))
            if not chunk:
                raise self.refused(f"it ends within {name}")
            left -= len(chunk)
            sha.update(chunk)
            out.write(chunk)
        return "sha256:" + sha.hexdigest()

    def verify(self) -> None:
        """Every member against the seal.

        Raises:
            ArchiveError: one is damaged; the message names it.
        """
        nowhere = _Nowhere()
        for name in self.sealed:
            self._checked(name, self.copy(name, nowhere))

    def _checked(self, name: str, digest: str) -> None:
        expected = self.sealed.get(name, digest)
        if digest != expected:
            raise self.refused(f"{name} is damaged: SHA-256 {digest[7:19]}…, expected {str(expected)[7:19]}…")

    def _check_head(self, newest: int) -> None:
        kind, version = self.head.get("kind"), self.head.get("format")
        if kind != self.kind:
            raise self.refused(f"it is a {kind!r} and not a {self.kind!r}" if kind else f"{HEAD} says no kind")
        if type(version) is not int or not 1 <= version <= newest:
            raise self.refused(
                f"it is a {self.kind} of format {version!r}, and this version of lorchestra reads 1 to {newest}; "
                "update lorchestra"
            )

    def _survey(self) -> dict[str, Member]:
        """All members by their headers; the file is exactly these and the zeros at its end."""
        found: dict[str, Member] = {}
        at = 0
        while True:
            self._file.seek(at)
            block = self._file.read(_BLOCK)
            if block == b"\0" * _BLOCK:
                break
            name, size = self._header(block, first=at == 0)
            if name in found:
                raise self.refused(f"it holds {name} twice")
            if len(found) >= MOST_MEMBERS:
                raise self.refused(f"it holds more than {MOST_MEMBERS:,} members")
            found[name] = Member(at + _BLOCK, size)
            at += _BLOCK + size + -size % _BLOCK
            if at > self._whole:
                raise self.refused(f"it ends within {name}, of which {size:,} bytes are declared: it was cut off")
            self._file.seek(found[name].first + size)
            if any(self._file.read(-size % _BLOCK)):
                raise self.refused(f"something lies behind {name}")
        if self._whole - at != 2 * _BLOCK or any(self._file.read(_BLOCK)):
            raise self.refused("something follows its last member")
        names = list(found)
        if not names or names[0] != HEAD or names[-1] != SEAL:
            raise self.refused(f"it should begin with {HEAD} and end with {SEAL}")
        return found

    def _header(self, block: bytes, first: bool) -> tuple[str, int]:
        packed = next((how for magic, how in _PACKED.items() if first and block.startswith(magic)), "")
        if packed:
            raise self.refused(f"it is packed ({packed}); a {self.kind} is a plain tar archive")
        if len(block) < _BLOCK:
            raise self.refused("it was cut off" if not first else f"it is no {self.kind}")
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError, ValueError) as error:
            raise self.refused(f"it is no {self.kind}, or damaged ({error})") from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = {
                tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a link", tarfile.CHRTYPE: "a device",
                tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe", tarfile.DIRTYPE: "a directory",
            }.get(info.type, "a special record")  # fmt: skip
            raise self.refused(f"it holds {kind} ({info.name[:80]!r}); only plain files may be in it")
        if not _NAME.fullmatch(info.name):
            raise self.refused(f"it holds {info.name[:80]!r}, which is no name of a member")
        if info.size < 0:
            raise self.refused(f"{info.name} has {info.size} bytes")
        return info.name, info.size


class _Nowhere:
    def write(self, data: bytes, /) -> None:
        return None


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _sweep(path: Path) -> None:
    """Remove what a killed writer of this very file left behind."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            if time.time() - leftover.stat().st_mtime > STALE:
                leftover.unlink(missing_ok=True)
        except OSError:
            continue  # somebody else's, or gone meanwhile


def sync_directory(directory: Path) -> None:
    """Make a rename durable, where directories can be synced."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
