"""The C library's settings: taken where they exist, refused by none, without effect on what is computed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorchestra.base import allocator
from lorchestra.base.allocator import SETTINGS, freed_memory_kept


@pytest.mark.skipif(allocator._glibc() is None, reason="no glibc here")
@pytest.mark.parametrize("name", SETTINGS)
def test_glibc_takes_every_setting(name):
    assert allocator._glibc().mallopt(name, SETTINGS[name]) == 1


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator._glibc() is None
    with freed_memory_kept():
        pass


@pytest.mark.skipif(allocator._glibc() is None, reason="no glibc here")
def test_what_is_free_goes_back_afterwards():
    """In a process of its own: another test's memory would count too."""
    program = """
import torch
from pathlib import Path
from lorchestra.base.allocator import freed_memory_kept
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
with freed_memory_kept():
    blocks = [torch.ones(1 << 20) for _ in range(64)]
    del blocks
    kept = resident()
print(kept - before, resident() - before)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    kept, after = map(int, said.split())
    assert kept > 200 << 20
    assert after < 50 << 20


@pytest.mark.skipif(allocator._glibc() is None, reason="no glibc here")
def test_a_server_gives_large_blocks_back_whatever_lies_above_them():
    """Blocks of 8 MB with a small one on top of each: in the heap they would stay."""
    program = """
import torch
from pathlib import Path
from lorchestra.base.allocator import large_blocks_go_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
large_blocks_go_back()
del_me = torch.ones(2 << 20)
del del_me
before, blocks, small = resident(), [], []
for _ in range(32):
    blocks.append(torch.ones(2 << 20))
    small.append(torch.ones(1 << 12))
held = resident()
blocks.clear()
print(held - before, resident() - before)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    held, after = map(int, said.split())
    assert held > 200 << 20
    assert after < 20 << 20
