"""What a Llama layer does between its matrix products: by torch on any device, or by a compiled kernel on a CPU.

Axis letters: b rows, L positions, n hidden size, h key-value heads, g query heads to each, d head width, i inner size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, silu

from lorchestra.base.native import library
from lorchestra.serve.embedded.slots import Decoding, Reading

SOURCE, HEADER = Path(__file__).with_name("layer.cpp"), Path(__file__).with_name("layer.h")
COMPILED = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # dtypes that the kernel knows
Rotations = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Heads:
    """Of a model's attention.

    Args:
        heads: h.
        group: g.
        width: d.
        epsilon: of every RMSNorm.
        cosine: ``[positions, d]``, of the rotary embedding (Su et al. 2021, arXiv 2104.09864).
        sine: the same, the first half of a head negative.
    """

    heads: int
    group: int
    width: int
    epsilon: float
    cosine: Tensor
    sine: Tensor


class Pieces(Protocol):
    """Everything of a layer but its products and its attention."""

    def rotations(self, positions: Tensor) -> Rotations:
        """What :meth:`turn` needs in every layer, of ``positions [b, L]``."""
        ...

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): w · x / √(mean(x²) + ε), of ``[…, n]``."""
        ...

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and that normalised; ``x`` may be used up."""
        ...

    def gated(self, both: Tensor) -> Tensor:
        """silu(gate) · up, ``[b, L, i]``, of ``[gate, up]``, ``[b, L, 2i]``; ``both`` may be used up."""
        ...

    def turn(
        self,
        qkv: Tensor,
        rotations: Rotations,
        weights: tuple[Tensor, Tensor] | None,
        step: Reading | Decoding,
        layer: int,
    ) -> Tensor:
        """Turn queries and keys by their positions, and keep keys and values.

        Args:
            qkv: ``[b, L, (h·g + 2h)·d]``; may be used up.
            rotations: of the positions.
            weights: ``[d]`` each, where queries and keys are normalised head by head first.
            step: takes keys and values.
            layer: of the model.

        Returns:
            Queries, ``[b, L, h, g, d]``.
        """
        ...


class Stock:
    """By torch.

    Args:
        heads: of the model.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._twice: dict[int, Tensor] = {}  # by the address of a weight
        self._room: Tensor | None = None

    def rotations(self, positions: Tensor) -> Rotations:
        """As :class:`Pieces`: ``[b, L, 1, d]`` each."""
        return self._heads.cosine[positions][:, :, None], self._heads.sine[positions][:, :, None]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """As :class:`Pieces`, in one pass over memory on a CPU.

        There torch makes it of ten. Of ``[x, −x]`` the mean is 0 and the variance is mean(x²), so layer normalisation,
        which is one, gives it in its first half.
        """
        n = len(weight)
        if x.device.type != "cpu":
            return rms_norm(x, (n,), weight, self._heads.epsilon)
        if weight.data_ptr() not in self._twice:
            self._twice[weight.data_ptr()] = torch.cat((weight, weight))
        wanted = (*x.shape[:-1], 2 * n)
        if self._room is None or self._room.shape != wanted or self._room.dtype != x.dtype:
            self._room = x.new_empty(wanted)
        self._room[..., :n] = x
        torch.neg(x, out=self._room[..., n:])
        return layer_norm(self._room, (2 * n,), self._twice[weight.data_ptr()], None, self._heads.epsilon)[..., :n]

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`Pieces`."""
        x = x + y
        return x, self.norm(x, weight)

    def gated(self, both: Tensor) -> Tensor:
        """As :class:`Pieces`."""
        gate, up = both.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def turn(
        self,
        qkv: Tensor,
        rotations: Rotations,
        weights: tuple[Tensor, Tensor] | None,
        step: Reading | Decoding,
        layer: int,
    ) -> Tensor:
        """As :class:`Pieces`."""
        b, L, _ = qkv.shape
        h, g, d = self._heads.heads, self._heads.group, self._heads.width
        cos, sin = rotations
        qk, v = qkv[..., : h * (g + 1) * d].view(b, L, -1, d), qkv[..., h * (g + 1) * d :].view(b, L, h, d)
        if weights is not None:
            q, k = torch.split(qk, [h * g, h], dim=2)
            q = rms_norm(q, (d,), weights[0], self._heads.epsilon)
            qk = torch.cat((q, rms_norm(k, (d,), weights[1], self._heads.epsilon)), dim=2)
        turned = torch.cat((qk[..., d // 2 :], qk[..., : d // 2]), dim=-1)
        qk = torch.addcmul(qk * cos, turned, sin)
        step.put(layer, qk[:, :, h * g :], v)
        return qk[:, :, : h * g].view(b, L, h, g, d)


class Compiled:
    """By ``layer.cpp``, compiled when it is first asked for (:mod:`lorchestra.base.native`): for models on a CPU.

    Torch passes over memory a dozen times between two products, and is called as often; that is most of what a step of
    few rows costs beyond reading the weights.

    Args:
        heads: of the model, in float32 or bfloat16.

    Raises:
        UserError: there is no compiler, or it fails.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        compiled, name = library(SOURCE, HEADER), COMPILED[heads.cosine.dtype]
        pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._norm = getattr(compiled, f"norm_{name}")
        self._norm.argtypes = [pointer, pointer, pointer, integer, integer, number, pointer]
        self._gated = getattr(compiled, f"gated_{name}")
        self._gated.argtypes = [pointer, integer, integer, pointer]
        self._turn = getattr(compiled, f"turn_{name}")
        self._turn.argtypes = [
            pointer, integer, integer, integer, integer, pointer, pointer, pointer, pointer, pointer, number, pointer,
            pointer,
        ]  # fmt: skip
        for function in (self._norm, self._gated, self._turn):
            function.restype = None

    def rotations(self, positions: Tensor) -> Rotations:
        """As :class:`Pieces`: the positions, ``[b, L]`` int64."""
        return (positions.contiguous(),)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """As :class:`Pieces`."""
        x = x.contiguous()
        return self._normalised(x, None, weight)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`Pieces`; ``x`` is added to in place."""
        return x, self._normalised(x, y, weight)

    def _normalised(self, x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
        out, n = torch.empty_like(x), len(weight)
        added = None if y is None else y.data_ptr()
        rows = x.numel() // n
        self._norm(x.data_ptr(), added, weight.data_ptr(), rows, n, self._heads.epsilon, out.data_ptr())
        return out

    def gated(self, both: Tensor) -> Tensor:
        """As :class:`Pieces`."""
        b, L, twice = both.shape
        out = torch.empty(b, L, twice // 2, dtype=both.dtype)
        self._gated(both.data_ptr(), b * L, twice // 2, out.data_ptr())
        return out

    def turn(
        self,
        qkv: Tensor,
        rotations: Rotations,
        weights: tuple[Tensor, Tensor] | None,
        step: Reading | Decoding,
        layer: int,
    ) -> Tensor:
        """As :class:`Pieces`; queries are turned in place."""
        b, L, _ = qkv.shape
        of, (positions,) = self._heads, rotations
        q_weight, k_weight = (None, None) if weights is None else (weights[0].data_ptr(), weights[1].data_ptr())
        for room in step.rooms(layer):
            self._turn(
                qkv[room.first :].data_ptr(),
                room.count * L,
                of.heads * of.group,
                of.heads,
                of.width,
                of.cosine.data_ptr(),
                of.sine.data_ptr(),
                positions[room.first :].data_ptr(),
                q_weight,
                k_weight,
                of.epsilon,
                room.held.data_ptr(),
                None if room.places is None else room.places.data_ptr(),
            )
        return qkv.as_strided(
            (b, L, of.heads, of.group, of.width),
            (qkv.stride(0), qkv.stride(1), of.group * of.width, of.width, 1),
            qkv.storage_offset(),
        )
