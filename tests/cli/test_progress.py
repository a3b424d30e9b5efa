"""What a person sees while a run goes: pace, time left, figures; bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.cli import progress
from lorchestra.cli.progress import LineReporter, Meter, duration, figure, make_reporter, without_lines


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.floats(0, 10**6))
def test_a_duration_reads_back_to_the_seconds_it_is_of(seconds):
    text = duration(seconds)
    numbers = dict(
        re.findall(r"(\d+) (h|min|s)", text)[i][::-1] for i in range(len(re.findall(r"\d+ (?:h|min|s)", text)))
    )
    back = 3600 * int(numbers.get("h", 0)) + 60 * int(numbers.get("min", 0)) + int(numbers.get("s", 0))
    assert abs(back - seconds) <= (60 if "h" in numbers else 0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_figures():
    assert figure("loss", 2.31342) == "loss 2.313"
    assert figure("tokens_per_s", 1234.5) in ("1,234 tokens/s", "1,235 tokens/s")
    assert figure("best", 3) == "best 3"


@given(pace=st.floats(0.01, 100), pieces=st.integers(2, 50), total=st.integers(60, 1000), before=st.integers(0, 9))
def test_time_left_is_what_is_left_at_the_pace_since_the_first_piece(pace, pieces, total, before):
    clock = Clock()
    meter = Meter("x", total, "step", clock)
    clock.now += 1000 * pace  # a slow start says nothing about the rest
    meter.advance(before + 1, {})  # and neither does what was there before a resume
    assert meter.left() is None
    for _ in range(pieces - 1):
        clock.now += pace
        meter.advance(1, {})
    assert meter.left() == pytest.approx((total - before - pieces) * pace, rel=1e-6)


def test_without_a_total_there_is_no_time_left():
    meter = Meter("x", None, "file", Clock())
    meter.advance(1, {})
    meter.advance(1, {})
    assert meter.left() is None


def test_counts():
    meter = Meter("x", 2_500_000_000, "B", Clock())
    meter.advance(12_500_000, {})
    assert meter.count() == "12.5 MB/2.50 GB"
    assert Meter("x", None, "file", Clock()).count() == ""
    assert Meter("x", 1200, "item", Clock()).count() == "item 0/1,200"


def test_lines_say_how_far_it_is_and_how_long_it_took(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    with LineReporter(out).task("train x", 3, "step") as task:
        for i in range(3):
            task.advance(1, loss=3.0 - i)
    lines = out.getvalue().splitlines()
    assert lines[0] == "train x: step 1/3, loss 3"
    assert re.fullmatch(r"train x: step 2/3, loss 2, \d+ s left", lines[1])
    assert re.fullmatch(r"train x: step 3/3, loss 1, \d+ s", lines[2])
    assert len(lines) == 3


def test_short_tasks_have_one_line_and_failed_ones_none():
    out = io.StringIO()
    reporter = LineReporter(out)
    with reporter.task("parity", None, "prompt"):
        pass
    assert re.fullmatch(r"parity: \d+ s\n", out.getvalue())
    with pytest.raises(RuntimeError), reporter.task("breaks", 2):
        raise RuntimeError
    assert "breaks" not in out.getvalue()


def test_without_lines_tasks_are_shown_and_remarks_are_not():
    out = io.StringIO()
    quiet = without_lines(LineReporter(out))
    quiet.say("not this")
    with quiet.task("this", 1) as task:
        task.advance()
    assert "not this" not in out.getvalue()
    assert out.getvalue().startswith("this: it 1/1")


def test_a_pipe_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_reporter(), LineReporter)


PROGRAM = """
import time
from lorchestra.cli.progress import BarReporter, make_reporter
reporter = make_reporter()
assert isinstance(reporter, BarReporter)
with reporter.task("train [bold]x[/]", 4, "step") as task:
    for i in range(4):
        task.advance(1, loss=0.5, tokens_per_s=100.0)
        reporter.say("remark [red]%d[/]" % i)
        time.sleep(0.6)
try:
    with reporter.task("breaks", 2) as task:
        raise RuntimeError
except RuntimeError:
    pass
reporter.say("end")
"""


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_bars(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stderr=secondary, stdout=secondary, env={**environment, "TERM": "xterm"}
    )
    os.close(secondary)
    seen = b""
    while True:
        try:
            block = os.read(primary, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not block:
            break
        seen += block
    os.close(primary)
    assert process.wait() == 0, seen.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, lines)) <= 80
    assert any(
        re.search(r"train \[bold\]x\[/\] .*step [23]/4 · \d+ s left · loss 0\.5 · 100 tokens/s", line) for line in lines
    )
    assert [line for line in lines if line.startswith("remark")] == [f"remark [red]{i}[/]" for i in range(4)]
    assert any(re.fullmatch(r"train \[bold\]x\[/\]: step 4/4, loss 0.5, 100 tokens/s, \d+ s", line) for line in lines)
    assert not any(line.startswith("breaks:") for line in lines)
    assert "end" in lines
    # The cursor is shown again.
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
