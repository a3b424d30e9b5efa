"""x Wᵀ + bias with a frozen weight, laid out once for the machine it is multiplied on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lorchestra.serve.embedded.tiles import ROWS as FEW
from lorchestra.serve.embedded.tiles import Tiles

ROWS = 64  # the layout is made for batches of about so many


class Linear:
    """One or several linear modules with the same input, side by side.

    On a CPU, oneDNN lays the weight out in its own order, which spares it doing so at every call. Measured for
    bfloat16, with AMX: 5–15 % at 57 rows, 1.3 to 2 times at 1 to 8; for float32, with AVX2 (``benchmarks/linear.py``),
    from 4 rows up: a head 1.5 to 2.1 times, gate and up 1.3 to 1.6, the narrow ones 0.9 to 1.3; at one row 0.7 to 1.1.
    The original is then not needed.

    Args:
        weight: ``[m, n]``.
        bias: ``[m]``.
        tiles: multiply few rows by :class:`~lorchestra.serve.embedded.tiles.Tiles`, where that can be done; it holds a
            copy of the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, tiles: bool = False) -> None:
        self.bias = bias
        self._tiles = Tiles(weight.contiguous(), bias) if tiles and Tiles.take(weight) else None
        self.packed = _packable(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS) if self.packed else weight

    @classmethod
    def of(cls, *modules: nn.Module, tiles: bool = False) -> Linear:
        """Of ``nn.Linear`` modules, their outputs one after the other."""
        held: list[Any] = list(modules)
        weight = torch.cat([module.weight for module in held]) if len(held) > 1 else held[0].weight
        if all(module.bias is None for module in held):
            return cls(weight.detach(), None, tiles)
        biases = [m.bias if m.bias is not None else m.weight.new_zeros(m.weight.shape[0]) for m in held]
        return cls(weight.detach(), torch.cat(biases).detach(), tiles)

    def __call__(self, x: Tensor) -> Tensor:
        """``[…, n]`` to ``[…, m]``."""
        if self._tiles is not None and x.numel() <= FEW * x.shape[-1] and x.dtype == torch.bfloat16:
            return self._tiles(x)
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return linear(x, self.weight, self.bias)


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
