"""RMSNorm for training in half precision on a CPU: fewer passes over memory than autograd's own, the same function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    """w · x / √(mean(x²) + ε) over the last axis, computed in float32; w has no gradient.

    x ``[…, n]`` and w ``[n]`` in half precision. x/√… is rounded before it meets w, as in transformers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, w, r)
        return wide.mul_(r).to(x.dtype).mul_(w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w, r = ctx.saved_tensors
        wide, d = x.float(), (gradient * w).float()
        along = (d * wide).sum(-1, keepdim=True).mul_(r**3).div_(-x.shape[-1])
        return d.mul_(r).addcmul_(wide, along).to(x.dtype), None, None


def rms_norm(x: Tensor, w: Tensor, epsilon: float) -> Tensor:
    """w · x / √(mean(x²) + ε) for x ``[…, n]`` and w ``[n]`` in half precision."""
    out: Tensor = _RMSNorm.apply(x, w, epsilon)  # type: ignore[no-untyped-call]
    return out


@contextmanager
def quick_norms(model: nn.Module) -> Iterator[None]:
    """Inside, frozen RMSNorms of ``model`` are :func:`rms_norm` where that pays: in half precision on a CPU."""
    changed = [module for module in model.modules() if _replaceable(module)]
    for module in changed:
        module.forward = _forward(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)

    return forward


def _replaceable(module: Any) -> bool:
    """Whether it is a frozen RMSNorm of this very form, tried on two rows: Gemma's, say, multiplies by 1 + w."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not (isinstance(weight, nn.Parameter) and weight.ndim == 1 and isinstance(epsilon, float)):
        return False
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16) or weight.requires_grad:
        return False
    if "forward" in vars(module):  # somebody else's
        return False
    x = torch.linspace(-2, 3, 2 * weight.numel()).view(2, -1).to(weight.dtype)
    with torch.no_grad():
        return torch.allclose(module(x), rms_norm(x, weight, epsilon), rtol=0.02, atol=1e-3)
