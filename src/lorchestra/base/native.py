"""Compiled kernels, all optional: one C++ source each, without any header but our own and the standard library's.

Compiled for this machine by its own C++ compiler, and kept under ``LORCHESTRA_HOME``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from lorchestra.base.home import home
from lorchestra.errors import UserError

LANES, TILES = Path(__file__).with_name("lanes.h"), Path(__file__).with_name("tiles.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")


@cache
def library(source: Path, *headers: Path) -> ctypes.CDLL:
    """``source``, compiled; once in a process.

    Args:
        source: of the kernel.
        headers: that it includes, besides ``lanes.h``.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    return ctypes.CDLL(str(_built(source, (LANES, *headers))))


def compiler() -> str | None:
    """The C++ compiler of this machine, if there is one: what ``CXX`` names, c++, g++ or clang++."""
    named = os.environ.get("CXX") or "c++"
    return shutil.which(named) or shutil.which("g++") or shutil.which("clang++")


def _built(source: Path, headers: Sequence[Path]) -> Path:
    """The shared library, compiled once for this source, these headers, compiler and processor."""
    found = compiler()
    if found is None:
        raise UserError(
            "the compiled kernel needs a C++ compiler, and there is none (c++, g++, clang++, or what CXX names); "
            "install one, or serve without --kernel"
        )
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text(encoding="utf-8") for path in (source, *headers)]
    what = "\0".join((*texts, *FLAGS, version, platform.machine(), _processor()))
    path = home() / "kernels" / f"{source.stem}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        done = subprocess.run(
            [found, *FLAGS, *(f"-I{path.parent}" for path in headers), str(source), "-o", str(made)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"{found} could not compile the kernel ({said[0]}); serve without --kernel")
        made.replace(path)
    return path


def _processor() -> str:
    """What the library was compiled for: a cache that is shared by machines holds one for each kind."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            return ""
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()
