"""The parity law: a merged model answers as the base with its adapter does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.base.load import load_base

# Share of the adapter's own effect on the logits that a merge may disturb, in float32.
LIMIT = 0.05


@dataclass(frozen=True)
class Parity:
    """‖logits(merged) − logits(adapter)‖ and ‖logits(adapter) − logits(base)‖ over the same positions."""

    difference: float
    effect: float

    @property
    def ratio(self) -> float:
        """Share of the adapter's effect that differs; infinite if the adapter has none (a vacuous check)."""
        return self.difference / self.effect if self.effect > 0 else float("inf")

    @property
    def holds(self) -> bool:
        """Whether the law holds."""
        return self.ratio <= LIMIT

    @classmethod
    def of(cls, base: Sequence[Tensor], adapted: Sequence[Tensor], merged: Sequence[Tensor]) -> Parity:
        """From the three models' logits, each a list of ``[L, vocabulary]``."""
        difference = sum(float((m - a).double().square().sum()) for m, a in zip(merged, adapted, strict=True)) ** 0.5
        effect = sum(float((a - b).double().square().sum()) for a, b in zip(adapted, base, strict=True)) ** 0.5
        return cls(difference, effect)


@torch.no_grad()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits ``[L, vocabulary]`` float32 on the CPU of every position of every prompt, one forward pass each."""
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in prompts]


def merged_parity(
    base: Path,
    merged: Path,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    prompts: Sequence[Sequence[int]],
    device: str = "auto",
) -> Parity:
    """Compare a merged model directory with the base + adapters that it was made from.

    In float32, with one model in memory at a time.

    Args:
        base: the directory that was merged into.
        merged: what came of it.
        adapters: name → adapter.
        weights: their coefficients in the merge.
        prompts: token ids; a few real ones are enough.
        device: see :func:`lorchestra.base.load.choose_device`.
    """
    plain, adapted = _logits(base, device, adapters, [{}, weights], prompts)
    return Parity.of(plain, adapted, _logits(merged, device, {}, [{}], prompts)[0])


def _logits(
    directory: Path,
    device: str,
    adapters: Mapping[str, Adapter],
    mixtures: Sequence[Mapping[str, float]],
    prompts: Sequence[Sequence[int]],
) -> list[list[Tensor]]:
    """Logits of every prompt, once for each mixture."""
    bank = Bank(load_base(directory, device=device, dtype="float32").model)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    out = []
    for mixture in mixtures:
        with bank.using(mixture):
            out.append(logits_of(bank.model, prompts))
    return out
