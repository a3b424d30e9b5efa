"""Sums of adapters, exactly: factors are stacked and nothing else happens to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import LowRank, concat
from lorchestra.errors import AdapterError, UserError

# Name, adapter and λ of a member whose λ is not zero.
Acting = tuple[str, Adapter, float]


def linear(members: Mapping[str, Adapter], weights: Mapping[str, float], name: str = "fused") -> Adapter:
    """Σ λᵢ·ΔWᵢ: rank Σrᵢ, exact. Members at zero are left out. Negative λ subtract.

    Ilharco et al. 2022, Editing Models with Task Arithmetic, https://arxiv.org/abs/2212.04089.

    Args:
        members: name → adapter; modules and ranks may differ.
        weights: name → λ; a missing name counts as zero.
        name: of the result, for its lineage.

    Raises:
        AdapterError: members of different bases, or whose shapes differ.
        UserError: an unknown name, a weight that is not finite, or nothing left to sum.
    """
    return _sum(acting_members(members, weights), "linear", name)


def average(members: Mapping[str, Adapter], weights: Mapping[str, float], name: str = "fused") -> Adapter:
    """Σ λᵢ·ΔWᵢ / Σ λᵢ: weights as shares; equal ones give the mean. Exact. A module that a member lacks counts as 0.

    Wortsman et al. 2022, Model Soups, https://arxiv.org/abs/2203.05482.

    Raises:
        AdapterError, UserError: as :func:`linear`; or the weights sum to zero.
    """
    acting = acting_members(members, weights)
    total = sum(weight for *_, weight in acting)
    if abs(total) <= 1e-12 * max(abs(weight) for *_, weight in acting):
        raise UserError("these weights sum to zero, so there is no average; use linear, or other weights")
    return _sum([(key, adapter, weight / total) for key, adapter, weight in acting], "average", name)


def subtract(members: Mapping[str, Adapter], weights: Mapping[str, float], name: str = "fused") -> Adapter:
    """λ₁·ΔW₁ − Σ_{i>1} λᵢ·ΔWᵢ: the first member without the others. Exact.

    With λᵢ > 0 for an adapter of what is to be unlearnt this is task negation (Ilharco et al. 2022, section 3,
    https://arxiv.org/abs/2212.04089). To negate one adapter alone, give it a negative λ in :func:`linear`.

    Raises:
        AdapterError, UserError: as :func:`linear`; or there is nothing to subtract.
    """
    if len(members) < 2:
        raise UserError("subtract takes the others from the first adapter, so it needs two or more; to negate one, use "
                        "linear with a negative weight")  # fmt: skip
    first = next(iter(members))
    acting = acting_members(members, weights)
    signed = [(key, adapter, weight if key == first else -weight) for key, adapter, weight in acting]
    return _sum(signed, "subtract", name)


def fuse(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """:func:`linear` for a list: Σ λᵢ·ΔWᵢ of ``adapters`` with ``weights``.

    Raises:
        UserError: not one weight per adapter; and as :func:`linear`.
        AdapterError: as :func:`linear`.
    """
    if len(adapters) != len(weights):
        raise UserError(f"{len(adapters)} adapters need as many weights; got {len(weights)}")
    names = [adapter.lineage.name or f"adapter{i}" for i, adapter in enumerate(adapters)]
    unique = [f"{name}#{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return linear(dict(zip(unique, adapters, strict=True)), dict(zip(unique, weights, strict=True)))


def acting_members(members: Mapping[str, Adapter], weights: Mapping[str, float]) -> list[Acting]:
    """The members whose λ is not zero, after every check that concerns them all.

    Raises:
        AdapterError: members of different bases, or whose shapes differ.
        UserError: an unknown name, a weight that is not finite, or none but zeros.
    """
    for key, weight in weights.items():
        if key not in members:
            raise UserError(f"weight for {key!r}, which is no member; members: {', '.join(members)}")
        if not math.isfinite(weight):
            raise UserError(f"the weight of {key!r} is {weight}; give a finite number")
    common_base(members)
    acting = [(key, adapter, float(weights[key])) for key, adapter in members.items() if weights.get(key, 0.0) != 0.0]
    if not acting:
        raise UserError("every weight is zero: the sum is the base itself, and there is nothing to write")
    _check_shapes(acting)
    return acting


def fused_adapter(
    acting: Sequence[Acting],
    modules: Mapping[str, LowRank],
    task: str,
    name: str,
    settings: Mapping[str, Any] | None = None,
) -> Adapter:
    """``modules`` as the fusion of ``acting``: their base, flags and digests; ``settings`` are how it was made."""
    lineage = Lineage(
        made_by="fusion",
        name=name,
        task=task,
        parents=tuple(Parent(key, adapter.digest, weight) for key, adapter, weight in acting),
        settings=settings or {},
    )
    adapters = [adapter for _, adapter, _ in acting]
    return Adapter(
        modules,
        common_base({key: adapter for key, adapter, _ in acting}),
        lineage,
        frozenset().union(*(adapter.transposed for adapter in adapters)),
        frozenset().union(*(adapter.embeddings for adapter in adapters)),
    )


def common_base(members: Mapping[str, Adapter]) -> BaseId:
    """The base of all members.

    Raises:
        AdapterError: two name different weights.
    """
    known = {name: adapter.base for name, adapter in members.items() if adapter.base.weights}
    if len({base.weights for base in known.values()}) > 1:
        listed = "; ".join(f"{name}: {base.name or base.weights[:19]}" for name, base in known.items())
        raise AdapterError(f"these adapters belong to different bases and cannot be summed ({listed})")
    return next(iter(known.values()), next(iter(members.values())).base)


def _sum(acting: Sequence[Acting], task: str, name: str) -> Adapter:
    modules = {}
    for path in sorted({path for _, adapter, _ in acting for path in adapter.modules}):
        parts = [(adapter.modules[path], weight) for _, adapter, weight in acting if path in adapter.modules]
        modules[path] = concat([part for part, _ in parts], [weight for _, weight in parts])
    return fused_adapter(acting, modules, task, name)


def _check_shapes(acting: Sequence[Acting]) -> None:
    """Every module has one shape, whoever changes it."""
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    for key, adapter, _ in acting:
        for path, update in adapter.modules.items():
            other, shape = seen.setdefault(path, (key, update.shape))
            if shape != update.shape:
                raise AdapterError(
                    f"module {path!r}: {other} changes a weight of shape {shape}, {key} one of {update.shape}; the "
                    "members belong to different bases"
                )
