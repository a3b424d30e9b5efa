"""Adapters by rows of a batch: each row holds the factors of its own sum, so that a step needs no gather and no loop.

Axis letters: S rows of a store, b rows that act, L positions, n in_features, m out_features, R rank of a row.

A row's factors lie one after the other in one flat piece of memory, so that a sequence that begins copies its adapter
once, and every step after it is one batched product for all rows (Chen et al. 2023, Punica, arXiv 2310.18547, gathers
by index in a kernel of its own instead). Rows are kept by rank in stores of 8, 16, 32, …; a rank pays for at most its
double, whatever the others are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank.factors import Group, Place, RowFactors, layout, rounded
from lorchestra.bank.kernel import DEPTH, Kernel
from lorchestra.errors import AdapterError


class _Store:
    """The rows of one rank, close together: ``flat [S, P]``, of which the first ``len(rows)`` are used."""

    def __init__(self, rank: int, groups: Sequence[Group], flat: Tensor) -> None:
        self.rank, self.groups = rank, groups
        self.places, _ = layout(groups, rank)
        self.rows: list[int] = []  # the batch's row of each
        self._hold(flat)

    def _hold(self, flat: Tensor) -> None:
        self.flat = flat
        self.views = [
            (
                self._view(place.A, self.rank * len(group.paths), group.inputs).transpose(1, 2),
                [self._view(B, self.rank, m) for B, m in zip(place.B, group.outputs, strict=True)],
            )
            for group, place in zip(self.groups, self.places, strict=True)
        ]

    def _view(self, offset: int, first: int, second: int) -> Tensor:
        return self.flat[:, offset : offset + first * second].view(len(self.flat), first, second)

    def append(self, row: int, flat: Tensor) -> int:
        """Room is doubled when it is used up. Returns the place."""
        place = len(self.rows)
        if place == len(self.flat):
            more = self.flat.new_empty(2 * place, self.flat.shape[1])
            more[:place].copy_(self.flat)
            self._hold(more)
        self.flat[place].copy_(flat)
        self.rows.append(row)
        return place


@dataclass(frozen=True, eq=False)
class _Loose:
    """Rows of one rank where they lie, for a kernel that reads them there."""

    rank: int
    places: Sequence[Place]
    positions: Sequence[int]  # in the batch
    flats: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Acting:
    """Rows of the batch that a forward pass is made of, found once for all its modules.

    Args:
        parts: per store: it, and the positions of its rows in the batch (``None``: all, in order).
        loose: rows in no store.
    """

    parts: tuple[tuple[_Store, Tensor | None], ...] = ()
    loose: tuple[_Loose, ...] = ()

    def __bool__(self) -> bool:
        """Whether any row is changed."""
        return bool(self.parts or self.loose)


class RowBank:
    """Factors by rows; row r of a batch is changed by what was put at r.

    Args:
        groups: the modules adapters may change.
        dtype: of the factors; they are multiplied in it.
        device: of the model.
        max_rank: of a row; a sum of adapters has the sum of their ranks.
        kernel: multiplies rows of one position, where it can.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_rank: int = 256,
        kernel: Kernel | None = None,
    ) -> None:
        self.groups, self._kernel = tuple(groups), kernel
        self.dtype, self.device, self.max_rank = dtype, torch.device(device), max_rank
        self._group_of = {path: (g, i) for g, group in enumerate(groups) for i, path in enumerate(group.paths)}
        self._stores: dict[int, _Store] = {}
        self._where: dict[int, tuple[_Store, int]] = {}  # row → its store and the place there
        self._kept: dict[int, Tensor] = {}  # rank → memory for rows beside
        sides = {side for group in groups for side in (group.inputs, *group.outputs)}
        here = self.device.type == "cpu" and kernel is not None and kernel.tiles
        self._whole = here and not any(side % DEPTH for side in sides)

    def factors(self, name: str, adapter: Adapter) -> RowFactors:
        """Lay an adapter out for a row.

        Args:
            name: for messages.
            adapter: in any dtype.

        Raises:
            AdapterError: a module is missing or of another shape, or the rank exceeds ``max_rank``.
        """
        for path, update in adapter.modules.items():
            self._check(name, path, update.shape)
        widest = max((update.rank for update in adapter.modules.values()), default=0)
        self._bound(name, widest)
        rank = rounded(widest)
        places, size = layout(self.groups, rank)
        flat = torch.zeros(size, dtype=self.dtype)
        for path, update in adapter.modules.items():
            A, B = self._room_of(flat, places, path, rank, 0, update.rank)
            A.copy_(update.A)
            B.copy_(update.B.T)
        return RowFactors(rank, flat.to(self.device))

    def mixed(self, name: str, members: Sequence[tuple[RowFactors, float]]) -> RowFactors:
        """Σ c·ΔW of factors that are laid out already.

        Args:
            name: for messages.
            members: factors with their coefficients; none for the base.

        Raises:
            AdapterError: the ranks, rounded up as rows have them, exceed ``max_rank`` in sum.
        """
        acting = [(factors, c) for factors, c in members if c != 0.0 and factors.rank]
        if len(acting) == 1 and acting[0][1] == 1.0:
            return acting[0][0]
        return self.mixed_by_layers(name, [(factors, (c,)) for factors, c in acting], dict.fromkeys(self._group_of, 0))

    def mixed_by_layers(
        self, name: str, members: Sequence[tuple[RowFactors, Sequence[float]]], parts: Mapping[str, int]
    ) -> RowFactors:
        """Σ c·ΔW with other coefficients in every part of the modules.

        A part pays for the members that act in it, so the row's rank is that of the dearest part.

        Args:
            name: for messages.
            members: factors, and their coefficients by part.
            parts: module path → index of its part; in a module that is in none, no member may change anything.

        Raises:
            AdapterError: the ranks exceed ``max_rank`` in the sum of a part, or a member changes a module of no part.
        """
        widths = [
            sum(factors.rank for factors, c in members if c[part] != 0.0) for part in range(max(parts.values()) + 1)
        ]
        self._bound(name, max(widths))
        rank = rounded(max(widths))
        places, size = layout(self.groups, rank)
        flat = torch.zeros(size, dtype=self.dtype, device=self.device)
        at = [0] * len(widths)
        for factors, c in members:
            theirs, _ = layout(self.groups, factors.rank)
            for path in self._group_of:
                a, b = self._room_of(factors.flat, theirs, path, factors.rank, 0, factors.rank)
                part = parts.get(path)
                if part is None and bool(b.any()):
                    raise AdapterError(
                        f"{name!r}: an adapter changes module {path!r}, for which there is no coefficient; its groups "
                        "of layers were made for other adapters"
                    )
                if part is None or c[part] == 0.0:
                    continue
                A, B = self._room_of(flat, places, path, rank, at[part], factors.rank)
                A.copy_(a)
                torch.mul(b, c[part], out=B)
            at = [begun + factors.rank * (acts != 0.0) for begun, acts in zip(at, c, strict=True)]
        return RowFactors(rank, flat)

    def put(self, row: int, factors: RowFactors) -> None:
        """Let row ``row`` be changed by a copy of ``factors``; what was there is forgotten."""
        self.clear(row)
        if factors.rank == 0:
            return
        if factors.rank not in self._stores:
            room = torch.empty(1, factors.flat.numel(), dtype=self.dtype, device=self.device)
            self._stores[factors.rank] = _Store(factors.rank, self.groups, room)
        store = self._stores[factors.rank]
        self._where[row] = (store, store.append(row, factors.flat))

    def clear(self, row: int) -> None:
        """Row ``row`` is the base again."""
        if row not in self._where:
            return
        store, place = self._where.pop(row)
        last = len(store.rows) - 1
        if place != last:  # the last one takes its place, so that those in use stay together
            store.flat[place].copy_(store.flat[last])
            store.rows[place] = store.rows[last]
            self._where[store.rows[place]] = (store, place)
        store.rows.pop()  # an empty store keeps its memory: to take it anew would cost the next burst

    def acting(self, rows: Sequence[int]) -> Acting:
        """A batch of ``rows``, which are those that hold factors, and others that do not, in any order."""
        position = {row: i for i, row in enumerate(rows)}
        parts: list[tuple[_Store, Tensor | None]] = []
        for store in self._stores.values():
            if not store.rows:
                continue
            positions = [position[row] for row in store.rows]
            every = positions == list(range(len(rows)))
            parts.append((store, None if every else torch.tensor(positions, device=self.device)))
        return Acting(tuple(parts))

    def beside(self, factors: Sequence[RowFactors], dtype: torch.dtype | None = None) -> Acting:
        """A batch whose row i is changed by ``factors[i]``, whatever the bank holds: for prompts, once each.

        It is good until the next call.

        Args:
            factors: of the rows.
            dtype: they are multiplied in, the bank's unless given. Where rows have many positions it is the products
                that cost, so the model's own dtype is faster; where they have one it is reading the factors.
        """
        parts: list[tuple[_Store, Tensor | None]] = []
        loose: list[_Loose] = []
        for rank in sorted({row.rank for row in factors} - {0}):
            positions = [i for i, row in enumerate(factors) if row.rank == rank]
            if self._whole and (dtype or self.dtype) == self.dtype == torch.bfloat16:
                places, _ = layout(self.groups, rank)
                loose.append(_Loose(rank, places, positions, [factors[i].flat for i in positions]))
                continue
            flat = self._scratch(rank, len(positions), dtype or self.dtype)
            for place, i in enumerate(positions):
                flat[place].copy_(factors[i].flat)
            store = _Store(rank, self.groups, flat)
            store.rows = positions
            every = len(positions) == len(factors)
            parts.append((store, None if every else torch.tensor(positions, device=self.device)))
        return Acting(tuple(parts), tuple(loose))

    def add(self, acting: Acting, group: int, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """outputs[i] += (x Aᵢᵀ) Bᵢᵀ for every row, in place.

        Args:
            acting: from :meth:`acting`.
            group: index of the group.
            x: ``[b, L, n]``.
            outputs: ``[b, L, m]`` of each module of the group, in any dtype.
        """
        parts = list(acting.parts)
        for rows in acting.loose:
            if self._kernel is not None and self._kernel.takes_prompts(x, rows.flats, outputs):
                place = rows.places[group]
                self._kernel.add_prompts(rows.flats, rows.positions, x, outputs, rows.rank, place)
            else:
                store = _Store(rows.rank, self.groups, torch.stack(tuple(rows.flats)))
                store.rows = list(rows.positions)
                parts.append((store, torch.tensor(rows.positions, device=self.device)))
        for store, positions in parts:
            A, Bs = store.views[group]
            used, dtype = len(store.rows), store.flat.dtype
            if self._kernel is not None and self._kernel.takes(x, store.flat, outputs):
                place = store.places[group]
                self._kernel.add(store.flat, used, positions, x, outputs, store.rank, place)
                continue
            z = torch.bmm((x if positions is None else x[positions]).to(dtype), A[:used])
            for i, (y, B) in enumerate(zip(outputs, Bs, strict=True)):
                seen = z[..., i * store.rank : (i + 1) * store.rank]
                if positions is None and y.dtype == dtype:
                    y.baddbmm_(seen, B[:used])
                elif positions is None:
                    y.add_(torch.bmm(seen, B[:used]).to(y.dtype))
                else:
                    y.index_add_(0, positions, torch.bmm(seen, B[:used]).to(y.dtype))

    def _scratch(self, rank: int, rows: int, dtype: torch.dtype) -> Tensor:
        """Memory for ``rows`` rows, kept: to take it anew costs as much as to fill it."""
        kept = self._kept.get(rank)
        if kept is None or len(kept) < rows or kept.dtype != dtype:
            _, size = layout(self.groups, rank)
            kept = self._kept[rank] = torch.empty(rows, size, dtype=dtype, device=self.device)
        return kept

    def _room_of(
        self, flat: Tensor, places: Sequence[Place], path: str, rank: int, at: int, r: int
    ) -> tuple[Tensor, Tensor]:
        """Views into ``flat`` of ranks ``at`` to ``at + r`` of a module: A ``[r, n]`` and B ``[r, m]``."""
        g, i = self._group_of[path]
        group, place = self.groups[g], places[g]
        A = flat[place.A : place.A + rank * len(group.paths) * group.inputs].view(-1, group.inputs)
        B = flat[place.B[i] : place.B[i] + rank * group.outputs[i]].view(rank, -1)
        return A[i * rank + at : i * rank + at + r], B[at : at + r]

    def _bound(self, name: str, rank: int) -> None:
        if rank > self.max_rank:
            raise AdapterError(
                f"adapter {name!r} has rank {rank} in sum, more than the {self.max_rank} of this server; fuse its "
                "members with `lorchestra fuse --rank`, or serve with a larger maximal rank"
            )

    def _check(self, name: str, path: str, shape: tuple[int, int]) -> None:
        if path not in self._group_of:
            raise AdapterError(
                f"adapter {name!r} changes {path!r}, which this model does not have, or not as a linear module of a "
                "layer. It belongs to another base, or has to be merged into it (`lorchestra merge`)"
            )
        g, i = self._group_of[path]
        ours = (self.groups[g].outputs[i], self.groups[g].inputs)
        if shape != ours:
            raise AdapterError(
                f"adapter {name!r} has an update of shape {shape} for {path!r}, which is {ours}. It belongs to another "
                "base"
            )
