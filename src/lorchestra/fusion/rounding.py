"""W + ΔW in float32, rounded once, a tile of rows at a time; and what the rounding lost.

W is the stored weight, R the same in the output's dtype (R = W unless that is narrower), O what is written. The
update that arrives is O − R: how R differs from W would have been lost without any adapter too, and is told apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorchestra.adapter.digest import tensor_bytes
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import SourceError, UserError
from lorchestra.fusion.assign import CODES, KINDS, Output

TILE = 1 << 18  # entries of a tile: its float32 temporaries stay in the processor's cache
FEWEST = 8  # rows of a tile; see pieces
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Sums:
    """What was added up over entries of changed tensors.

    Args:
        weight: ΣW².
        update: ΣΔW².
        lost: Σ of (O − R − ΔW)², of one entry at most its ΔW².
        base: Σ(R − W)².
        reached: entries that the update reaches (neither B's row nor A's column is all zero).
        changed: entries with O ≠ R.
    """

    weight: float = 0.0
    update: float = 0.0
    lost: float = 0.0
    base: float = 0.0
    reached: int = 0
    changed: int = 0

    @classmethod
    def of(cls, parts: Iterable[Sums]) -> Sums:
        """Their sum, in their order and without rounding in between."""
        listed = list(parts)
        return cls(
            weight=math.fsum(part.weight for part in listed),
            update=math.fsum(part.update for part in listed),
            lost=math.fsum(part.lost for part in listed),
            base=math.fsum(part.base for part in listed),
            reached=sum(part.reached for part in listed),
            changed=sum(part.changed for part in listed),
        )

    @property
    def update_ratio(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return math.sqrt(self.update / self.weight) if self.weight else 0.0

    @property
    def rounding_lost(self) -> float:
        """‖lost‖ / ‖ΔW‖: 0 if the whole update arrived, 1 if nothing did (the two sums differ in their last digits)."""
        return min(math.sqrt(self.lost / self.update), 1.0) if self.update else 0.0

    @property
    def entries_lost(self) -> float:
        """Share of the reached entries on which the update left no trace."""
        return 1.0 - min(self.changed, self.reached) / self.reached if self.reached else 0.0

    @property
    def base_rounding(self) -> float:
        """‖R − W‖ / ‖W‖."""
        return math.sqrt(self.base / self.weight) if self.weight else 0.0


@dataclass(frozen=True)
class Addend:
    """ΔW as the weight is stored: left @ right.

    Args:
        left: ``[rows, r]`` float32.
        right: ``[r, columns]`` float32.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, update: LowRank, transposed: bool) -> Addend:
        """From an adapter's module."""
        B, A = update.B.float(), update.A.float()
        return cls(A.T.contiguous(), B.T.contiguous()) if transposed else cls(B, A)

    @property
    def square(self) -> float:
        """ΣΔW², in float64 and without ΔW."""
        return LowRank(self.left, self.right).norm() ** 2

    @property
    def reached(self) -> int:
        """Entries that can differ from zero."""
        return int((self.left != 0).any(1).sum()) * int((self.right != 0).any(0).sum())


