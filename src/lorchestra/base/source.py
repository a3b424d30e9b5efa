"""The grammar of sources: ``path``, ``hf:org/name@revision``, ``pip:distribution==version/path/inside``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from lorchestra.errors import SourceError

_SHA = re.compile(r"^(?P<rest>.*)#sha256=(?P<sha>[0-9a-fA-F]{64})$")
_HUB = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.+))?$", re.ASCII)
_PIP = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+)(?:/(?P<inside>.+))?$", re.ASCII)
_BARE = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*(?:@[^/]+)?$", re.ASCII)
_FILE = re.compile(r"\.(jsonl|json|csv|tsv|parquet|txt|gguf|safetensors|ya?ml)$")  # no repository is called so


@dataclass(frozen=True)
class Source:
    """Where something comes from.

    Args:
        kind: ``path``, ``hf`` or ``pip``.
        text: as it was written, without the pin.
        name: the path, ``org/name``, or the distribution.
        version: revision or version; empty for a path or the newest revision.
        inside: path inside the repository or the wheel; empty for the whole.
        sha256: pin of the file that is fetched (the file itself, the wheel), lower-case hex, or empty.
    """

    kind: Literal["path", "hf", "pip"]
    text: str
    name: str
    version: str = ""
    inside: str = ""
    sha256: str = ""


def parse_source(text: str, *, is_path: bool = False) -> Source:
    """Read a source.

    Args:
        text: as in a recipe.
        is_path: such a path exists, so that ``a/b`` is not taken for a hub name.

    Raises:
        SourceError: not in the grammar, or a path inside that climbs out.
    """
    pinned = _SHA.match(text)
    sha = pinned["sha"].lower() if pinned else ""
    body = pinned["rest"] if pinned else text
    if not body.strip():
        raise SourceError("a source is empty; write a path, hf:org/name or pip:distribution==version/path/inside")
    if body.startswith("hf:"):
        return _matched("hf", _HUB, body, body.removeprefix("hf:"), sha, "hf:org/name@revision/path/inside")
    if body.startswith("pip:"):
        return _matched("pip", _PIP, body, body.removeprefix("pip:"), sha, "pip:distribution==version/path/inside")
    if not is_path and _BARE.match(body) and not _FILE.search(body):
        return _matched("hf", _HUB, body, body, sha, "org/name@revision")
    scheme = re.match(r"^([a-z][a-z0-9+.-]+):(?![\\/])", body)
    if scheme or "://" in body:
        raise SourceError(f"source {body!r}: unknown kind; use a path, hf:org/name or pip:distribution==version/path")
    return Source("path", body, body, sha256=sha)


def _matched(kind: Literal["hf", "pip"], grammar: re.Pattern[str], text: str, body: str, sha: str, form: str) -> Source:
    found = grammar.match(body)
    if not found:
        raise SourceError(f"source {text!r} is not of the form {form}")
    parts = found.groupdict()
    inside = parts.get("inside") or ""
    if inside.startswith("/") or ".." in PurePosixPath(inside).parts:
        raise SourceError(f"source {text!r}: the path inside must not climb out of the package")
    return Source(kind, text, parts["name"], parts.get("version") or parts.get("revision") or "", inside, sha)
