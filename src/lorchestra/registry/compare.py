"""Two versions side by side: settings, data, metrics, and how far apart their weights are.

Distances are of ΔW and not of its factors, so (B M, M⁻¹ A) gives the same. ΔW₁ − ΔW₂ = [B₁ −B₂]·[A₁; A₂]: its norm is
that of its singular values, from a QR of the factors alone, and loses nothing to cancellation where two versions are
nearly equal (⟨·,·⟩ of the three terms would).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.errors import AdapterError

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.registry.manifest import Manifest, Metric, ParentEntry
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Version


@dataclass(frozen=True)
class Change:
    """One entry that differs: ``key`` is a path (``lora.rank``), and ``None`` stands for "not there"."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True)
class MetricPair:
    """One metric of both versions.

    Args:
        key: its name.
        before, after: ``None`` where a version does not have it.
        change: after − before; ``None`` unless both are there.
        verdict: ``better`` or ``worse`` where the intervals do not meet; ``unclear`` where they do, or where a version
            has none; ``other test`` where the two were measured on different sealed items; ``one only``.
    """

    key: str
    before: Metric | None
    after: Metric | None
    change: float | None
    verdict: str


@dataclass(frozen=True)
class ModuleDistance:
    """One module that both change.

    Args:
        path: of it.
        relative: ‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖ (Frobenius); ``None`` for ΔW₁ = 0.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖); ``None`` where one of them is zero.
        norms: (‖ΔW₁‖, ‖ΔW₂‖).
        difference: ‖ΔW₁ − ΔW₂‖.
    """

    path: str
    relative: float | None
    cosine: float | None
    norms: tuple[float, float]
    difference: float


