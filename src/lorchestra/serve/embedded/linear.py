"""x Wᵀ + bias with a frozen weight, laid out once for the machine it is multiplied on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.packed = _packable(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS) if self.packed else weight

    @classmethod
    def of(cls, *modules: nn.Module) -> Linear:
        """Of ``nn.Linear`` modules, their outputs one after the other."""
        held: list[Any] = list(modules)
        weight = torch.cat([module.weight for module in held]) if len(held) > 1 else held[0].weight
        if all(module.bias is None for module in held):
            return cls(weight.detach(), None)
        biases = [m.bias if m.bias is not None else m.weight.new_zeros(m.weight.shape[0]) for m in held]
        return cls(weight.detach(), torch.cat(biases).detach())

    def __call__(self, x: Tensor) -> Tensor:
        """``[…, n]`` to ``[…, m]``."""
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
