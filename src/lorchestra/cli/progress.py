"""How a run looks while it runs: live bars on a terminal, plain lines anywhere else. All on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lorchestra.events import Task

# Plain lines: often enough to see that it lives, seldom enough for a log file.
SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """``8 s``, ``2 min 05 s``, ``1 h 02 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def figure(key: str, value: Any) -> str:
    """``loss 2.313``, ``412 tokens/s``."""
    if key.endswith("_per_s"):
        return f"{value:,.0f} {key.removesuffix('_per_s')}/s"
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def amount(value: float, unit: str) -> str:
    """``12 step``, ``3.4 MB`` for bytes."""
    return f"{value / 1e6:.1f} MB" if unit == "B" else f"{value:,.0f} {unit}"


class _LineTask:
    """Says where it stands every few seconds, and how long it took."""

    def __init__(self, out: TextIO, name: str, total: float | None, unit: str) -> None:
        self.out, self.name, self.total, self.unit = out, name, total, unit
        self.done = 0.0
        self.counted = 0.0
        self.started = self.last = time.monotonic()
        self.figures: dict[str, Any] = {}

    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        self.done += amount
        self.figures |= figures
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            self._line(self._left(now - self.started))

    def finish(self) -> None:
        self._line(duration(time.monotonic() - self.started))

    def _left(self, elapsed: float) -> str:
        if not self.total or not self.done:
            return ""
        return duration(elapsed * (self.total - self.done) / self.done) + " left"

    def _line(self, ending: str) -> None:
        of = f"/{amount(self.total, self.unit)}" if self.total else f" {self.unit}"
        done = f"{self.done / 1e6:.1f}" if self.unit == "B" else f"{self.done:,.0f}"
        parts = [f"{done}{of}", *(figure(k, v) for k, v in self.figures.items()), ending]
        print(f"{self.name}: " + ", ".join(p for p in parts if p), file=self.out, flush=True)


class LineReporter:
    """Plain lines, for logs and pipes."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        task = _LineTask(self.out, name, total, unit)
        yield task
        task.finish()

    def event(self, kind: str, /, **fields: Any) -> None:
        return None

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


class _BarTask:
    def __init__(self, progress: Any, task: Any, unit: str) -> None:
        self.progress, self.id, self.unit = progress, task, unit
        self.figures: dict[str, Any] = {}

    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        self.figures |= figures
        text = " · ".join(figure(k, v) for k, v in self.figures.items())
        self.progress.update(self.id, advance=amount, figures=text)


class BarReporter:
    """Live bars, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self.console,
        )
        self._running = 0

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        from rich.markup import escape

        if self._running == 0:
            self.progress.start()
        self._running += 1
        started = time.monotonic()
        bar = self.progress.add_task(escape(name), total=total, figures="")
        task = _BarTask(self.progress, bar, unit)
        finished = False
        try:
            yield task
            finished = True
        finally:
            self.progress.remove_task(bar)
            self._running -= 1
            if self._running == 0:
                self.progress.stop()
            if finished:
                figures = [figure(k, v) for k, v in task.figures.items()]
                self.say(f"{name}: " + ", ".join([*figures, duration(time.monotonic() - started)]))

    def event(self, kind: str, /, **fields: Any) -> None:
        return None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class _WithoutLines:
    """Tasks of another reporter, without its single lines."""

    def __init__(self, reporter: LineReporter | BarReporter) -> None:
        self.task = reporter.task
        self.event = reporter.event

    def say(self, text: str) -> None:
        return None


def without_lines(reporter: LineReporter | BarReporter) -> _WithoutLines:
    """``reporter`` for a verb that prints its findings itself, in the end."""
    return _WithoutLines(reporter)


def make_reporter() -> LineReporter | BarReporter:
    """Bars if standard error is a terminal, lines otherwise."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()
