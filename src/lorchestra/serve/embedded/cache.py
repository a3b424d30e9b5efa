"""Memory for keys and values: what a model keeps of a position, and slots of one length that lie together.

Axis letters: S rows of a store, h key-value heads, T positions, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLEANED = 64  # positions that are zeroed ahead at a time


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of a position.

    Args:
        layers: with attention.
        heads: h, key-value heads.
        width: d.
    """

    layers: int
    heads: int
    width: int

    def bytes(self, positions: int, dtype: torch.dtype) -> int:
        """Memory of so many positions."""
        return 2 * self.layers * self.heads * self.width * positions * dtype.itemsize

    def empty(self, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[layers, S, T, 2, h, d]``."""
        return torch.empty(self.layers, rows, length, 2, self.heads, self.width, dtype=dtype, device=device)


class Store:
    """Slots of one length. ``data [layers, S, T, 2, h, d]``: a position is one piece of memory.

    Attention reads every slot as far as the longest sequence goes, and gives what lies beyond a sequence's own end the
    weight 0. That is only nothing where it is a number: positions below ``clean`` are written or zero in every slot in
    use, whoever had it before.
    """

    def __init__(self, shape: CacheShape, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = length
        self.rows: list[int] = []  # whose each slot is
        self.used: list[int] = []  # positions of each that are written
        self.clean = 0
        self.data = shape.empty(1, length, dtype=dtype, device=device)

    @property
    def full(self) -> bool:
        return len(self.rows) == self.room

    @property
    def room(self) -> int:
        return self.data.shape[1]

    def append(self, row: int, prompt: Tensor, most: int) -> None:
        """Room is doubled when it is used up, but not beyond ``most`` unless it must be."""
        place, room, read = len(self.rows), self.room, prompt.shape[1]
        if place == room:
            more = self.data.new_empty(len(self.data), max(room + 1, min(2 * room, most)), *self.data.shape[2:])
            more[:, :room].copy_(self.data)
            self.data = more
        self.data[:, place, :read].copy_(prompt)
        self.data[:, place, read : self.clean].zero_()
        self.rows.append(row)
        self.used.append(read)

    def reach(self, longest: int) -> None:
        """Make ``longest`` positions of every slot in use fit to be read."""
        if longest > self.clean:
            end = min(longest + CLEANED, self.length)
            for place, used in enumerate(self.used):
                self.data[:, place, max(self.clean, used) : end].zero_()
            self.clean = end

    def remove(self, row: int) -> None:
        """The last slot is moved into the hole."""
        place = self.rows.index(row)
        last, used = self.rows.pop(), self.used.pop()
        if last != row:
            reach = max(used, self.clean)
            self.data[:, place, :reach].copy_(self.data[:, len(self.rows), :reach])
            self.rows[place], self.used[place] = last, used
        if not self.rows:
            self.clean = 0