@dataclass(frozen=True)
class Distance:
    """How far apart the weights are, over all modules that either changes.

    Args:
        relative: ‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖; ``None`` for ΔW₁ = 0.
        cosine: of all modules together; ``None`` where one adapter is zero.
        norms: (‖ΔW₁‖, ‖ΔW₂‖).
        modules: those that both change, the largest difference first.
        only: modules that only the first, only the second changes.
    """

    relative: float | None
    cosine: float | None
    norms: tuple[float, float]
    modules: tuple[ModuleDistance, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Comparison:
    """Everything in which two versions differ.

    Args:
        before, after: references (``clinic@v1``).
        same: whether they hold the same weights.
        base, settings, data, lineage, serving, tools: entries that differ.
        metrics: all, in both or in one.
        distance: of the weights.
    """

    before: str
    after: str
    same: bool
    base: tuple[Change, ...]
    settings: tuple[Change, ...]
    data: tuple[Change, ...]
    lineage: tuple[Change, ...]
    serving: tuple[Change, ...]
    tools: tuple[Change, ...]
    metrics: tuple[MetricPair, ...]
    distance: Distance

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        told = asdict(self)
        for pair, row in zip(self.metrics, told["metrics"], strict=True):
            row["before"] = pair.before.model_dump() if pair.before else None
            row["after"] = pair.after.model_dump() if pair.after else None
        return told


def compare_held(registry: Registry, before: str, after: str) -> Comparison:
    """:func:`compare` for two references of a registry, whose weights are read and verified.

    Raises:
        UnknownReferenceError: one of them leads nowhere.
        AdapterError: as :func:`compare`.
    """
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.registry.store.contents import write

    versions = registry.resolve(before), registry.resolve(after)
    with tempfile.TemporaryDirectory(prefix="lorchestra-diff-") as place:
        adapters = []
        for k, version in enumerate(versions):  # revoked ones too: what was wrong with it may be the question
            adapters.append(Adapter.load(write(version.manifest.files, registry.blobs, Path(place) / str(k))))
    return compare(*versions, (adapters[0], adapters[1]))


def compare(before: Version, after: Version, adapters: tuple[Adapter, Adapter]) -> Comparison:
    """What ``after`` has that ``before`` has not, and the other way round.

    Args:
        before, after: the versions.
        adapters: their weights.

    Raises:
        AdapterError: a module has different shapes in the two: they belong to different bases.
    """
    one, two = before.manifest, after.manifest
    return Comparison(
        one.reference,
        two.reference,
        one.digest == two.digest,
        _changes(one.base.model_dump(), two.base.model_dump()),
        _changes(_made(one), _made(two)),
        _changes(one.data, two.data),
        _changes(_lineage(one), _lineage(two)),
        _changes(one.serving, two.serving),
        _changes(one.tools, two.tools),
        tuple(_metric(key, one.metrics.get(key), two.metrics.get(key)) for key in sorted({*one.metrics, *two.metrics})),
        distance(*adapters),
    )


def distance(first: Adapter, second: Adapter) -> Distance:
    """How far apart two adapters are, from their factors; no m×n matrix is formed.

    Raises:
        AdapterError: a module has different shapes in the two.
    """
    modules, inner = [], 0.0
    one, two = first.modules, second.modules
    for path in sorted(one.keys() & two.keys()):
        a, b = one[path], two[path]
        if a.shape != b.shape:
            raise AdapterError(
                f"module {path!r} has an update of shape {a.shape} in the first and {b.shape} in the second; these "
                "versions belong to different bases and have no distance"
            )
        norms, met = (a.norm(), b.norm()), a.inner(b)
        apart = float((a + -b).singular_values().norm())
        inner += met
        modules.append(ModuleDistance(path, _ratio(apart, norms[0]), _cosine(met, norms), norms, apart))
    only = (tuple(sorted(one.keys() - two.keys())), tuple(sorted(two.keys() - one.keys())))
    whole = (first.norm(), second.norm())
    alone = [
        adapter.modules[path].norm() for adapter, paths in zip((first, second), only, strict=True) for path in paths
    ]
    apart = math.sqrt(math.fsum([*(module.difference**2 for module in modules), *(size**2 for size in alone)]))
    modules.sort(key=lambda module: (-module.difference, module.path))
    return Distance(_ratio(apart, whole[0]), _cosine(inner, whole), whole, tuple(modules), only)


def _ratio(size: float, of: float) -> float | None:
    return size / of if of > 0 else None


def _cosine(inner: float, norms: tuple[float, float]) -> float | None:
    size = norms[0] * norms[1]
    return max(-1.0, min(1.0, inner / size)) if size > 0 else None


def _made(manifest: Manifest) -> dict[str, Any]:
    """How it was made, ranks and scales included; those that are the same everywhere as one number."""
    return {
        "made_by": manifest.made_by,
        "stage": manifest.stage,
        "task": manifest.task,
        "parameters": manifest.parameters,
        "ranks": _one(manifest.ranks),
        "scales": _one(manifest.scales),
        "settings": manifest.settings,
        "recipe": manifest.recipe,
    }


def _one(values: Mapping[str, Any]) -> Any:
    found = set(values.values())
    return found.pop() if len(found) == 1 else values


def _lineage(manifest: Manifest) -> dict[str, Any]:
    found = {"parents": _weights(manifest.parents), "context": _weights(manifest.context)}
    return {kind: weights for kind, weights in found.items() if weights}


def _weights(entries: list[ParentEntry]) -> dict[str, float]:
    """``name (digest)`` → coefficient: another digest under the same name is another parent."""
    return {f"{entry.name} ({entry.digest[7:19]})": entry.coefficient for entry in entries}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Change, ...]:
    one, two = dict(flat(before)), dict(flat(after))
    return tuple(
        Change(key, one.get(key), two.get(key)) for key in sorted({*one, *two}) if _told(one, key) != _told(two, key)
    )


def _told(values: Mapping[str, Any], key: str) -> tuple[bool, bool, Any]:
    """What makes two leaves the same; true is not 1, and what is not there is not null."""
    return key in values, isinstance(values.get(key), bool), values.get(key)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path → leaf of nested mappings and lists: ``lora.rank``, ``stages.0.name``; a null is the text ``null``."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for k, inner in enumerate(value):
            yield from flat(inner, f"{path}.{k}" if path else str(k))
    elif path:
        yield path, "null" if value is None else value


def _metric(key: str, before: Metric | None, after: Metric | None) -> MetricPair:
    if before is None or after is None:
        return MetricPair(key, before, after, None, "one only")
    return MetricPair(key, before, after, after.value - before.value, _verdict(before, after))


def _verdict(before: Metric, after: Metric) -> str:
    if before.sealed != after.sealed or before.split != after.split or before.better != after.better:
        return "other test"
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return "unclear"
    if after.high < before.low:
        return "better" if after.better == "lower" else "worse"
    if after.low > before.high:
        return "worse" if after.better == "lower" else "better"
    return "unclear"
