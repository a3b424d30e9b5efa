"""A batch as one row of tokens: what all rows begin with (a system prompt, say) once, and no padding.

Every module of a language model but attention sees each position by itself, so it is indifferent to where a position
stands. Attention is given the rows back (:meth:`Flat.spread`), and what it finds is put in order again
(:meth:`Flat.collect`). The function is the same; fewer positions go through the linear modules.

Sizes are rounded up (:func:`rounded`), so that a training meets few shapes. For every shape that it has not met lately
oneDNN makes code anew, and drops what it made for another, and the C library looks among free blocks of all sizes for
one that fits: after a few hundred batches of a shape each, that took most of the time.

Axis letters: s rows, L positions of a row, P of them shared by all rows, T tokens in the one row, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


def rounded(count: int, steps: int = 8) -> int:
    """``count`` rounded up to one of ``steps`` (a power of two) numbers between a power of two and the next."""
    step = 1 << max(0, (count - 1).bit_length() - steps.bit_length()) if count else 1
    return -(-count // step) * step


@dataclass(frozen=True, eq=False)
class Flat:
    """Where the tokens of a batch stand in its one row: the shared prefix, then each row's rest, then padding.

    Args:
        input_ids: ``[1, T]`` int64.
        position_ids: ``[1, T]`` int64.
        mask: ``[s or 1, 1, L − P, L]`` bool, true where a position after the prefix sees a position of its row.
        place: ``[s, L]`` int64, where each position of each row stands; of padding 0.
        rest: ``[at most T − P]`` int64, which of the s·(L − P) positions after the prefix each token is.
        prefix: P.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    place: Tensor
    rest: Tensor
    prefix: int

    @classmethod
    def of(
        cls, input_ids: Tensor, lengths: Sequence[int], prefix: int, position_ids: Tensor | None, mask: Tensor | None
    ) -> Flat:
        """From a batch padded on the right; L is rounded up.

        Args:
            input_ids: ``[s, L]`` int64.
            lengths: of each row, without padding.
            prefix: how many tokens all rows begin with, less than L.
            position_ids: ``[s, L]`` int64, or ``None`` where positions count.
            mask: ``[s, 1, L, L]`` bool, or ``None`` for plain causal attention. Prefixes must be causal in it.
        """
        s, width = input_ids.shape
        device = input_ids.device
        more = prefix + rounded(width - prefix) - width
        L = width + more
        input_ids = pad(input_ids, (0, more))
        position_ids = None if position_ids is None else pad(position_ids, (0, more))
        if mask is not None:  # a position of the padding sees the first, so that its softmax is not of nothing
            mask = pad(mask, (0, more, 0, more))
            mask[:, :, width:, 0] = True
        there = torch.arange(L, device=device) < torch.tensor(lengths, device=device)[:, None]
        rest = there[:, prefix:].reshape(-1).nonzero()[:, 0]
        place = torch.zeros(s, L - prefix, dtype=torch.int64, device=device)
        place.view(-1)[rest] = torch.arange(prefix, prefix + rest.numel(), device=device)
        shared = torch.arange(prefix, device=device)
        positions = torch.arange(L, device=device).expand(s, L) if position_ids is None else position_ids
        if mask is None:
            mask = torch.ones(L, L, dtype=torch.bool, device=device).tril()[None, None]

        tokens = prefix + rest.numel()

        def flattened(values: Tensor) -> Tensor:
            found = torch.cat([values[0, :prefix], values[:, prefix:].reshape(-1)[rest]])
            return pad(found, (0, flat_length(tokens) - tokens))[None]

        return cls(
            input_ids=flattened(input_ids),
            position_ids=flattened(positions),
            mask=mask[:, :, prefix:],
            place=torch.cat([shared.expand(s, prefix), place], dim=1),
            rest=rest,
            prefix=prefix,
        )

    def spread(self, x: Tensor, first: int = 0) -> Tensor:
        """The rows' heads ``[s, h, L − first, d]`` from ``[1, h, T, d]``; ``first`` is 0, or P to leave the prefix out.

        What stands at padding is of no meaning.
        """
        out: Tensor = _Spread.apply(x, self, first)  # type: ignore[no-untyped-call]
        return out

    def collect(self, rest: Tensor) -> Tensor:
        """``[1, T − P, h, d]`` from the positions after the prefix ``[s, h, L − P, d]``; of padding 0."""
        out: Tensor = _Collect.apply(rest, self)  # type: ignore[no-untyped-call]
        return out

    def _places(self, heads: int, first: int) -> Tensor:
        """Of every head: ``[s·h·(L − first)]``, where it stands among ``[T, h]``."""
        head = torch.arange(heads, device=self.place.device)[:, None]
        return (self.place[:, None, first:] * heads + head).reshape(-1)

    def _heads_of_rest(self, heads: int, columns: int) -> Tensor:
        """``[tokens·h]``: where the heads of each token after the prefix stand among ``[s, h, columns]``."""
        width = self.mask.shape[2]
        row, column = self.rest // width, self.rest % width + columns - width
        head = torch.arange(heads, device=self.rest.device)
        return ((row[:, None] * heads + head) * columns + column[:, None]).reshape(-1)


def flat_length(tokens: int) -> int:
    """T of so many tokens."""
    return rounded(tokens, 16)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Flat, first: int) -> Tensor:
        _, h, T, d = x.shape
        ctx.flat, ctx.first, ctx.shape = flat, first, x.shape
        rows = x.transpose(1, 2).reshape(T * h, d)
        s, L = flat.place.shape
        return rows.index_select(0, flat._places(h, first)).view(s, h, L - first, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, P = ctx.flat, ctx.flat.prefix
        _, h, T, d = ctx.shape
        found = gradient.new_zeros(T, h, d) if ctx.first else gradient.new_empty(T, h, d)
        columns, end = gradient.shape[2], P + flat.rest.numel()
        torch.index_select(
            gradient.reshape(-1, d), 0, flat._heads_of_rest(h, columns), out=found[P:end].view((end - P) * h, d)
        )
        found[end:].zero_()
        if not ctx.first:
            found[:P] = gradient[:, :, :P].sum(0).transpose(0, 1)
        return found[None].transpose(1, 2), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: Tensor, flat: Flat) -> Tensor:
        ctx.flat, ctx.shape = flat, rest.shape
        _, h, columns, d = rest.shape
        count = flat.rest.numel()
        out = rest.new_empty(flat.input_ids.shape[1] - flat.prefix, h, d)
        torch.index_select(rest.reshape(-1, d), 0, flat._heads_of_rest(h, columns), out=out[:count].view(count * h, d))
        out[count:].zero_()
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, h, columns, d = ctx.shape
        found = gradient.new_zeros(ctx.shape)  # at padding too
        places = ctx.flat._heads_of_rest(h, columns)
        found.view(-1, d).index_copy_(0, places, gradient[:, : ctx.flat.rest.numel()].reshape(-1, d))
        return found, None
