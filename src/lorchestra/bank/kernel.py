"""Optional compiled kernels for rows of a batch: factors are read once, as they lie, and nothing else is written.

Torch has no batched product that streams bfloat16 factors of one row each on a CPU: it converts, or lays them out anew.
``rows.cpp`` is for rows of one position, ``prompts.cpp`` for many on a processor with AMX; they are compiled when first
asked for (:mod:`lorchestra.base.native`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorchestra.bank.factors import Place
from lorchestra.base.native import TILES, library

SOURCE, HEADER = Path(__file__).with_name("rows.cpp"), Path(__file__).with_name("rows.h")
PROMPTS, DEPTH = Path(__file__).with_name("prompts.cpp"), 32
_NAMES = {torch.float32: "add_float32", torch.bfloat16: "add_bfloat16"}
_Integers = ctypes.POINTER(ctypes.c_int64)


class Kernel:
    """``y += (x Aᵀ) Bᵀ`` on a CPU.

    Attributes:
        tiles: whether there is a kernel for many positions on this machine.

    Raises:
        UserError: there is no compiler, or it fails.
    """

    def __init__(self) -> None:
        rows = library(SOURCE, HEADER)
        self._functions = {dtype: getattr(rows, name) for dtype, name in _NAMES.items()}
        for function in self._functions.values():
            function.restype = None
            function.argtypes = [
                ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p), _Integers, ctypes.c_int64, ctypes.c_int64,
                ctypes.c_int64, _Integers, _Integers,
            ]  # fmt: skip
        prompts = library(PROMPTS, TILES)
        self.tiles = bool(prompts.prompts_by_tiles())
        self._prompts = prompts.add_prompts
        self._prompts.restype = None
        self._prompts.argtypes = [
            ctypes.POINTER(ctypes.c_void_p), ctypes.c_int64, _Integers, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p), _Integers, _Integers, ctypes.c_int64,
            ctypes.c_int64, ctypes.c_int64, _Integers, _Integers,
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
        place: Place,
    ) -> None:
        """Add to ``outputs`` in place.

        Args:
            flat: ``[S, P]``, of which the first ``rows`` are used.
            rows: that act.
            positions: ``[rows]`` int64, of each in the batch; ``None``: in order.
            x: ``[b, 1, n]``.
            outputs: ``[b, 1, m]`` of each module.
            rank: R.
            place: of the modules in a row of ``flat``.
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
            place.A,
            integers(*place.B),
            integers(*[y.shape[2] for y in outputs]),
        )

    def takes_prompts(self, x: Tensor, flats: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether :meth:`add_prompts` can be used: bfloat16 throughout, and sides of whole tiles."""
        return (
            self.tiles
            and x.device.type == "cpu"
            and x.shape[2] % DEPTH == 0
            and x.stride(2) == 1
            and all(y.stride(2) == 1 and y.shape[2] % DEPTH == 0 for y in outputs)
            and all(held.dtype == torch.bfloat16 for held in (x, *flats, *outputs))
        )

    def add_prompts(
        self,
        flats: Sequence[Tensor],
        positions: Sequence[int],
        x: Tensor,
        outputs: Sequence[Tensor],
        rank: int,
        place: Place,
    ) -> None:
        """Add to ``outputs`` in place; arguments as of :meth:`add`, but for these.

        Args:
            flats: ``[P]`` of each row that acts.
            positions: of each in the batch.
            x: ``[b, L, n]``.
            outputs: ``[b, L, m]`` of each module.
        """
        rows, modules = len(flats), len(outputs)
        integers, pointers = ctypes.c_int64 * modules, ctypes.c_void_p * modules
        self._prompts(
            (ctypes.c_void_p * rows)(*[flat.data_ptr() for flat in flats]),
            rows,
            (ctypes.c_int64 * rows)(*positions),
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            x.shape[1],
            x.shape[2],
            pointers(*[y.data_ptr() for y in outputs]),
            integers(*[y.stride(0) for y in outputs]),
            integers(*[y.stride(1) for y in outputs]),
            rank,
            modules,
            place.A,
            integers(*place.B),
            integers(*[y.shape[2] for y in outputs]),
        )
