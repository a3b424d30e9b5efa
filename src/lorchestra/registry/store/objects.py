"""Blobs at any URL that fsspec knows: S3 and its like, SFTP, a file system in memory.

An object store shows an object when it is complete and never before, so a blob is one put (of S3: one request, or one
multipart upload, which counts from its last request on). Elsewhere it is written under ``partial/`` and moved. Whether
what is there already is whole cannot be seen without reading it all, so a put writes always: it costs the same and
mends what was damaged.

S3 takes its keys, region and endpoint from where every AWS tool does (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL`` …), never from the URL. It needs ``pip install 'lorchestra[s3]'``, and is tested against moto's
server. Give the bucket a rule that ends incomplete multipart uploads after some days; ``registry gc`` does it too.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO

from lorchestra.errors import UserError
from lorchestra.registry.location import masked
from lorchestra.registry.mistakes import RegistryError
from lorchestra.registry.store.disk import PARTIAL
from lorchestra.registry.store.stored import CHUNK, HEX, SHARDS, Leftover, Stored

_S3 = ("s3", "s3a")
_WHOLE_AT_ONCE = frozenset({*_S3, "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "memory"})
_BLOCK = 8 << 20  # bytes fetched at a time
_LISTED_FROM = 64  # names asked for by one listing of all, not one by one
# Seconds. An S3 that is down is told of within ten, one that takes a request and never answers within a minute.
_PATIENCE = {"connect_timeout": 4, "read_timeout": 10, "retries": {"mode": "standard", "total_max_attempts": 2}}


class Objects:
    """A store at ``url``.

    Args:
        url: of fsspec.

    Raises:
        UserError: fsspec does not know it, or needs a package for it that is not there.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self.shown = masked(url)
        protocol = url.partition("://")[0].lower()
        host = url.partition("://")[2].partition("/")[0]
        if protocol in _S3 and (not host or "@" in host):
            why = (
                "keys come from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE), not the URL" if host else "no bucket"
            )
            raise UserError(f"the store {self.shown}: {why}; write s3://bucket/prefix")
        options: dict[str, Any] = {"config_kwargs": _PATIENCE} if protocol in _S3 else {}
        try:
            # Its own: no listing that another part of the process has kept, no waiting that it has set.
            self._files, root = url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=protocol != "memory", **options
            )
        except ImportError as error:
            package = "'lorchestra[s3]'" if protocol in _S3 else "what it names"
            raise UserError(f"the store {self.shown} needs a package: {error}; pip install {package}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.shown} is no store of blobs ({type(error).__name__}); write a directory, s3://bucket/prefix, "
                "or another URL that fsspec knows"
            ) from error
        self._root = str(root).rstrip("/")
        self._s3 = protocol in _S3
        self._at_once = protocol in _WHOLE_AT_ONCE
        if self._s3:
            self._files.retries = 2

    def open(self, name: str) -> BinaryIO:
        """The blob as it lies there.

        Raises:
            FileNotFoundError: there is none.
        """
        stream: BinaryIO = self._files.open(self._path(name), "rb", block_size=_BLOCK)
        return stream

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Name → bytes, of those that are there."""
        if len(names) >= _LISTED_FROM:
            wanted = {f"sha256:{name}" for name in names}
            return {blob.digest.removeprefix("sha256:"): blob.size for blob in self.all() if blob.digest in wanted}
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                info = self._files.info(self._path(name))
                if info["type"] == "file":
                    found[name] = int(info["size"])
        if len(found) < len(names):
            self._check_there()
        return found

    def keep(self, name: str) -> bool:
        """Never: a put is what makes it new and whole."""
        return False

    def put(self, source: BinaryIO) -> tuple[str, int]:
        """Copy all of ``source``, whatever stands there already; name and size are those of what was copied."""
        with tempfile.NamedTemporaryFile(prefix="lorchestra-blob-") as copy:
            sha, size = hashlib.sha256(), 0
            while chunk := source.read(CHUNK):
                sha.update(chunk)
                size += len(chunk)
                copy.write(chunk)
            copy.flush()
            name = sha.hexdigest()
            if self._at_once:
                self._files.put_file(copy.name, self._path(name))
            else:
                self._move_in(copy.name, self._path(name))
        return name, size

    def delete(self, name: str) -> None:
        """Take it away; none there is no mistake."""
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def all(self) -> Iterator[Stored]:
        """Every blob, by name."""
        listed = self._listed(SHARDS)
        if not listed:
            self._check_there()
        for path, info in listed:
            name = path.rpartition("/")[2]
            if HEX.fullmatch(name) and path.endswith(f"/{SHARDS}/{name[:2]}/{name}"):
                yield Stored(f"sha256:{name}", int(info["size"]), _time(info))

    def leftovers(self) -> Iterator[Leftover]:
        """Files half written; of S3 the multipart uploads that were not completed."""
        if self._s3:
            bucket, _, prefix = self._root.partition("/")
            for upload in self._files.list_multipart_uploads(bucket):
                if upload["Key"].startswith(f"{prefix}/{SHARDS}/".lstrip("/")):
                    yield Leftover(f"{upload['UploadId']} {upload['Key']}", 0, _time(upload))
            return
        for path, info in self._listed(PARTIAL):
            yield Leftover(path.rpartition("/")[2], int(info["size"] or 0), _time(info))

    def discard(self, leftover: Leftover) -> None:
        """Take it away; none there is no mistake."""
        with suppress(FileNotFoundError):
            if self._s3:
                upload, _, key = leftover.name.partition(" ")
                self._files.abort_mpu(self._root.partition("/")[0], key, upload)
            else:
                self._files.rm_file(f"{self._root}/{PARTIAL}/{leftover.name}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{SHARDS}/{name[:2]}/{name}"

    def _listed(self, part: str) -> list[tuple[str, dict[str, Any]]]:
        try:
            found = self._files.find(f"{self._root}/{part}", detail=True)
        except FileNotFoundError:
            return []
        return sorted((path, info) for path, info in found.items() if info["type"] == "file" and not info.get("islink"))

    def _move_in(self, file: str, final: str) -> None:
        partial = f"{self._root}/{PARTIAL}/{uuid.uuid4().hex}"
        self._files.makedirs(partial.rpartition("/")[0], exist_ok=True)
        self._files.makedirs(final.rpartition("/")[0], exist_ok=True)
        try:
            self._files.put_file(file, partial)
            self._files.mv(partial, final)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(partial)
            raise

    def _check_there(self) -> None:
        """A bucket that is not there is not an empty one."""
        if self._s3:
            bucket = self._root.partition("/")[0]
            try:
                self._files.info(bucket)
            except FileNotFoundError:
                raise RegistryError(
                    f"there is no bucket {bucket!r} for {self.shown}; make it, or mend the URL"
                ) from None


def _time(info: dict[str, Any]) -> datetime:
    """When it was put; now where the store does not say, so that it is never taken for old."""
    for key in ("LastModified", "Initiated", "last_modified", "mtime", "updated", "created"):
        value = info.get(key)
        if isinstance(value, (int, float)):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            with suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    return datetime.now(UTC)
