"""``departments.html``: what became of every department, as one self-contained page made of ``departments.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorchestra.errors import counted
from lorchestra.report.drawing import ABSENT, finite, number
from lorchestra.report.figures import interval_strip
from lorchestra.report.values import between, duration, mapping, measure, metric_name, records, strings
from lorchestra.report.write import clean, document


def render_departments(data: Mapping[str, Any]) -> str:
    """The page as one HTML document; the same data gives the same text.

    Args:
        data: what ``departments.json`` holds.
    """
    return document("departments.html.j2", _view(clean(data)))


def _view(data: Mapping[str, Any]) -> dict[str, Any]:
    departments = {name: mapping(found) for name, found in mapping(data.get("departments")).items()}
    total = data.get("departments_in_all")
    context = bool(data.get("context"))
    over = "over_shared" if context else "over_base"
    tests = {name: _test(found) for name, found in departments.items()}
    metrics = list(dict.fromkeys(str(test["metric"]) for test in tests.values() if test))
    spans = {
        metric: _span([test for test in tests.values() if test.get("metric") == metric], over) for metric in metrics
    }
    done = sum(found.get("state") == "done" for found in departments.values())
    return {
        "title": f"{data.get('recipe') or 'recipe'}: departments",
        "made": [text for text in (data.get("created"), f"lorchestra {data.get('lorchestra', '')}") if text],
        "unfinished": f"{len(departments)} of {total} are done" if finite(total) and len(departments) < total else "",
        "summary": f"{done} of {len(departments)} delivered",
        "context": context,
        "columns": 12 if context else 11,
        "metric": metric_name(metrics[0]) if len(metrics) == 1 else "",
        "rows": [_row(name, found, tests[name], spans, over, len(metrics) > 1) for name, found in departments.items()],
        "base": mapping(data.get("base")),
        "shared": mapping(data.get("shared")),
        "left_out": strings(data.get("left_out")),
    }


def _test(found: Mapping[str, Any]) -> dict[str, Any]:
    """The telling metric; empty without a test."""
    return next(iter(records(found.get("tests"))), {})


def _span(tests: list[dict[str, Any]], over: str) -> tuple[float, float]:
    """The axis on which the differences ``over`` of one metric are drawn; nought is on it."""
    ends = [
        float(end)
        for test in tests
        for end in (mapping(test.get(over)).get(key) for key in ("low", "high"))
        if finite(end)
    ]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if low < high else (low - 1.0, high + 1.0)


def _row(
    name: str,
    found: Mapping[str, Any],
    test: Mapping[str, Any],
    spans: Mapping[str, tuple[float, float]],
    compared: str,
    named: bool,
) -> dict[str, Any]:
    metric = str(test.get("metric", ""))
    models = {model: mapping(test.get(model)) for model in ("base", "shared", "delivered")}
    over = mapping(test.get(compared))
    estimate, low, high = (over.get(key) for key in ("estimate", "low", "high"))
    warnings = strings(found.get("warnings"))
    warned = counted(len(warnings), "warning")
    said = [f"{key} {value}" for key, value in mapping(found.get("settings")).items() if key not in ("name", "data")]
    return {
        "name": name,
        "state": found.get("state"),
        "settings": ", ".join(said),
        "examples": number(mapping(found.get("examples")).get("train")),
        "validation": _validation(found),
        "metric": f" ({metric_name(metric)})" if named and metric else "",
        "base": measure(models["base"].get("estimate"), metric) if metric else ABSENT,
        "shared": measure(models["shared"].get("estimate"), metric) if metric else ABSENT,
        "delivered": measure(models["delivered"].get("estimate"), metric) if metric else ABSENT,
        "interval": between(models["delivered"].get("low"), models["delivered"].get("high"), metric),
        "over": measure(estimate, metric, signed=True) if metric else ABSENT,
        "over_interval": between(low, high, metric, signed=True),
        "strip": interval_strip(estimate, low, high, spans[metric], 0.0, _kind(low, high, metric)) if metric else "",
        "trainable": number(found.get("trainable") or None),
        "seconds": duration(found.get("seconds")) if found.get("state") == "done" else ABSENT,
        "remarks": [line for line in strings(found.get("remarks")) if line != warned],
        "warned": warned,
        "warnings": warnings,
        "digest": str(found.get("digest") or ""),
        "adapter": found.get("adapter"),
    }


def _validation(found: Mapping[str, Any]) -> str:
    """``3.109 → 2.188``; a dash where the stage was not trained, or has no validation examples."""
    before, after = (found.get(key) for key in ("before", "after"))
    return f"{measure(before, 'nll')} → {measure(after, 'nll')}" if finite(before) or finite(after) else ABSENT


def _kind(low: object, high: object, metric: str) -> str:
    if not (finite(low) and finite(high)) or low <= 0.0 <= high:
        return "unclear"
    return "better" if (high < 0.0) == (metric == "nll") else "worse"
