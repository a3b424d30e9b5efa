"""What a merge has finished, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from lorchestra.fusion.rounding import Sums

NAME = "merging.json"
SCHEMA = 1


@dataclass(frozen=True)
class Done:
    """A finished file.

    Args:
        digest: of its bytes (XXH3-128: it tells damage, not malice).
        sums: module path → what was added up.
    """

    digest: str
    sums: Mapping[str, Sums]


class Journal:
    """Kept in the partial directory; rewritten whole after every finished file.

    Args:
        directory: the partial directory.
        task: everything that the bytes of the output depend on, plain JSON.
    """

    def __init__(self, directory: Path, task: Mapping[str, Any]) -> None:
        self._path = directory / NAME
        self.task = dict(task)
        self.done: dict[str, Done] = {}

    def recover(self, expected: Mapping[str, int]) -> bool:
        """Take over the files of an earlier try for the same task, as far as their bytes are what was noted.

        Args:
            expected: file name → bytes.

        Returns:
            Whether anything else lies there: another task's files, damaged ones.
        """
        found = _read(self._path)
        if found is None or found.get("schema") != SCHEMA or found.get("task") != self.task:
            return found is not None
        damaged = False
        for name, entry in dict(found["files"]).items():
            path = self._path.parent / name
            whole = name in expected and path.is_file() and path.stat().st_size == expected[name]
            if whole and file_digest(path) == entry["digest"]:
                sums = {module: Sums(**values) for module, values in entry["sums"].items()}
                self.done[name] = Done(entry["digest"], sums)
            else:
                damaged = True
        return damaged

    def add(self, name: str, done: Done) -> None:
        """Note a finished file."""
        self.done[name] = done
        self.write()

    def write(self) -> None:
        """To the disk, whole; from the start, so that the directory can be told for what it is."""
        files = {name: asdict(entry) for name, entry in self.done.items()}
        partial = self._path.with_suffix(".new")
        partial.write_text(json.dumps({"schema": SCHEMA, "task": self.task, "files": files}), encoding="utf-8")
        os.replace(partial, self._path)


def file_digest(path: Path) -> str:
    """``xxh3-128:…`` of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"xxh3-128:{digest.hexdigest()}"


def _read(path: Path) -> dict[str, Any] | None:
    """The journal of an earlier try; ``None`` if there is none, empty if it cannot be used."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
