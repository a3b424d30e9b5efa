"""Attention for training: of batches that are laid out as one row, and by whole matrices on a CPU.

The kernel behind ``scaled_dot_product_attention`` multiplies half-precision blocks on a CPU without the matrix routines
that linear modules use, and its backward pass is several times slower. Here it is three products of whole matrices, for
a few rows of the batch at a time, so that the Q×K weights stay in the processor's cache; if rows are long, the backward
pass computes them anew, so that no layer keeps them (Dao et al. 2022, arXiv 2205.14135). The function is the same; its
rounding is that of any half-precision attention.

Axis letters: b rows, h key heads, g query heads of each, L positions (Q of queries, K of keys), d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorchestra.objective.flat import Flat

NAME = "lorchestra"
CACHED = 1 << 20  # attention weights at a time: 2 MiB in half precision
KEPT = 512  # keys up to which the weights are kept for the backward pass: no more than the layer's other activations


class _Attention(torch.autograd.Function):
    """softmax(s·q kᵀ + mask) v; see :func:`attend`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = torch.empty_like(q)
        kept = []
        for rows in _slices(q, k):
            weights = _weights(q[rows], k[rows], _of(mask, rows))
            torch.matmul(weights, v[rows], out=out[rows])
            if k.shape[2] <= KEPT:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, mask, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *kept = ctx.saved_tensors
        gradient = gradient.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for i, rows in enumerate(_slices(q, k)):
            weights = kept[i] if kept else _weights(q[rows], k[rows], _of(mask, rows))
            torch.matmul(weights.transpose(-1, -2), gradient[rows], out=dv[rows])
            d_weights = gradient[rows] @ v[rows].transpose(-1, -2)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            torch.matmul(d_scores, k[rows], out=dq[rows])
            torch.matmul(d_scores.transpose(-1, -2), q[rows], out=dk[rows])
        return dq, dk, dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale·q kᵀ + mask) v for every head.

    Args:
        q: ``[b, h·g, Q, d]``.
        k: ``[b, h, K, d]``, shared by g neighbouring query heads.
        v: as ``k``.
        mask: ``[b or 1, 1, Q, K]``, bool (true where a query sees a key) or added to the scores; ``None`` for causal,
            with Q = K.
        scale: of the scores, 1/√d usually.

    Returns:
        ``[b, h·g, Q, d]``.
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
    """``[rows, h, g·Q, K]`` from q ``[rows, h, g·Q, d]`` and k ``[rows, h, K, d]``."""
    scores = q @ k.transpose(-1, -2)
    scores.view(*scores.shape[:2], -1, *mask.shape[-2:]).add_(mask[:, None])
    return torch.softmax(scores, dim=-1)


def _slices(q: Tensor, k: Tensor) -> list[slice]:
    """As many rows of the batch at a time as keep the attention weights small."""
    rows = max(1, CACHED // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(first, first + rows) for first in range(0, q.shape[0], rows)]


def _of(mask: Tensor, rows: slice) -> Tensor:
    return mask if mask.shape[0] == 1 else mask[rows]


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    flat: Flat | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface. A batch in one row (``flat``) is attended to row by row: ``attention_mask`` is then that
    of the positions after the shared prefix.
    """
    if flat is None:
        return _rows(module, query, key, value, attention_mask, *args, **kwargs)
    P = flat.prefix
    queries, keys, values = flat.spread(query, P), flat.spread(key), flat.spread(value)
    out = flat.collect(_rows(module, queries, keys, values, attention_mask, *args, **kwargs)[0].transpose(1, 2))
    if P:
        prefix = _rows(module, query[:, :, :P], key[:, :, :P], value[:, :, :P], None, *args, **kwargs)[0]
        out = torch.cat([prefix, out], dim=1)
    return out, None


def _rows(
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
    """:func:`attend` where it is quicker; what it does not do goes to ``sdpa``. Returns ``[b, Q, heads, d]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ours = (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and (attention_mask is not None or (causal and query.shape[2] == key.shape[2]))
        and (attention_mask is None or (attention_mask.shape[1] == 1 and attention_mask.shape[2] == query.shape[2]))
        and dropout == 0
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
    """Inside, a ``model`` that attends by ``sdpa`` can be given batches in one row, and is quicker on a CPU."""
    if not (model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation()):
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
