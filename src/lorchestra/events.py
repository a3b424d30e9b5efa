"""What long steps tell while they run. The lower rooms speak; ``cli`` decides how it looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Task(Protocol):
    """One long step: something that advances towards a total."""

    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        """Move on by ``amount`` units; ``figures`` are shown beside the bar (``loss=…``, ``tokens_per_s=…``)."""


class Reporter(Protocol):
    """Receives everything a run has to say."""

    def task(self, name: str, total: float | None = None, unit: str = "it") -> Any:
        """A context manager that yields a :class:`Task`."""

    def event(self, kind: str, /, **fields: Any) -> None:
        """One fact for ``events.jsonl`` (and for trackers): JSON-serialisable fields only."""

    def say(self, text: str) -> None:
        """One line for the person who is watching."""


class _SilentTask:
    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        return None


class Silent:
    """The reporter that keeps quiet; the default of every Python function that takes one."""

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        yield _SilentTask()

    def event(self, kind: str, /, **fields: Any) -> None:
        return None

    def say(self, text: str) -> None:
        return None


SILENT: Reporter = Silent()
