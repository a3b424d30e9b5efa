"""Slots of key-value cache: taken when a sequence begins, freed when it ends, and close together in between.

A sequence says how long it may become, and gets a slot of the next power of two. While its prompt is read it has
memory of its own; when it begins to decode it joins the others of its length in one tensor ``[layers, S, T, 2, h, d]``,
whose first rows are in use, so that a step's attention reads views and never gathers. When one leaves, the last takes
its place.

Axis letters: S rows of a store, b rows of a batch, h key-value heads, g query heads to each, T positions, L new ones,
d head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorchestra.serve.embedded.attention import Attention
from lorchestra.serve.embedded.cache import CacheShape, Store

SHORTEST = 256  # positions of the smallest slot


@dataclass(frozen=True, eq=False)
class Room:
    """Where a layer's keys and values go, of ``count`` rows of a batch from ``first``.

    Args:
        first: row.
        count: of rows.
        held: ``[positions, 2, h, d]``.
        places: of each row's positions in it, int64; ``None``: one after the other.
    """

    first: int
    count: int
    held: Tensor
    places: Tensor | None


class Reading:
    """Prompts that are read: new positions of a few sequences, each with memory of its own.

    Keys and values of the pass lie in ``[layers, b, L, 2, h, d]`` until :meth:`keep`, so that prompts that begin
    together attend in one call.

    Args:
        caches: of each, ``[layers, T, 2, h, d]``.
        starts: positions of each that were read before.
        counts: new ones of each, at most L.
        length: L; the largest count unless given.
    """

    def __init__(
        self, caches: Sequence[Tensor], starts: Sequence[int], counts: Sequence[int], length: int | None = None
    ) -> None:
        self._caches, self._starts, self._counts = caches, starts, counts
        L = max(counts) if length is None else length
        # What is beyond a row's count repeats its last position: there may be none after it.
        steps = torch.minimum(torch.arange(L)[None], torch.tensor(counts)[:, None] - 1)
        self.positions = torch.tensor(starts)[:, None] + steps
        layers, _, *one = caches[0].shape
        self._new = caches[0].new_empty(layers, len(caches), L, *one)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Keep keys and values, and attend to all up to each position.

        Args:
            layer: of the model.
            q: ``[b, L, h, g, d]``.
            k: ``[b, L, h, d]``.
            v: ``[b, L, h, d]``.
            scale: of the scores; ``None``: 1/√d.
            window: so many positions up to its own, each position sees; ``None``: all.

        Returns:
            ``[b, L, h, g, d]``; of a row's positions beyond its count nothing is meant.
        """
        self.put(layer, k, v)
        return self.seen(layer, q, scale, window)

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep keys and values, ``[b, L, h, d]`` each."""
        new = self._new[layer]
        new[:, :, 0], new[:, :, 1] = k, v

    def rooms(self, layer: int) -> list[Room]:
        """Where :meth:`put` puts them."""
        new = self._new[layer]
        return [Room(0, len(new), new.flatten(0, 1), None)]

    def seen(self, layer: int, q: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
        """As :meth:`attend`, once keys and values are kept."""
        new = self._new[layer]
        if not any(self._starts):
            return self._product(q, new, 0, scale, window)
        rows = []
        for row, (cache, start) in enumerate(zip(self._caches, self._starts, strict=True)):
            held = torch.cat((cache[layer, :start], new[row]))[None]
            rows.append(self._product(q[row : row + 1], held, start, scale, window))
        return torch.cat(rows)

    def keep(self) -> None:
        """Put what was read into the sequences' own memory, once the pass is through."""
        for row, (cache, start, count) in enumerate(zip(self._caches, self._starts, self._counts, strict=True)):
            cache[:, start : start + count] = self._new[:, row, :count]

    def _product(self, q: Tensor, held: Tensor, start: int, scale: float | None, window: int | None) -> Tensor:
        """Query heads of one key-value head stand where positions stand: nothing is repeated."""
        b, L, h, g, d = q.shape
        mask = self._masks.get((start, window))
        if mask is None:
            mask = _weights(_causal(start, L, window, q.device), q.dtype).repeat(g, 1)
            self._masks[start, window] = mask
        found = scaled_dot_product_attention(
            q.permute(0, 2, 3, 1, 4).reshape(b, h, g * L, d),
            *_halves(held),
            attn_mask=mask,
            scale=scale,
        )
        return found.view(b, h, g, L, d).permute(0, 3, 1, 2, 4)


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of a batch that lie in one store: from ``first``, so many."""

    store: Store
    first: int
    count: int
    places: Tensor  # [count], of the new positions in a layer's [S·T, …]
    at: Tensor  # [count], the new positions
    longest: int
    level: bool  # every row is the longest
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window

    def mask(self, window: int | None) -> Tensor | None:
        """``[count, 1, 1, longest]``; ``None`` where every row looks at everything."""
        if self.level and (window is None or window >= self.longest):
            return None
        if window not in self.masks:
            places = torch.arange(self.longest, device=self.at.device)[None]
            seen = places <= self.at[:, None]
            if window is not None:
                seen &= places > self.at[:, None] - window
            self.masks[window] = _weights(seen, self.store.data.dtype)[:, None, None]
        return self.masks[window]


class Decoding:
    """One new position of every sequence that decodes.

    Args:
        parts: stores in use.
        positions: ``[b, 1]``.
        kernel: attends, where it can.
    """

    def __init__(self, parts: Sequence[_Part], positions: Tensor, kernel: Attention | None = None) -> None:
        self._parts, self.positions, self._kernel = parts, positions, kernel

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """As :meth:`Reading.attend`, with L = 1."""
        self.put(layer, k, v)
        return self.seen(layer, q, scale, window)

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """As :meth:`Reading.put`."""
        for room in self.rooms(layer):
            rows = slice(room.first, room.first + room.count)
            assert room.places is not None
            room.held.index_copy_(0, room.places, torch.stack((k[rows, 0], v[rows, 0]), dim=1))

    def rooms(self, layer: int) -> list[Room]:
        """As :meth:`Reading.rooms`."""
        return [Room(part.first, part.count, part.store.data[layer].flatten(0, 1), part.places) for part in self._parts]

    def alone(self) -> tuple[Tensor, int] | None:
        """If it is one row: its slot in every layer, ``[layers, T, 2, h, d]``, and its new position."""
        if len(self._parts) != 1 or self._parts[0].count != 1:
            return None
        part = self._parts[0]
        return part.store.data[:, 0], part.longest - 1

    def seen(self, layer: int, q: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
        """As :meth:`Reading.seen`."""
        found = []
        for part in self._parts:
            held = part.store.data[layer]
            asking = q[part.first : part.first + part.count, 0]
            if self._kernel is not None and self._kernel.takes(asking, held):
                found.append(self._kernel.attend(asking, held, part.at, scale, window))
                continue
            # As in Reading, query heads stand where positions stand.
            found.append(
                scaled_dot_product_attention(
                    asking,
                    *_halves(held[: part.count, : part.longest]),
                    attn_mask=part.mask(window),
                    scale=scale,
                )
            )
        return (found[0] if len(found) == 1 else torch.cat(found))[:, None]


class Slots:
    """Cache for sequences that are known by a row number of the caller's.

    Args:
        shape: of the model.
        budget: bytes that slots may take in sum.
        max_length: of a sequence.
        dtype: of the model.
        device: of the model.
        kernel: attends while decoding, where it can.
    """

    def __init__(
        self,
        shape: CacheShape,
        budget: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kernel: Attention | None = None,
    ) -> None:
        self.shape, self.budget, self.max_length, self._kernel = shape, budget, max_length, kernel
        self.dtype, self.device = dtype, torch.device(device)
        self._stores: dict[int, Store] = {}
        self._reserved: dict[int, int] = {}  # row → length of its slot
        self._prompts: dict[int, Tensor] = {}

    @property
    def reserved(self) -> int:
        """Bytes that are taken."""
        return self.shape.bytes(sum(self._reserved.values()), self.dtype)

    @property
    def _held(self) -> int:
        """Bytes of stores, those of sequences that begin one day included."""
        rows = Counter(self._reserved.values())
        for length, store in self._stores.items():
            rows[length] = max(rows[length], store.room)
        return self.shape.bytes(sum(length * count for length, count in rows.items()), self.dtype)

    def fits(self, length: int) -> bool:
        """Whether there is room for a sequence of ``length`` now; for one alone there always is."""
        more = self.shape.bytes(self.slot(length), self.dtype)
        return not self._reserved or self.reserved + more <= self.budget

    def slot(self, length: int) -> int:
        """Positions of the slot that a sequence of ``length`` gets."""
        rounded = SHORTEST
        while rounded < length:
            rounded *= 2
        return min(rounded, self.max_length)

    def take(self, row: int, prompt: int, length: int) -> None:
        """Begin a sequence with ``prompt`` positions to read, that may become ``length`` long."""
        self._reserved[row] = self.slot(length)
        for other in [length for length, store in self._stores.items() if not store.rows]:
            if self._held > self.budget:
                del self._stores[other]
        self._prompts[row] = self.shape.empty(1, prompt, dtype=self.dtype, device=self.device)[:, 0]

    def reading(
        self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], length: int | None = None
    ) -> Reading:
        """A forward pass over parts of the prompts of ``rows``; arguments as of :class:`Reading`."""
        return Reading([self._prompts[row] for row in rows], starts, counts, length)

    def begin(self, row: int) -> None:
        """Its prompt is read: it decodes from now on."""
        prompt, length = self._prompts[row], self._reserved[row]
        store = self._stores.get(length)
        if store is None or store.full:  # others that are empty make room
            self._stores = {other: kept for other, kept in self._stores.items() if kept.rows or kept is store}
        if store is None:
            store = self._stores[length] = Store(self.shape, length, self.dtype, self.device)
        store.append(row, prompt, self.budget // self.shape.bytes(length, self.dtype))
        del self._prompts[row]

    def order(self) -> list[int]:
        """Rows that decode, in the order of :meth:`decoding`'s batch."""
        return [row for length in sorted(self._stores) for row in self._stores[length].rows]

    def decoding(self) -> Decoding:
        """A forward pass over one new position of each row that decodes; they are longer by it."""
        parts, first, positions = [], 0, []
        for length in sorted(self._stores):
            store = self._stores[length]
            if not store.rows:
                continue
            at = list(store.used)
            positions += at
            longest = max(at) + 1
            store.reach(longest)
            column = torch.tensor(at, device=self.device)
            places = torch.arange(len(at), device=self.device) * store.length + column
            parts.append(_Part(store, first, len(at), places, column, longest, min(at) == max(at)))
            first += len(at)
            store.used = [used + 1 for used in at]
        return Decoding(parts, torch.tensor(positions)[:, None], self._kernel)

    def release(self, row: int) -> None:
        """It ended, or never began to decode."""
        length = self._reserved.pop(row, None)
        if length is None:
            return
        if self._prompts.pop(row, None) is None:
            self._stores[length].remove(row)  # an empty store keeps its memory for the next burst


def _halves(held: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[b, h, T, d]`` of ``[b, T, 2, h, d]``, as views."""
    return held[:, :, 0].transpose(1, 2), held[:, :, 1].transpose(1, 2)


def _weights(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, made once for all layers: attention would make it of ``seen`` at every call."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _causal(start: int, count: int, window: int | None, device: torch.device) -> Tensor:
    """``[count, start + count]``, true where a position looks."""
    at = torch.arange(start, start + count, device=device)[:, None]
    places = torch.arange(start + count, device=device)[None]
    seen = places <= at
    return seen if window is None else seen & (places > at - window)
