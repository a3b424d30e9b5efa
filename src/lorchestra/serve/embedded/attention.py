"""An optional compiled kernel for the attention of decoding: each row's slot is read once, and no further than it goes.

Torch's attention is made for many query positions. For one, on a CPU, it lays keys and values out anew, and every row
is read as far as the longest goes. The kernel is ``attention.cpp``, compiled when it is first asked for
(:mod:`lorchestra.base.native`).
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from lorchestra.base.native import library

SOURCE, HEADER = Path(__file__).with_name("attention.cpp"), Path(__file__).with_name("attention.h")
WIDTHS = (16, 32, 64, 80, 96, 128, 256)  # of a head
_NAMES = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}


class Attention:
    """Softmax attention of one position per row, on a CPU.

    Raises:
        UserError: there is no compiler, or it fails.
    """

    def __init__(self) -> None:
        compiled = library(SOURCE, HEADER)
        self._functions = {dtype: getattr(compiled, name) for dtype, name in _NAMES.items()}
        for function in self._functions.values():
            function.restype = None
            function.argtypes = [
                ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
                ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_float, ctypes.c_int64, ctypes.c_void_p,
            ]  # fmt: skip

    def takes(self, q: Tensor, slots: Tensor) -> bool:
        """Whether :meth:`attend` can be used: one dtype that it knows, whole heads of a width that it knows."""
        return (
            q.dtype == slots.dtype
            and q.dtype in self._functions
            and q.device.type == slots.device.type == "cpu"
            and q.shape[3] in WIDTHS
            and q[0].is_contiguous()
            and slots[0].is_contiguous()
        )

    def attend(
        self, q: Tensor, slots: Tensor, at: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Row i attends to positions up to ``at[i]`` of ``slots[i]``.

        Args:
            q: ``[b, h, g, d]``.
            slots: ``[≥ b, T, 2, h, d]``.
            at: ``[b]`` int64.
            scale: of the scores; ``None``: 1/√d.
            window: so many positions up to ``at``; ``None``: all.

        Returns:
            ``[b, h, g, d]``.
        """
        rows, heads, group, width = q.shape
        out = torch.empty(q.shape, dtype=q.dtype)
        self._functions[q.dtype](
            q.data_ptr(),
            q.stride(0),
            slots.data_ptr(),
            slots.stride(0),
            at.data_ptr(),
            rows,
            heads,
            group,
            width,
            1 / math.sqrt(width) if scale is None else scale,
            window or 0,
            out.data_ptr(),
        )
        return out
