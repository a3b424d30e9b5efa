"""An optional compiled kernel for rows of a batch: factors are read once, as they lie, and nothing else is written.

Torch has no batched product that streams bfloat16 factors of one row each on a CPU: it converts, or lays them out anew.
The kernel is ``rows.cpp``, without any header but the standard library's, compiled for this machine by its own C++
compiler and kept under ``LORCHESTRA_HOME``.
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
from pathlib import Path

import torch
from torch import Tensor

from lorchestra.base.home import home
from lorchestra.errors import UserError

SOURCE = Path(__file__).with_name("rows.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_NAMES = {torch.float32: "add_float32", torch.bfloat16: "add_bfloat16"}
_Integers = ctypes.POINTER(ctypes.c_int64)


class Kernel:
    """``y += (x Aᵀ) Bᵀ`` for rows of one position, on a CPU.

    Raises:
        UserError: there is no compiler, or it fails.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(_built()))
        self._functions = {dtype: getattr(library, name) for dtype, name in _NAMES.items()}
        for function in self._functions.values():
            function.restype = None
            function.argtypes = [
                ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p), _Integers, ctypes.c_int64, ctypes.c_int64,
                ctypes.c_int64, _Integers, _Integers,
            ]  # fmt: skip

    def takes(self, x: Tensor, flat: Tensor, outputs: Sequence[Tensor]) -> bool:
        """Whether :meth:`add` can be used: one position, one dtype that it knows, rows that are whole."""
        return (
            x.shape[1] == 1
            and x.dtype == flat.dtype
            and x.dtype in self._functions
            and x.device.type == "cpu"
            and x.stride(2) == 1
            and all(y.dtype == x.dtype and y.stride(2) == 1 for y in outputs)
        )

    def add(
        self,
        flat: Tensor,
        rows: int,
        positions: Tensor | None,
        x: Tensor,
        outputs: Sequence[Tensor],
        rank: int,
        A: int,
        B: Sequence[int],
    ) -> None:
        """Add to ``outputs`` in place.

        Args:
            flat: ``[S, P]``, of which the first ``rows`` are used.
            rows: that act.
            positions: ``[rows]`` int64, of each in the batch; ``None``: in order.
            x: ``[b, 1, n]``.
            outputs: ``[b, 1, m]`` of each module.
            rank: R.
            A: where A ``[n, modules·R]`` begins in a row of ``flat``.
            B: where B ``[R, m]`` of each module begins.
        """
        modules = len(outputs)
        integers = ctypes.c_int64 * modules
        self._functions[x.dtype](
            flat.data_ptr(),
            flat.stride(0),
            rows,
            None if positions is None else positions.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            x.shape[2],
            (ctypes.c_void_p * modules)(*[y.data_ptr() for y in outputs]),
            integers(*[y.stride(0) for y in outputs]),
            rank,
            modules,
            A,
            integers(*B),
            integers(*[y.shape[2] for y in outputs]),
        )


def _built() -> Path:
    """The shared library, compiled once for this source, compiler and processor."""
    named = os.environ.get("CXX") or "c++"
    compiler = shutil.which(named) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UserError(
            "the compiled kernel needs a C++ compiler, and there is none (c++, g++, clang++, or what CXX names); "
            "install one, or serve without --kernel"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    what = "\0".join((SOURCE.read_text(encoding="utf-8"), *FLAGS, version, platform.machine(), _processor()))
    path = home() / "kernels" / f"rows-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        done = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"{compiler} could not compile the kernel ({said[0]}); serve without --kernel")
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
