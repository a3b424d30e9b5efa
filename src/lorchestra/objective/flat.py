"""A batch as one row of tokens: what all rows begin with (a system prompt, say) once, and no padding.

Every module of a language model but attention sees each position by itself, so it is indifferent to where a position
stands. Attention is given the rows back (:meth:`Flat.spread`), and what it finds is put in order again
(:meth:`Flat.collect`). The function is the same; fewer positions go through the linear modules.

Axis letters: s rows, L positions of a row, P of them shared by all rows, T tokens in the one row, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Flat:
    """Where the tokens of a batch stand in its one row: the shared prefix, then each row's rest.

    Args:
        input_ids: ``[1, T]`` int64.
        position_ids: ``[1, T]`` int64.
        mask: ``[s or 1, 1, L − P, L]`` bool, true where a position after the prefix sees a position of its row.
        place: ``[s, L]`` int64, where each position of each row stands; of padding 0.
        rest: ``[T − P]`` int64, which of the s·(L − P) positions after the prefix each token is.
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
        """From a batch padded on the right.

        Args:
            input_ids: ``[s, L]`` int64.
            lengths: of each row, without padding.
            prefix: how many tokens all rows begin with, less than L.
            position_ids: ``[s, L]`` int64, or ``None`` where positions count.
            mask: ``[s, 1, L, L]`` bool, or ``None`` for plain causal attention. Prefixes must be causal in it.
        """
        s, L = input_ids.shape
        device = input_ids.device
        there = torch.arange(L, device=device) < torch.tensor(lengths, device=device)[:, None]
        rest = there[:, prefix:].reshape(-1).nonzero()[:, 0]
        place = torch.zeros(s, L - prefix, dtype=torch.int64, device=device)
        place.view(-1)[rest] = torch.arange(prefix, prefix + rest.numel(), device=device)
        shared = torch.arange(prefix, device=device)
        positions = torch.arange(L, device=device).expand(s, L) if position_ids is None else position_ids
        if mask is None:
            mask = torch.ones(L, L, dtype=torch.bool, device=device).tril()[None, None]

        def flattened(values: Tensor) -> Tensor:
            return torch.cat([values[0, :prefix], values[:, prefix:].reshape(-1)[rest]])[None]

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
        """``[1, T − P, h, d]`` from the positions after the prefix ``[s, h, L − P, d]``."""
        out: Tensor = _Collect.apply(rest, self)  # type: ignore[no-untyped-call]
        return out

    def _places(self, heads: int, first: int) -> Tensor:
        """Of every head: ``[s·h·(L − first)]``, where it stands among ``[T, h]``."""
        head = torch.arange(heads, device=self.place.device)[:, None]
        return (self.place[:, None, first:] * heads + head).reshape(-1)

    def _heads_of_rest(self, heads: int, columns: int) -> Tensor:
        """``[(T − P)·h]``: where the heads of each token after the prefix stand among ``[s, h, columns]``."""
        width = self.mask.shape[2]
        row, column = self.rest // width, self.rest % width + columns - width
        head = torch.arange(heads, device=self.rest.device)
        return ((row[:, None] * heads + head) * columns + column[:, None]).reshape(-1)


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
        columns = gradient.shape[2]
        torch.index_select(
            gradient.reshape(-1, d), 0, flat._heads_of_rest(h, columns), out=found[P:].view((T - P) * h, d)
        )
        if not ctx.first:
            found[:P] = gradient[:, :, :P].sum(0).transpose(0, 1)
        return found[None].transpose(1, 2), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: Tensor, flat: Flat) -> Tensor:
        ctx.flat, ctx.shape = flat, rest.shape
        _, h, columns, d = rest.shape
        return rest.reshape(-1, d).index_select(0, flat._heads_of_rest(h, columns)).view(1, -1, h, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, h, columns, d = ctx.shape
        found = gradient.new_zeros(ctx.shape)  # at padding too
        found.view(-1, d).index_copy_(0, ctx.flat._heads_of_rest(h, columns), gradient.reshape(-1, d))
        return found, None
