"""``events.jsonl``: everything a run says, kept beside what the person sees."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorchestra.events import Reporter, Task


class Journal:
    """A reporter that passes on to another and appends every event to a file.

    Args:
        reporter: what the person sees.
        path: the file; one JSON object a line, with ``time`` (seconds since 1970) and ``event``.
    """

    def __init__(self, reporter: Reporter, path: Path) -> None:
        self.reporter = reporter
        _end_at_a_line(path)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        started = time.time()
        self.event("begin", name=name, total=total, unit=unit)
        with self.reporter.task(name, total, unit) as task:
            yield task
        self.event("end", name=name, seconds=round(time.time() - started, 3))

    def event(self, kind: str, /, **fields: Any) -> None:
        self._stream.write(
            json.dumps({"time": round(time.time(), 3), "event": kind, **fields}, ensure_ascii=False) + "\n"
        )
        self.reporter.event(kind, **fields)

    def say(self, text: str) -> None:
        self.event("say", text=text)
        self.reporter.say(text)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _end_at_a_line(path: Path) -> None:
    """Cut off a last line that a full disk or a crash left unfinished."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        text = stream.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            stream.truncate(whole)
