"""The comparison of models: key figures, and forest tables of estimates and of paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorchestra.report.drawing import finite, spanned
from lorchestra.report.figures import interval_strip
from lorchestra.report.values import LOWER_IS_BETTER, METRICS, between, measure, records, strings

_DELIVERED = ("delivered", "chosen", "fused")  # the first of these names among the models; else the last model
_KEY_METRICS = ("preference_accuracy", "accuracy", "nll")  # what a domain's key figure shows: the first it has
_WORDS = {"better": "better", "worse": "worse", "unclear": "no clear difference", "plain": ""}

Row = Mapping[str, Any]


class Comparison:
    """Models × domains × metrics of the sealed test.

    Args:
        data: ``evaluation`` of the report data.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        found = records(data.get("rows"))
        self.pairs = records(data.get("differences"))
        self.models = strings(data.get("models")) or _unique(found, "model")
        named = strings(data.get("domains"))  # first; beside them there is what all domains give together
        self.domains = list(dict.fromkeys([*named, *_unique([*found, *self.pairs], "domain")]))
        self.metrics = _ordered(_unique(found, "metric"))
        self.scores = {_key(row, "model", "domain", "metric"): row for row in found}
        self.changes = {_key(row, "a", "b", "domain", "metric"): row for row in self.pairs}
        self.base = "base" if "base" in self.models else (*self.models, "")[0]
        self.delivered = next((name for name in _DELIVERED if name in self.models), ("", *self.models)[-1])

    def tiles(self) -> list[dict[str, str]]:
        """The key figures: what the delivered model changes, domain by domain."""
        out = []
        for domain in self.domains if self.delivered != self.base else ():
            metric = next((m for m in _KEY_METRICS if (self.delivered, domain, m) in self.scores), None)
            if metric is None:
                continue
            before, after = (self.scores.get((m, domain, metric), {}) for m in (self.base, self.delivered))
            change = self.changes.get((self.delivered, self.base, domain, metric), {})
            out.append(
                {
                    "domain": domain,
                    "metric": METRICS[metric],
                    "before": measure(before.get("estimate"), metric),
                    "after": measure(after.get("estimate"), metric),
                    "change": measure(change.get("estimate"), metric, signed=True) if change else "",
                    "interval": between(change.get("low"), change.get("high"), metric, signed=True),
                    "kind": _kind(change, metric),
                    "word": _WORDS[_kind(change, metric)],
                }
            )
        return out

    def estimates(self) -> list[dict[str, Any]]:
        """One table a metric: rows are models, columns are domains, the line of a cell is the base."""
        out = []
        for metric in self.metrics:
            scores = {(m, d): row for (m, d, of), row in self.scores.items() if of == metric}
            columns = {}
            for domain in self.domains:
                column = {m: scores[m, domain] for m in self.models if (m, domain) in scores}
                reference = column.get(self.base, {}).get("estimate")
                span = _span(column.values())
                columns[domain] = {
                    model: _cell(row, metric, span, reference, self.changes.get((model, self.base, domain, metric), {}))
                    for model, row in column.items()
                }
                _mark_best(columns[domain], column, metric)
            hint = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
            rows = [(model, model == self.delivered != self.base) for model in self.models]
            out.append(_table(metric, hint, columns, rows))
        return [table for table in out if table["rows"]]

    def differences(self) -> list[dict[str, Any]]:
        """One table a metric: rows are pairs of models, columns are domains, the line of a cell is zero.

        Pairs with the base come last: the table of estimates already says how they turned out.
        """
        out = []
        for metric in _ordered(_unique(self.pairs, "metric")):
            changes = {(a, b, d): row for (a, b, d, of), row in self.changes.items() if of == metric}
            span = _span(changes.values(), include=(0.0,))
            names = sorted(dict.fromkeys((a, b) for a, b, _ in changes), key=lambda pair: pair[1] == self.base)
            columns = {
                domain: {
                    (a, b): _cell(changes[a, b, domain], metric, span, 0.0, changes[a, b, domain], signed=True)
                    for a, b in names
                    if (a, b, domain) in changes
                }
                for domain in self.domains
            }
            hint = "below zero is better" if metric in LOWER_IS_BETTER else "above zero is better"
            out.append(_table(metric, hint, columns, [(pair, False) for pair in names]))
        return [table for table in out if table["rows"]]


def _key(row: Row, *names: str) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in names)


def _unique(found: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(str(row.get(name)) for row in found))


def _ordered(metrics: Sequence[str]) -> list[str]:
    known = list(METRICS)
    return sorted(metrics, key=lambda m: (known.index(m) if m in METRICS else len(known), m))


def _span(found: Any, include: Sequence[float] = ()) -> tuple[float, float]:
    return spanned((row.get(key) for row in found for key in ("low", "estimate", "high")), include=include)


def _kind(change: Row, metric: str) -> str:
    """``better`` or ``worse`` if the interval of a − b leaves out zero, ``unclear`` if not; ``plain``: not compared."""
    low, high = change.get("low"), change.get("high")
    if not finite(low) or not finite(high):
        return "plain"
    if low <= 0 <= high:
        return "unclear"
    return "better" if (high < 0) == (metric in LOWER_IS_BETTER) else "worse"


def _cell(
    row: Row, metric: str, span: tuple[float, float], reference: Any, change: Row, *, signed: bool = False
) -> dict[str, Any]:
    kind = _kind(change, metric)
    at = reference if finite(reference) else None
    return {
        "text": measure(row.get("estimate"), metric, signed=signed),
        "interval": between(row.get("low"), row.get("high"), metric, signed=signed),
        "n": row.get("n"),
        "best": False,
        "kind": kind,
        "word": _WORDS[kind],
        "strip": interval_strip(row.get("estimate"), row.get("low"), row.get("high"), span, at, kind),
    }


def _mark_best(cells: Mapping[str, dict[str, Any]], column: Mapping[str, Row], metric: str) -> None:
    known = {model: row["estimate"] for model, row in column.items() if finite(row.get("estimate"))}
    best = (min if metric in LOWER_IS_BETTER else max)(known.values(), default=None)
    for model in known:
        cells[model]["best"] = known[model] == best


def _table(
    metric: str, hint: str, columns: Mapping[str, Mapping[Any, Any]], names: Sequence[tuple[Any, bool]]
) -> dict[str, Any]:
    shown = [domain for domain, column in columns.items() if column]
    rows = [
        {"name": name, "delivered": delivered, "cells": [columns[domain].get(name) for domain in shown]}
        for name, delivered in names
        if any(name in columns[domain] for domain in shown)
    ]
    return {"title": METRICS.get(metric, metric), "hint": hint, "domains": shown, "rows": rows}
