"""Every reading of a sealed test is entered: a test that is looked at often is no longer sealed."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock


class Ledger:
    """Append-only JSON lines, one a reading.

    Args:
        path: the file; made at the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def enter(self, digest: str, domain: str, reader: str) -> int:
        """Record one reading of the test data ``digest`` and return how often it has been read, this time included.

        The same reader (a step's digest, say) that reads again sees nothing new and is not counted again.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            readers = self._readers(digest)
            if reader not in readers:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                line = json.dumps({"digest": digest, "domain": domain, "reader": reader, "time": now})
                torn = (
                    self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
                )
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(("\n" if torn else "") + line + "\n")
                    stream.flush()
                    os.fsync(stream.fileno())
                readers.append(reader)
            return len(readers)

    def count(self, digest: str) -> int:
        """How often the test data ``digest`` has been read."""
        return len(self._readers(digest))

    def _readers(self, digest: str) -> list[str]:
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line torn by a crash; its reading was never finished
            if entry.get("digest") == digest and entry["reader"] not in found:
                found.append(entry["reader"])
        return found
