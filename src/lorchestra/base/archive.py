"""A downloaded wheel or sdist, looked at before anything of it is written: what it would unpack to, and where."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Self

from lorchestra.base.source import Source
from lorchestra.errors import SourceError, StorageError

ZIPPED = (".whl", ".zip")
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
# Text packs to a tenth; deflate can do a thousandth, and then it is nothing but the same bytes over and over.
MAX_RATIO = 50
ALWAYS_ALLOWED = 1 << 30  # bytes
MAX_MEMBERS = 100_000
MAX_NAME = 1 << 16  # bytes of a tar header that holds a long name


def survey(archive: Path, directory: Path, source: Source) -> None:
    """Whether ``archive`` is fit to be unpacked into ``directory``; nothing is written.

    Raises:
        SourceError: it would unpack to far more than its size or to too many files, holds links or other special
            members, or members that climb out.
        StorageError: there is not enough room for it.
        DAMAGED: it cannot be read.
    """
    allowed = max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size)
    total = 0
    for count, (name, size, kind) in enumerate(_members(archive), start=1):
        if kind:
            raise _refused(source, f"it holds {name!r}, {kind}")
        climbs = ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts
        if climbs or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
            raise _refused(source, f"it holds {name!r}, which climbs out of it")
        if count > MAX_MEMBERS:
            raise _refused(source, f"it holds more than {MAX_MEMBERS:,} files")
        total += size
        if total > allowed:
            raise _refused(
                source,
                f"its {archive.stat().st_size:,} bytes would unpack to more than {allowed:,} "
                f"({MAX_RATIO} times as many, and a gigabyte, are allowed)",
            )
    free = shutil.disk_usage(directory).free
    if total > free:
        raise StorageError(
            f"source {source.text!r} unpacks to {total / 1e6:,.0f} MB, and {directory.parent} has {free / 1e6:,.0f} MB "
            "left. Free some space, or set LORCHESTRA_HOME to a directory with more"
        )


def _refused(source: Source, why: str) -> SourceError:
    return SourceError(
        f"source {source.text!r}: {why}; refused. If you trust it, unpack it yourself and write the path of the file "
        "inside"
    )


def _members(archive: Path) -> Iterator[tuple[str, int, str]]:
    """Name, unpacked bytes, and what is wrong with its kind; of a tar each as soon as its header is read."""
    if archive.suffix in ZIPPED:
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                yield info.filename, info.file_size, "a link" if stat.S_ISLNK(info.external_attr >> 16) else ""
        return
    with tarfile.open(archive, tarinfo=_Header) as tar:
        for member in tar:
            kind = "a link" if member.issym() or member.islnk() else "a special file"
            yield member.name, member.size, "" if member.isfile() or member.isdir() else kind


class _Header(tarfile.TarInfo):
    """tarfile reads the whole of a long name, and of a header's extensions, into memory."""

    _IN_MEMORY = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                  tarfile.SOLARIS_XHDTYPE)  # fmt: skip

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in cls._IN_MEMORY and header.size > MAX_NAME:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header
