"""Several adapters into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import concat
from lorchestra.errors import AdapterError, UserError
from lorchestra.fusion.core_space import CoreSpace


def linear(members: Mapping[str, Adapter], weights: Mapping[str, float], name: str = "fused") -> Adapter:
    """Σ λᵢ·ΔWᵢ exactly: factors stacked, rank Σrᵢ. Members at zero are left out.

    Obeys: gauge and order invariance, linearity in λ, ``fuse(a, 1) = a``.

    Args:
        members: name → adapter; modules and ranks may differ.
        weights: name → λ; a missing name counts as zero, negative values subtract.
        name: of the result, for its lineage.

    Raises:
        AdapterError: members of different bases, or whose shapes differ.
        UserError: an unknown name, a weight that is not finite, or nothing left to sum.
    """
    for key, weight in weights.items():
        if key not in members:
            raise UserError(f"weight for {key!r}, which is no member; members: {', '.join(members)}")
        if not math.isfinite(weight):
            raise UserError(f"the weight of {key!r} is {weight}; give a finite number")
    base = common_base(members)
    acting = [(key, adapter, float(weights[key])) for key, adapter in members.items() if weights.get(key, 0.0) != 0.0]
    if not acting:
        raise UserError("every weight is zero: the sum is the base itself, and there is nothing to write")
    modules = {}
    for path in sorted({path for _, adapter, _ in acting for path in adapter.modules}):
        parts = [(adapter.modules[path], weight) for _, adapter, weight in acting if path in adapter.modules]
        try:
            modules[path] = concat([part for part, _ in parts], [weight for _, weight in parts])
        except AdapterError as error:
            raise AdapterError(f"module {path!r}: {error}; the members belong to different bases") from error
    parents = tuple(Parent(key, adapter.digest, weight) for key, adapter, weight in acting)
    transposed = frozenset().union(*(adapter.transposed for _, adapter, _ in acting))
    return Adapter(modules, base, Lineage(made_by="fusion", name=name, task="linear", parents=parents), transposed)


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


def compress(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> tuple[Adapter, float]:
    """The best approximation at a lower rank, and the share of ‖ΔW‖² that it kept.

    Args:
        adapter: any.
        rank: at most this rank for every module.
        energy: or the lowest rank that keeps this share of each module's squared norm.

    Raises:
        UserError: neither bound, or a senseless one.
    """
    done = CoreSpace([adapter]).compress([1.0], rank, energy)
    settings = {**adapter.lineage.settings, "rank": rank, "energy": energy, "retained": done.retained}
    made = replace(adapter.lineage, settings=settings)
    return Adapter(done.modules, adapter.base, made, adapter.transposed), done.retained


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
