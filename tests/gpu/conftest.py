"""What the tests for a card share: the device, and the figures that stand at the end.

Every test runs on the CPU in the ordinary suite, so that it stays right, and on the card with ``pytest -m gpu``.
``LORCHESTRA_GPU_TESTS_DEVICE`` names another device to take for the card: ``cuda:1``, ``cpu``, or ``elsewhere``, which
is pretended (see ``elsewhere.py``).
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from tests.gpu import elsewhere

ASKED = os.environ.get("LORCHESTRA_GPU_TESTS_DEVICE", "")
FIGURES = pytest.StashKey[list[str]]()
if ASKED == elsewhere.NAME:
    elsewhere.register()


def card() -> str:
    """The device to test: what was asked for, else CUDA, else MPS, else none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ASKED or next((kind for kind, is_there in there.items() if is_there), "")


@pytest.fixture(params=["cpu", pytest.param("card", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the test runs."""
    name = request.param if request.param == "cpu" else card()
    if not name:
        pytest.skip("neither CUDA nor MPS is here; LORCHESTRA_GPU_TESTS_DEVICE=cpu tries the tests themselves")
    pretended = name == elsewhere.NAME
    if pretended:
        monkeypatch.setattr("lorchestra.base.load.choose_device", torch.device)
    with elsewhere.open_device() if pretended else nullcontext():
        yield torch.device(name)


@pytest.fixture
def figure(request):
    """``figure("…")`` puts a line under the results."""
    lines = request.config.stash.setdefault(FIGURES, [])
    return lines.append


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(FIGURES, [])
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
