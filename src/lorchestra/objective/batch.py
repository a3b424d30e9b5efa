"""Rendered examples → one padded batch whose branches share their prompt.

Axis letters: n items, s rows, L positions, b branches, N supervised tokens (of all branches together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.data.render import Rendered
from lorchestra.errors import DataError
from lorchestra.objective.flat import Flat, flat_length


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    Args:
        input_ids: ``[s, L]`` int64, padded on the right.
        position_ids: ``[s, L]`` int64, or ``None`` where positions simply count.
        mask: ``[s, 1, L, L]`` bool, true where a query (third axis) sees a key, or ``None`` for plain causal
            attention. Right padding needs no mask: nothing that counts comes after it.
        row: ``[N]`` int64 row of the position that predicts each supervised token.
        column: ``[N]`` int64 position in that row.
        target: ``[N]`` int64 the supervised token's id.
        branch: ``[N]`` int64 the branch each token belongs to.
        item: ``[b]`` int64 the item each branch belongs to; the branches of an item are neighbours, in order.
        row_item: ``[s]`` int64 the item of each row, for coefficients per row.
        tokens: tokens that are not padding; what "tokens per second" counts.
        flat: the same as one row, where that was asked for and is shorter.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    mask: Tensor | None
    row: Tensor
    column: Tensor
    target: Tensor
    branch: Tensor
    item: Tensor
    row_item: Tensor
    tokens: int
    flat: Flat | None = None

    @property
    def supervised(self) -> int:
        """N, the number of supervised tokens."""
        return int(self.target.numel())


def pack(
    items: Sequence[Rendered],
    pad_id: int,
    device: torch.device | str = "cpu",
    tree: bool = True,
    flat: bool = False,
) -> Batch:
    """Lay out ``items`` for one forward pass.

    With ``tree`` an item is one row: its prompt once, then its branches side by side, each seeing the prompt and
    itself at the positions it would have alone. Without, every branch is a row of its own. An item with one
    branch is the same either way. A first token without anything before it cannot be predicted and is left out.

    With ``flat`` the batch is laid out as one row too (:class:`Flat`), for a model of which :func:`flat_is_exact` and
    coefficients that are the same for all rows.

    Raises:
        DataError: no items, or an item without branches.
    """
    if not items or any(not item.branches for item in items):
        raise DataError("a batch needs items, and every item at least one branch (an answer)")
    rows: list[list[tuple[tuple[int, ...], int]]] = []  # per row: (segment, depth); depth 0 is the prompt
    supervised: list[tuple[int, int, int, int]] = []  # row, column, target, branch
    branch_item: list[int] = []
    row_item: list[int] = []
    for i, item in enumerate(items):
        groups = [item.branches] if tree else [(branch,) for branch in item.branches]
        for group in groups:
            start = len(item.prompt)
            segments = [(item.prompt, 0)]
            for depth, branch in enumerate(group, start=1):
                for j, (token, counts) in enumerate(zip(branch.ids, branch.supervised, strict=True)):
                    column = start + j - 1 if j else len(item.prompt) - 1
                    if counts and column >= 0:
                        supervised.append((len(rows), column, token, len(branch_item)))
                branch_item.append(i)
                segments.append((branch.ids, depth))
                start += len(branch.ids)
            rows.append(segments)
            row_item.append(i)
    lengths = [sum(len(ids) for ids, _ in segments) for segments in rows]
    width = max(lengths)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for s, segments in enumerate(rows):
        input_ids[s, : lengths[s]] = torch.tensor([t for ids, _ in segments for t in ids], dtype=torch.int64)
    position_ids, mask = None, None
    if any(len(segments) > 2 for segments in rows):
        position_ids, mask = _tree(rows, lengths, width)
        position_ids, mask = position_ids.to(device), mask.to(device)
    one_row = None
    if flat:
        shared = min(_shared([item.prompt for item in items]), width - 1)
        if flat_length(shared + sum(lengths) - shared * len(rows)) < len(rows) * width:
            one_row = Flat.of(input_ids.to(device), lengths, shared, position_ids, mask)
    columns = torch.tensor(supervised, dtype=torch.int64).reshape(-1, 4).to(device)
    return Batch(
        input_ids=input_ids.to(device),
        position_ids=position_ids,
        mask=mask,
        row=columns[:, 0],
        column=columns[:, 1],
        target=columns[:, 2],
        branch=columns[:, 3],
        item=torch.tensor(branch_item, dtype=torch.int64, device=device),
        row_item=torch.tensor(row_item, dtype=torch.int64, device=device),
        tokens=sum(lengths),
        flat=one_row,
    )


def _shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all ``prompts`` begin with."""
    first, last = min(prompts), max(prompts)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _tree(rows: list[list[tuple[tuple[int, ...], int]]], lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Positions ``[s, L]`` and mask ``[s, 1, L, L]`` of rows whose branches share a prompt."""
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    depth = torch.full((len(rows), width), -1, dtype=torch.int64)
    for s, segments in enumerate(rows):
        prompt = len(segments[0][0])
        column = 0
        for ids, d in segments:
            first = prompt if d else 0
            positions[s, column : column + len(ids)] = torch.arange(first, first + len(ids))
            depth[s, column : column + len(ids)] = d
            column += len(ids)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    key, query = depth[:, None, :], depth[:, :, None]
    mask = causal & ((key == 0) | (key == query))
    # A padding position sees itself alone, so that its softmax is not of nothing (and is read by no one).
    mask &= (key >= 0) | torch.eye(width, dtype=torch.bool)
    return positions, mask[:, None]


def length(item: Rendered, tree: bool = True) -> int:
    """Positions that ``item`` takes up in its longest row."""
    branches = [len(branch.ids) for branch in item.branches]
    return len(item.prompt) + (sum(branches) if tree else max(branches))


def batches(items: Sequence[Rendered], tokens: int, tree: bool = True) -> list[list[int]]:
    """Indices of ``items`` in batches of like length, each at most ``tokens`` positions with its padding.

    An item longer than ``tokens`` has a batch of its own. The order is a function of the lengths alone.
    """
    order = sorted(range(len(items)), key=lambda i: (length(items[i], tree), i))
    out: list[list[int]] = []
    rows = 0
    for i in order:
        more = 1 if tree else len(items[i].branches)
        if out and out[-1] and (rows + more) * length(items[i], tree) <= tokens:
            out[-1].append(i)
            rows += more
        else:
            out.append([i])
            rows = more
    return out
