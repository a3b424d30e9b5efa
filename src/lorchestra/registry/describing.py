"""From an adapter to the fields of its manifest: what ``lorchestra.json`` tells, as the registry keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from lorchestra.registry.manifest import BaseEntry, FileEntry, Metric, ParentEntry

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter

DELIVERED = "delivered"
_HIGHER = ("accuracy", "score", "f1", "auc", "win", "match", "reward", "margin", "bleu", "rouge", "recall", "precision")
_NOT_MEASURED = ("best_step",)  # among the metrics of a stage, but where, not how good


def described(adapter: Adapter, files: Mapping[str, FileEntry], config: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's fields that the adapter itself tells.

    Args:
        adapter: as it was read.
        files: path → what was stored.
        config: its ``adapter_config.json``, for the scales.

    Raises:
        AdapterError: a scale that cannot be told.
    """
    from lorchestra.adapter.scales import module_scales

    lineage = adapter.lineage
    ranks = {path: update.rank for path, update in adapter.modules.items()}
    return {
        "digest": adapter.digest,
        "files": dict(files),
        "base": BaseEntry(**asdict(adapter.base)),
        "ranks": ranks,
        "scales": module_scales(config, ranks),
        "parameters": adapter.parameters,
        "made_by": lineage.made_by,
        "stage": lineage.name if lineage.made_by == "stage" else "",
        "task": lineage.task,
        "settings": dict(lineage.settings),
        "data": dict(lineage.data),
        "parents": [ParentEntry(**asdict(parent)) for parent in lineage.parents],
        "context": [ParentEntry(**asdict(parent)) for parent in lineage.context],
        "metrics": measured(lineage.metrics),
        "tools": dict(lineage.tools),
    }


def measured(told: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics among what a lineage tells: plain numbers, and tables with an estimate and its interval.

    A stage tells numbers (``validation_loss``), a department ``{"groups": …, "delivered": {"estimate": …, "low": …,
    "high": …, "n": …}}`` for each metric of its sealed test. What is no finite
    number is left out: nothing can be gated by it.
    """
    found = {}
    for name, value in told.items():
        if name in _NOT_MEASURED:
            continue
        metric = _number(name, value) if not isinstance(value, Mapping) else _table(name, value)
        if metric is not None:
            found[name] = metric
    return found


def direction(name: str) -> Literal["lower", "higher"]:
    """Which direction of a metric is better, by its name: accuracies and scores higher, losses lower."""
    return "higher" if any(word in name.lower() for word in _HIGHER) else "lower"


def _number(name: str, value: Any) -> Metric | None:
    if not _is_finite(value):
        return None
    return Metric(value=value, better=direction(name), split="validation" if name.startswith("validation") else "")


def _table(name: str, value: Mapping[str, Any]) -> Metric | None:
    """``{"estimate", "low", "high"}``, perhaps under ``delivered``; or a :class:`Metric` as JSON."""
    if set(value) <= set(Metric.model_fields) and _is_finite(value.get("value")):
        return Metric(**{"better": direction(name), **value})
    inner = value.get(DELIVERED)
    interval = inner if isinstance(inner, Mapping) else value
    if not _is_finite(interval.get("estimate")):
        return None
    ends = {end: interval[end] for end in ("low", "high") if _is_finite(interval.get(end))}
    groups = interval.get("n", value.get("groups"))
    return Metric(
        value=interval["estimate"],
        **ends,
        n=groups if isinstance(groups, int) else None,
        better=direction(name),
        split="sealed" if isinstance(inner, Mapping) else "",
        sealed=str(value.get("sealed", "")),
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
