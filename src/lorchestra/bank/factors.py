"""How the factors of a row lie in memory: one flat piece, group by group of modules with the same input.

Axis letters: n in_features, m out_features, R rank of a row, g modules of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

SMALLEST = 8  # ranks are rounded up to this times a power of two


@dataclass(frozen=True)
class Group:
    """Linear modules that have the same input.

    Args:
        paths: of the modules.
        inputs: n.
        outputs: m of each.
    """

    paths: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RowFactors:
    """A sum Σ c·ΔW laid out for a row.

    Args:
        rank: of the store it goes to; 0 where it is the base.
        flat: all factors, coefficients folded into B, padded with zeros to ``rank``.
    """

    rank: int
    flat: Tensor

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return self.flat.numel() * self.flat.element_size()


@dataclass(frozen=True)
class Place:
    """Where a group lies in a flat piece, for one rank: offsets of A ``[g·R, n]`` and of each B ``[R, m]``."""

    A: int
    B: tuple[int, ...]


def layout(groups: Sequence[Group], rank: int) -> tuple[list[Place], int]:
    """Where each group's factors lie, and the length of a flat piece."""
    places, at = [], 0
    for group in groups:
        A = at
        at += group.inputs * rank * len(group.paths)
        Bs = []
        for m in group.outputs:
            Bs.append(at)
            at += rank * m
        places.append(Place(A, tuple(Bs)))
    return places, at


def rounded(rank: int) -> int:
    """Up to ``SMALLEST`` times a power of two; 0 stays."""
    found = SMALLEST if rank else 0
    while found < rank:
        found *= 2
    return found


def groups_of(shapes: Mapping[str, tuple[int, int]]) -> tuple[Group, ...]:
    """A group for each module, where nothing is known about shared inputs.

    Args:
        shapes: module path → ``(m, n)``.
    """
    return tuple(Group((path,), n, (m,)) for path, (m, n) in shapes.items())