def move_rows(files: tuple[int, int], output: Output, start: int, rows: range, addend: Addend | None) -> Sums:
    """Read rows, add, round, write.

    The temporaries are made once and used for every tile: memory that is new each time costs more than the arithmetic.

    Args:
        files: descriptors of the base's file and of the output's.
        output: the tensor; see :func:`matrix`.
        start: its first byte in the output's file.
        rows: which rows.
        addend: what is added, if anything is.

    Returns:
        The sums over these rows, but ``update`` and ``reached``, which the factors tell.

    Raises:
        UserError: an entry is beyond the largest number of the output's dtype.
        SourceError: the file ends early, or the base holds NaN or infinity where something is added.
    """
    _, columns = matrix(output.source.shape)
    kind = KINDS[output.source.dtype]
    tiles = pieces(rows, TILE // columns)
    most = max(len(tile) for tile in tiles)
    raw = bytearray(most * columns * kind.itemsize)
    stored = torch.frombuffer(raw, dtype=kind).view(most, columns)
    after = torch.empty(most, columns, dtype=output.kind)
    spare = [torch.empty(most, columns) for _ in range(4 if addend else 0)]
    sums = []
    for tile in tiles:
        row, count = tile.start, len(tile)
        view = memoryview(raw)[: count * columns * kind.itemsize]
        read_at(files[0], view, output.source.first + row * columns * kind.itemsize, output.name)
        if addend is None and kind == output.kind:
            write_at(files[1], view, start + row * columns * kind.itemsize)
            continue
        weight, written = stored[:count], after[:count]
        if addend is None:
            _check_range(output, weight, written.copy_(weight))
        else:
            left = addend.left[row : row + count]
            sums.append(_add(output, weight, left, addend.right, written, [buffer[:count] for buffer in spare]))
        write_at(files[1], tensor_bytes(written), start + row * columns * output.kind.itemsize)
    return Sums.of(sums)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns under which a tensor is moved."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def pieces(rows: range, step: int) -> list[range]:
    """``rows`` in pieces of about ``step``, none of fewer than :data:`FEWEST` unless there are no more.

    Linear algebra libraries have kernels of their own for a product of a few rows, which sum in another order: its last
    bits are not those of the same rows in a larger product.
    """
    starts = list(range(rows.start, rows.stop, max(step, FEWEST)))
    if len(starts) > 1 and rows.stop - starts[-1] < FEWEST:
        starts.pop()
    return [range(first, last) for first, last in zip(starts, [*starts[1:], rows.stop], strict=True)]


def _add(output: Output, weight: Tensor, left: Tensor, right: Tensor, after: Tensor, spare: list[Tensor]) -> Sums:
    """W + left @ right into ``after``; every tensor is a tile ``[rows, columns]``, the spare ones float32."""
    before, total, update, narrow = spare
    before.copy_(weight)
    weight_square = _square(before)
    # In half precision W + ΔW in float32 is exact beside what rounding does to it: the usual case needs less memory.
    usual = weight.dtype == output.kind and output.kind.itemsize == 2
    delta = torch.mm(left, right, out=total if usual else update)
    after.copy_(torch.add(before, delta, out=total))
    rounded = weight.to(output.kind)
    changed = int(np.count_nonzero(_words(after) != _words(rounded)))
    holds, base = _holds(weight.dtype, output.kind), 0.0
    if usual:
        lost = total.sub_(before.copy_(after))
    elif holds:
        lost = total.copy_(after).sub_(before).sub_(delta)
    else:
        base = _square(torch.sub(narrow.copy_(rounded), before, out=total))
        lost = total.copy_(after).sub_(narrow).sub_(delta)
    share = _square(lost)
    finite = math.isfinite(share)
    if not holds:
        share = _square(torch.minimum(lost.abs_(), delta.abs_(), out=lost))
    sums = Sums(weight=weight_square, lost=share, base=base, changed=changed)
    if not finite or not math.isfinite(sums.weight):
        _check_range(output, weight.float() + left @ right, after)
        raise SourceError(
            f"tensor {output.name!r} of the base holds NaN or infinity: it is damaged, or was never usable; fetch it "
            "again"
        )
    return sums


def _holds(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether every number of ``stored`` is one of ``wanted``."""
    return stored == wanted or wanted == torch.float64 or (wanted == torch.float32 and stored.itemsize < 4)


def _square(values: Tensor) -> float:
    flat = values.view(-1)
    return float(torch.dot(flat, flat))


def _words(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    """The bits of the entries. −0 and 0 differ here; an update makes one of the other only by leaving a trace."""
    return tensor.view(-1).view(torch.uint8).numpy().view(_WORDS[tensor.element_size()])


def _check_range(output: Output, exact: Tensor, after: Tensor) -> None:
    """No finite number became infinite."""
    if not after.is_floating_point() or torch.isfinite(after).all():
        return
    beyond = torch.isinf(after) & torch.isfinite(exact)
    if beyond.any():
        largest = float(exact[beyond].abs().max())
        raise UserError(
            f"tensor {output.name!r} would hold {largest:.6g}, beyond the largest number of "
            f"{CODES[output.kind]} ({torch.finfo(output.kind).max:.6g}); take --dtype bfloat16 or float32"
        )


def read_at(file: int, buffer: memoryview, offset: int, name: str) -> None:
    """Fill ``buffer`` from ``offset``.

    Raises:
        SourceError: the file ends before.
    """
    done = 0
    while done < len(buffer):
        got = os.preadv(file, [buffer[done:]], offset + done)
        if got == 0:
            raise SourceError(f"the base's file ends inside tensor {name!r}; it was changed while it was read")
        done += got


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
