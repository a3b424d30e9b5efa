"""x Wᵀ + bias of a few rows by a compiled kernel, on a CPU with AMX.

It reads the weights once and in the order of memory, and waits less for them than oneDNN's product does: 57 rows of
SmolLM2-135M's layers in 26 ms instead of 31.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorchestra.base.native import TILES, library

SOURCE = Path(__file__).with_name("tiles.cpp")
ROWS = 64  # at most; more are no longer a matter of reading the weights
SIDE, DEPTH = 16, 32


class Tiles:
    """A frozen weight, laid out for the kernel.

    Args:
        weight: ``[m, n]``; it is copied.
        bias: ``[m]``.

    Raises:
        UserError: there is no compiler, or it fails.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._m, self._n = weight.shape
        tiles = weight.view(self._m // SIDE, SIDE, self._n // DEPTH, DEPTH // 2, 2)
        self._weight = tiles.permute(0, 2, 3, 1, 4).contiguous()
        self._bias = None if bias is None else bias.contiguous()
        self._multiply = _compiled().tiles_multiply

    @staticmethod
    def take(weight: Tensor) -> bool:
        """Whether there is a kernel for such a weight on this machine.

        Raises:
            UserError: as of the class.
        """
        m, n = weight.shape
        fits = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not m % (2 * SIDE) and not n % DEPTH
        return fits and bool(_compiled().tiles_usable())

    def __call__(self, x: Tensor) -> Tensor:
        """``[…, n]`` to ``[…, m]``, in bfloat16; at most :data:`ROWS` rows."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self._m)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._multiply(
            x.data_ptr(), x.numel() // self._n, self._weight.data_ptr(), bias, self._n, self._m, out.data_ptr()
        )
        return out


@cache
def _compiled() -> Any:
    found = library(SOURCE, TILES)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    found.tiles_multiply.restype = None
    found.tiles_multiply.argtypes = [pointer, integer, pointer, pointer, integer, integer, pointer]
    return found
