"""The context of a stage: earlier adapters, frozen, at a weight that may follow a schedule (the curriculum)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorchestra.train.settings import ContextMember


def weight_at(member: ContextMember, progress: float) -> float:
    """The member's weight when a fraction ``progress`` ∈ [0, 1] of the training is done."""
    if member.schedule == "constant":
        return member.weight
    if member.schedule == "step":
        return member.weight if progress < member.start else member.to
    t = min(max((progress - member.start) / (member.end - member.start), 0.0), 1.0)
    if member.schedule == "cosine":
        t = (1 - math.cos(math.pi * t)) / 2
    return member.weight + (member.to - member.weight) * t


def progress_at(step: int, steps: int) -> float:
    """How much of the training is done at ``step`` (from 0) of ``steps``: 0 at the first, 1 at the last.

    So the last step trains at the weights that validation and the lineage speak of. A single step trains at the first.
    """
    return step / (steps - 1) if steps > 1 else 0.0


def weights_at(context: Mapping[str, ContextMember], progress: float) -> dict[str, float]:
    """Name → weight of the whole context at ``progress``."""
    return {name: weight_at(member, progress) for name, member in context.items()}


def first_weights(context: Mapping[str, ContextMember]) -> dict[str, float]:
    """As the stage starts: the weights of the preference reference."""
    return weights_at(context, 0.0)


def final_weights(context: Mapping[str, ContextMember]) -> dict[str, float]:
    """As the schedules end: validation runs at these, and they go into the lineage."""
    return weights_at(context, 1.0)
