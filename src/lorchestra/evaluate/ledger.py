"""Every reading of a sealed test is entered, item by item: a test that is looked at often is no longer sealed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from lorchestra.adapter.digest import json_digest
from lorchestra.base.home import home
from lorchestra.data.example import Example
from lorchestra.data.split import normalise


def item_digest(example: Example) -> str:
    """What a sealed item is known by: 16 hex digits of SHA-256 over its normalised turns and rejected answer.

    System prompt, group, length limit and tokenizer are left out: under other settings it is the same item still.
    """
    turns = [[turn.role, normalise(turn.content)] for turn in example.messages if turn.role != "system"]
    return json_digest([turns, normalise(example.rejected or "")]).removeprefix("sha256:")[:16]


def sealed_digest(items: Sequence[str]) -> str:
    """``sha256:…`` of a whole sealed test, by its items in any order; another tokenizer does not change it."""
    return json_digest(sorted(items))


class Ledger:
    """Append-only JSON lines, one a reading: when, by which reader, of which items.

    Args:
        path: the file; made at the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def here(cls) -> Ledger:
        """The one of this user's cache directory."""
        return cls(home() / "sealed-tests.jsonl")

    def enter(self, items: Sequence[str], domain: str, reader: str, digest: str = "") -> int:
        """Record one reading and return how often the item read most has been read, this time included.

        The same reader (a step's digest, say) that reads an item again sees nothing new and is not counted again.

        Args:
            items: :func:`item_digest` of each.
            domain: what they are called, for people.
            reader: who reads.
            digest: of the whole test; by it alone readings were entered formerly.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            readers = self._readers(items, digest)
            if any(reader not in readers[item] for item in items):
                now = datetime.now(UTC).isoformat(timespec="seconds")
                entry = {"digest": digest, "domain": domain, "reader": reader, "time": now, "items": list(items)}
                torn = (
                    self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
                )
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(("\n" if torn else "") + json.dumps(entry) + "\n")
                    stream.flush()
                    os.fsync(stream.fileno())
            return max((len(readers[item] | {reader}) for item in items), default=0)

    def count(self, items: Sequence[str], digest: str = "") -> int:
        """How often the item read most has been read, of ``items`` (and of the test ``digest``, as :meth:`enter`)."""
        return max(map(len, self._readers(items, digest).values()), default=0)

    def sealed(self, items: Sequence[str]) -> list[str]:
        """Those of ``items`` that belong to a sealed test which has been read."""
        readers = self._readers(items)
        return [item for item in items if readers[item]]

    def _readers(self, items: Collection[str], digest: str = "") -> dict[str, set[str]]:
        """Item → who has read it. An entry without items counts for those of its test, where another tells them."""
        entries = list(self._entries())
        of_test = {entry["digest"]: entry["items"] for entry in entries if entry.get("items") and entry.get("digest")}
        if digest:
            of_test[digest] = items
        found: dict[str, set[str]] = {item: set() for item in items}
        for entry in entries:
            for item in entry.get("items") or of_test.get(entry.get("digest"), ()):
                if item in found:
                    found[item].add(entry["reader"])
        return found

    def _entries(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line torn by a crash; its reading was never finished
            if isinstance(entry, dict) and "reader" in entry:
                yield entry
