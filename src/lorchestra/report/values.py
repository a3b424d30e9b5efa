"""Values of ``report.json`` as the page shows them, whatever shape they turn out to have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorchestra.report.drawing import ABSENT, finite, number

METRICS = {
    "nll": "Negative log-likelihood of a gold token, in nats",
    "accuracy": "Multiple-choice accuracy",
    "accuracy_normalised": "Multiple-choice accuracy, by log-probability per token",
    "preference_accuracy": "Preference accuracy",
    "preference_accuracy_normalised": "Preference accuracy, by log-probability per token",
    "loss_ratio": "Loss over the base's, mean over domains: what the verdict compares",
}
LOWER_IS_BETTER = {"nll", "loss_ratio"}


def metric_name(metric: str) -> str:
    """``loss``, ``accuracy``, ``preference accuracy``: a metric in a heading."""
    return "loss" if metric == "nll" else metric.replace("_", " ")


def duration(seconds: Any) -> str:
    """``2 h 05 min``, ``3 min 07 s``, ``4.2 s``."""
    if not finite(seconds):
        return ABSENT
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{seconds:.1f} s"


def percent(value: Any) -> str:
    """A share as ``62.5 %`` (with a no-break space)."""
    return f"{number(round(value * 100, 6), 3)} %" if finite(value) else number(value)


def measure(value: Any, metric: str, *, signed: bool = False) -> str:
    """A metric's value with the decimals that suit it: accuracies in percent (differences in points)."""
    if not finite(value):
        return ABSENT
    sign = "+z" if signed else "z"
    text = f"{value * 100:{sign}.1f}" if "accuracy" in metric else f"{value:{sign}.3f}"
    unit = "" if "accuracy" not in metric else " points" if signed else " %"
    return text.replace("-", "−") + unit


def between(low: Any, high: Any, metric: str, *, signed: bool = False) -> str:
    """The interval of a metric; empty without one."""
    if not (finite(low) and finite(high)):
        return ""
    ends = (measure(end, metric, signed=signed).removesuffix(" points").removesuffix(" %") for end in (low, high))
    return "[{}, {}]".format(*ends)


def mapping(value: Any) -> dict[str, Any]:
    """``value`` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON array; empty if it is something else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def strings(value: Any) -> list[str]:
    """A JSON array, or a single value, as texts."""
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in flat(inner, f"{path}.{key}" if path else key)]
    if isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        return [row for k, inner in enumerate(value) for row in flat(inner, f"{path}.{k}")]
    if isinstance(value, list):
        return [(path, ", ".join(_scalar(inner) for inner in value) or ABSENT)]
    return [(path, _scalar(value))] if path else []


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def facts(source: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """(label, text) of the keys that are there; a nested value becomes several rows."""
    out = []
    for key, label in names.items():
        value = source.get(key)
        if isinstance(value, (dict, list)):
            out += [
                (f"{label} {path}".strip(), text)
                for path, text in flat({"": value} if isinstance(value, list) else value)
            ]
        elif value is not None:
            out.append((label, ("yes" if value else "no") if isinstance(value, bool) else number(value, 4)))
    return out


def present(*texts: object) -> tuple[str, ...]:
    """The texts that are not empty."""
    return tuple(str(text) for text in texts if text)
