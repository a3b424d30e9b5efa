"""The report in a real browser: its policy refuses nothing that it needs, and it is drawn at any width."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib

import pytest
from tests.report.test_diagnosis import make_data as make_diagnosis
from tests.report.test_gate import make_gate
from tests.report.test_sweep import make_data as make_sweep
from tests.report.test_write import SECTIONS, make_data

from lorchestra.report.diagnosis import render_diagnosis
from lorchestra.report.sweep import render_sweep
from lorchestra.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("LORCHESTRA_TESTS_SKIP_NOTHING"),
        reason="no Chromium here (Debian: apt-get install chromium); CI has one",
    ),
]
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report({**make_data(), "gate": make_gate()}, tmp_path_factory.mktemp("report"))


def chromium(page, profile, *flags):
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_nothing_is_refused_and_every_section_is_there(page, tmp_path):
    done = chromium(page, tmp_path / "profile", "--enable-logging=stderr", "--v=0", "--dump-dom")
    told = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert told == [], "the page's console is silent: no refused script, style or request"
    for section in (*SECTIONS, "gate"):
        assert f'id="{section}"' in done.stdout
    assert "胸闷三周?" in done.stdout


@pytest.mark.parametrize("width", [500, 1280])
def test_it_is_drawn(page, tmp_path, width):
    picture = tmp_path / "report.png"
    chromium(page, tmp_path / "profile", f"--window-size={width},2000", f"--screenshot={picture}")
    rows = pixels(picture.read_bytes())
    marked = sum(len(set(row)) > 8 for row in rows)
    assert marked > len(rows) / 4, "text and lines on at least a quarter of the pixel rows"


def pixels(png):
    """The (filtered) scanlines of a PNG: enough to see that something is drawn on them."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    data, place = b"", 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IHDR":
            width, height, _, kind = struct.unpack(">IIBB", png[place + 8 : place + 18])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + size]
        place += 12 + size
    line = 1 + width * {2: 3, 6: 4}[kind]
    raw = zlib.decompress(data)
    return [raw[i * line : (i + 1) * line] for i in range(height)]


def test_the_page_of_a_diagnosis_is_drawn_and_silent(tmp_path):
    page = tmp_path / "diagnosis.html"
    page.write_text(render_diagnosis(make_diagnosis()), encoding="utf-8")
    done = chromium(page, tmp_path / "profile", "--enable-logging=stderr", "--v=0", "--dump-dom")
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    picture = tmp_path / "diagnosis.png"
    chromium(page, tmp_path / "profile", "--window-size=1280,2000", f"--screenshot={picture}")
    rows = pixels(picture.read_bytes())
    assert sum(len(set(row)) > 8 for row in rows) > len(rows) / 4


@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_of_a_sweep_is_drawn_and_silent(tmp_path, width):
    page, picture = tmp_path / "sweep.html", tmp_path / "sweep.png"
    page.write_text(render_sweep(make_sweep()), encoding="utf-8")
    done = chromium(page, tmp_path / "profile", "--enable-logging=stderr", "--v=0", "--dump-dom")
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    chromium(page, tmp_path / "profile", f"--window-size={width},1200", f"--screenshot={picture}")
    rows = pixels(picture.read_bytes())
    assert sum(len(set(row)) > 8 for row in rows) > len(rows) / 4
