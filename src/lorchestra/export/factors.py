"""Factors in a narrower number format, and a PEFT directory of them: small, with the scale folded in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.directory import whole_directory
from lorchestra.adapter.lowrank import LowRank
from lorchestra.adapter.peft_format import CONFIG, WEIGHTS, read_peft, write_peft
from lorchestra.errors import TrainingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# ‖ΔW read back − ΔW‖ / ‖ΔW‖ that a format may give: both factors are rounded.
LIMITS = {"float32": 1e-5, "bfloat16": 0.01, "float16": 0.002, "q8_0": 0.03}


@dataclass(frozen=True)
class Exported:
    """An adapter that was written and read back.

    Args:
        directory: of it.
        size: of its weights, in bytes.
        rank: the highest.
        error: ‖ΔW read back − ΔW‖ / ‖ΔW‖.
    """

    directory: Path
    size: int
    rank: int
    error: float


def export_peft(adapter: Adapter, directory: Path, dtype: str = "float32") -> Exported:
    """Write a PEFT directory with ``lora_alpha = r`` and factors in ``dtype``, and check it.

    Raises:
        StorageError: the place is taken by something that is no adapter, or cannot be written.
        TrainingError: what was written does not give the adapter back; nothing is kept.
    """
    kind = DTYPES[dtype]
    narrow = adapter if kind == torch.float32 else replace(adapter, modules=_balanced(adapter))
    with whole_directory(directory, "the adapter", replaces=CONFIG) as partial:
        write_peft(narrow, partial, kind)
        error = difference(adapter, read_peft(partial).modules)
        if not error <= LIMITS[dtype]:
            raise TrainingError(
                f"the adapter read back differs by {error:.2%} of ‖ΔW‖ ({LIMITS[dtype]:.2%} is allowed in {dtype}). It "
                "is not kept"
            )
    size = (directory / WEIGHTS).stat().st_size
    return Exported(directory, size, max(update.rank for update in adapter.modules.values()), error)


def _balanced(adapter: Adapter) -> dict[str, LowRank]:
    return {path: LowRank(*balanced(update)) for path, update in adapter.modules.items()}


def balanced(update: LowRank) -> tuple[Tensor, Tensor]:
    """B ``[m, r]`` and A ``[r, n]`` of the same ΔW with entries of like size, by a power of two, which rounds nothing.

    Trained factors differ by orders of magnitude, and the small ones would fall out of float16's range.
    """
    size_B, size_A = (float(t.double().square().mean().sqrt()) for t in (update.B, update.A))
    if size_A == 0 or size_B == 0:
        return update.B, update.A
    power = 2.0 ** round(math.log2(size_A / size_B) / 2)
    return update.B * power, update.A / power


def difference(adapter: Adapter, found: Mapping[str, LowRank]) -> float:
    """‖ΔW′ − ΔW‖ / ‖ΔW‖ over all modules; absolute for ΔW = 0."""
    apart = math.fsum(_apart(found[path], update) for path, update in adapter.modules.items())
    whole = adapter.norm()
    return math.sqrt(apart) / whole if whole > 0 else math.sqrt(apart)


def _apart(found: LowRank, update: LowRank) -> float:
    """‖ΔW′ − ΔW‖² = ‖(B′ − B)A′ + B(A′ − A)‖²: no norms cancel if the factors are those that were rounded."""
    B, A = balanced(update)
    B_, A_ = balanced(found)
    if B_.shape != B.shape:
        return (found + -update).norm() ** 2
    return LowRank(torch.cat([B_ - B, B], 1), torch.cat([A_, A_ - A], 0)).norm() ** 2
