"""All of these tests on a device that is only pretended: no tensor is where it should not be, nothing needs float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.gpu import elsewhere

ROOT = Path(__file__).resolve().parents[2]
# A process of its own: a device once registered stays, and others would take it for an accelerator.
MIXED = """
import torch
from tests.gpu import elsewhere
device = elsewhere.register()
with elsewhere.open_device():
    there = torch.randn(3, 4, device=device)
    for wrong in (lambda: there + torch.ones(3, 4), lambda: torch.nn.functional.linear(there, torch.ones(2, 4)),
                  lambda: torch.equal(there, there.cpu()), lambda: there.double(), lambda: there.numpy()):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise SystemExit("let through")
    assert torch.equal((there @ there.T * 2).cpu(), there.cpu() @ there.cpu().T * 2)
    assert (there[torch.tensor([0, 2])].cpu() == there.cpu()[[0, 2]]).all()
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def test_it_is_as_strict_as_a_card():
    done = python("-c", MIXED)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_the_tests_for_a_card_pass_on_it():
    done = python(
        "-m", "pytest", "-m", "gpu and not slow and not real", "tests/gpu", LORCHESTRA_GPU_TESTS_DEVICE=elsewhere.NAME,
        LORCHESTRA_TESTS_SKIP_NOTHING="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"on {elsewhere.NAME}" in done.stdout, "they ran there"


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a card here")
@pytest.mark.slow
def test_without_a_card_they_say_so():
    done = python("-m", "pytest", "-m", "gpu", "-rs", "tests/gpu/test_parity.py", LORCHESTRA_TESTS_SKIP_NOTHING="")
    assert done.returncode == 0
    assert "neither CUDA nor MPS is here" in done.stdout
