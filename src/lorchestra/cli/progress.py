"""How a run looks while it runs: live bars on a terminal, plain lines anywhere else. All on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lorchestra.events import SILENT, Task

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
    """``training loss 2.313``, ``412 tokens/s``."""
    if key.endswith("_per_s"):
        return f"{value:,.0f} {key.removesuffix('_per_s')}/s"
    key = key.replace("_", " ")
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


def amount(value: float) -> str:
    """Bytes in MB or GB."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


class Meter:
    """Where one task stands, in words."""

    def __init__(self, name: str, total: float | None, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.total, self.unit, self.clock = name, total, unit, clock
        self.done = 0.0
        self.figures: dict[str, Any] = {}
        self.started = clock()
        self._from: tuple[float, float] | None = None  # when the first piece was there, and how much that was

    def advance(self, amount: float, figures: dict[str, Any]) -> None:
        """Note progress. The first piece sets no pace: it may be what was there before a resume, or slow to start."""
        self.done += amount
        self.figures |= figures
        if self._from is None:
            self._from = self.clock(), self.done

    @property
    def elapsed(self) -> float:
        """Seconds since the task began."""
        return self.clock() - self.started

    def left(self) -> float | None:
        """Seconds to go at the pace so far; ``None`` until there is a pace, or without a total."""
        if not self.total or self._from is None:
            return None
        then, before = self._from
        if self.done <= before:
            return None
        return max(self.total - self.done, 0.0) * (self.clock() - then) / (self.done - before)

    def count(self) -> str:
        """``step 4/19``, ``12.5 MB/269.1 MB``; empty where nothing was counted."""
        if self.unit == "B":
            return f"{amount(self.done)}/{amount(self.total)}" if self.total else amount(self.done)
        if self.total:
            return f"{self.unit} {self.done:,.0f}/{self.total:,.0f}"
        return f"{self.unit} {self.done:,.0f}" if self.done else ""

    def said(self) -> list[str]:
        """The figures that came with the progress."""
        return [figure(key, value) for key, value in self.figures.items()]


class _LineTask:
    """Says where it stands every few seconds, and how long it took."""

    def __init__(self, out: TextIO, meter: Meter) -> None:
        self.out, self.meter = out, meter
        self.last = 0.0

    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        meter = self.meter
        meter.advance(amount, figures)
        finished = meter.total is not None and meter.done >= meter.total
        if meter.elapsed - self.last >= SECONDS_BETWEEN_LINES and not finished:
            self.last = meter.elapsed
            left = meter.left()
            self._line("" if left is None else f"{duration(left)} left")

    def finish(self) -> None:
        self._line(duration(self.meter.elapsed))

    def _line(self, ending: str) -> None:
        parts = [self.meter.count(), *self.meter.said(), ending]
        print(f"{self.meter.name}: " + ", ".join(part for part in parts if part), file=self.out, flush=True)


class LineReporter:
    """Plain lines, for logs and pipes."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        task = _LineTask(self.out, Meter(name, total, unit))
        yield task
        task.finish()

    def event(self, kind: str, /, **fields: Any) -> None:
        return None

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


class _BarTask:
    def __init__(self, progress: Any, bar: Any, meter: Meter) -> None:
        self.progress, self.bar, self.meter = progress, bar, meter

    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        self.meter.advance(amount, figures)
        self.progress.update(self.bar, advance=amount)


class BarReporter:
    """Live bars, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.progress import Task as Bar
        from rich.table import Column
        from rich.text import Text

        class Standing(ProgressColumn):
            """Count, time left (time spent while that is unknown) and figures, cut at the edge of the terminal."""

            max_refresh = 0.5

            def render(self, task: Bar) -> Text:
                meter: Meter = task.fields["meter"]
                left, spent = meter.left(), meter.elapsed
                said = f"{duration(spent)} so far" if spent >= 1 else ""
                parts = [meter.count(), said if left is None else f"{duration(left)} left", *meter.said()]
                return Text(" · ".join(part for part in parts if part))

        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            Standing(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
        )
        self._running = 0

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        with self.passing(name, total, unit) as task:
            yield task
        meter = task.meter
        parts = [meter.count(), *meter.said(), duration(meter.elapsed)]
        self.say(f"{name}: " + ", ".join(part for part in parts if part))

    @contextmanager
    def passing(self, name: str, total: float | None = None, unit: str = "it") -> Iterator[_BarTask]:
        """A task that leaves nothing behind when it ends."""
        from rich.markup import escape

        if self._running == 0:
            self.progress.start()
        self._running += 1
        meter = Meter(name, total, unit)
        bar = self.progress.add_task(escape(name), total=total, meter=meter)
        try:
            yield _BarTask(self.progress, bar, meter)
        finally:
            self.progress.remove_task(bar)
            self._running -= 1
            if self._running == 0:
                self.progress.stop()

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


class _Within:
    """What goes on inside one of many pieces of work: a live bar where there is a terminal, and nothing that stays."""

    def __init__(self, reporter: LineReporter | BarReporter) -> None:
        self.task = reporter.passing if isinstance(reporter, BarReporter) else SILENT.task
        self.event = reporter.event

    def say(self, text: str) -> None:
        return None


def within(reporter: LineReporter | BarReporter) -> _Within:
    """``reporter`` for the inside of one of many trainings: whoever has them done tells each in a line."""
    return _Within(reporter)


def make_reporter() -> LineReporter | BarReporter:
    """Bars if standard error is a terminal, lines otherwise."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()
