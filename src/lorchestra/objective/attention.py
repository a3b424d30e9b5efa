"""Attention for training in half precision on a CPU, where torch's own backward pass is several times slower.

The kernel behind ``scaled_dot_product_attention`` multiplies bfloat16 blocks there without the matrix routines that
linear modules use. Here it is three products of whole matrices, for a few rows of the batch at a time, so that the
L×L weights stay in the processor's cache; the backward pass computes them anew, so that no layer keeps them (Dao et
al. 2022, arXiv 2205.14135). The function is the same; its rounding is that of any bfloat16 attention.

Axis letters: b rows, h key heads, g query heads of each, L positions, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "lorchestra"
CACHED = 1 << 20  # attention weights at a time: 2 MiB in half precision


class _Attention(torch.autograd.Function):
    """softmax(s·q kᵀ + mask) v; see :func:`attend`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        out = torch.empty_like(q)
        for rows in _slices(q, k):
            torch.matmul(_weights(q[rows], k[rows], _of(mask, rows)), v[rows], out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        gradient = gradient.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows in _slices(q, k):
            weights = _weights(q[rows], k[rows], _of(mask, rows))
            torch.matmul(weights.transpose(-1, -2), gradient[rows], out=dv[rows])
            d_weights = gradient[rows] @ v[rows].transpose(-1, -2)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            torch.matmul(d_scores, k[rows], out=dq[rows])
            torch.matmul(d_scores.transpose(-1, -2), q[rows], out=dk[rows])
        return dq, dk, dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale·q kᵀ + mask) v for every head.

    Args:
        q: ``[b, h·g, L, d]``.
        k: ``[b, h, L, d]``, shared by g neighbouring query heads.
        v: as ``k``.
        mask: ``[b or 1, 1, L, L]``, bool (true where a query sees a key) or added to the scores; ``None`` for causal.
        scale: of the scores, 1/√d usually.

    Returns:
        ``[b, h·g, L, d]``.
    """
    b, heads, L, d = q.shape
    h = k.shape[1]
    if mask is None:
        mask = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    q = (q * scale).reshape(b, h, heads // h * L, d)
    out: Tensor = _Attention.apply(q, k.contiguous(), v.contiguous(), mask)  # type: ignore[no-untyped-call]
    return out.view(b, heads, L, d)


def _weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """``[rows, h, g·L, L]`` from q ``[rows, h, g·L, d]`` and k ``[rows, h, L, d]``."""
    scores = q @ k.transpose(-1, -2)
    L = k.shape[-2]
    scores.view(*scores.shape[:2], -1, L, L).add_(mask[:, None])
    return torch.softmax(scores, dim=-1)


def _slices(q: Tensor, k: Tensor) -> list[slice]:
    """As many rows of the batch at a time as keep the attention weights small."""
    rows = max(1, CACHED // (q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(first, first + rows) for first in range(0, q.shape[0], rows)]


def _of(mask: Tensor, rows: slice) -> Tensor:
    return mask if mask.shape[0] == 1 else mask[rows]


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface to :func:`attend`; what that does not do goes to ``sdpa`` as before."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ours = (
        (causal or attention_mask is not None)
        and (attention_mask is None or attention_mask.shape[1] == 1)
        and dropout == 0
        and query.shape[2] == key.shape[2]
        and key.shape == value.shape
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
    )
    if not ours:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


@contextmanager
def quick_attention(model: Any) -> Iterator[None]:
    """Inside, ``model`` attends by :func:`attend` where that pays: in half precision on a CPU, in place of ``sdpa``."""
    reference = next(model.parameters())
    pays = reference.device.type == "cpu" and reference.dtype in (torch.bfloat16, torch.float16)
    if not (pays and model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation()):
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
