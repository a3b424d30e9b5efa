"""``sweep.html``: a sweep's table, plots and recommendation, as one self-contained page made of ``sweep.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorchestra.report.drawing import ABSENT, finite, number
from lorchestra.report.figures import Line, interval_strip, line_chart
from lorchestra.report.values import between, duration, mapping, measure, percent, records
from lorchestra.report.write import clean, document

MOST_LINES = 8  # colours of a chart
# Figure of a row → heading of its chart, and whether its axis begins at nought.
_CHARTS = (
    ("validation", "Validation loss of what was kept, nats a token", False),
    ("validation_spread", "Its standard deviation over seeds", True),
    ("gap", "Validation minus training loss at the end, nats a token", False),
    ("gradient", "Gradient norm before clipping, median over steps", False),
)


def render_sweep(data: Mapping[str, Any]) -> str:
    """The page as one HTML document; the same data gives the same text.

    Args:
        data: what ``sweep.json`` holds.
    """
    return document("sweep.html.j2", _view(clean(data)))


def _view(data: Mapping[str, Any]) -> dict[str, Any]:
    rows = records(data.get("rows"))
    spec = mapping(data.get("spec"))
    axes = list(mapping(spec.get("axes")))
    cells, total = len(records(data.get("cells"))), data.get("cells_in_all")
    metric = next((str(row["metric"]) for row in rows if row.get("metric")), "")
    advice = records(data.get("advice"))
    taken = [mapping(found.get("settings")) for found in advice]
    ends = [
        end for row in rows for end in (mapping(row.get("test")).get(key) for key in ("low", "high")) if finite(end)
    ]
    start = mapping(data.get("start"))
    base = sum(start["values"]) / sum(start["weights"]) if start else None
    span = (
        (min([*ends, base] if finite(base) else ends), max([*ends, base] if finite(base) else ends))
        if ends
        else (0.0, 1.0)
    )
    return {
        "title": str(spec.get("name") or "sweep"),
        "made": [text for text in (data.get("created"), f"lorchestra {data.get('lorchestra', '')}") if text],
        "unfinished": f"{cells} of {total} trainings are done" if finite(total) and cells < total else "",
        "advice": [
            {
                "data": _named(mapping(found.get("data"))),
                "sentence": found.get("sentence"),
                "rests": found.get("rests_on"),
            }
            for found in advice
        ],
        "axes": [axis.rpartition(".")[2] for axis in axes],
        "metric": metric.replace("_", " "),
        "base": measure(base, metric) if finite(base) else "",
        "rows": [_row(row, axes, metric, span, base, mapping(row.get("settings")) in taken) for row in rows],
        "charts": _charts(rows, axes, metric),
        "spec": json.dumps(spec, indent=1, ensure_ascii=False),
        "folds": data.get("folds"),
    }


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())


def _row(
    row: Mapping[str, Any], axes: Sequence[str], metric: str, span: tuple[float, float], base: float | None, taken: bool
) -> dict[str, Any]:
    test, settings = mapping(row.get("test")), mapping(row.get("settings"))
    spread, relative = row.get("validation_spread"), row.get("gradient_spread")
    return {
        "settings": [str(settings.get(axis)) for axis in axes],
        "taken": taken,
        "stability": _stability(row),
        "validation": number(row.get("validation"), 4),
        "spread": f"± {number(spread, 2)}" if finite(spread) else "",
        "gradient": number(row.get("gradient"), 3),
        "relative": f"± {percent(round(relative, 3))}" if finite(relative) else "",
        "test": measure(test.get("estimate"), metric),
        "interval": between(test.get("low"), test.get("high"), metric),
        "strip": interval_strip(test.get("estimate"), test.get("low"), test.get("high"), span, base, "unclear"),
        "gap": number(row.get("gap"), 3),
        "onset": f"from epoch {number(row['onset'], 2)}" if finite(row.get("onset")) else "",
        "rising": f"{row.get('rising')} of {row.get('done')}" if row.get("rising") else "",
        "trainable": number(row.get("trainable")),
        "seconds": duration(row.get("seconds")) if row.get("done") else ABSENT,
    }


def _stability(row: Mapping[str, Any]) -> str:
    """``3 of 3``, and what became of the others."""
    parts = [f"{row.get('done')} of {row.get('runs')}"]
    parts += [f"{row[key]} {key}" for key in ("diverged", "stopped") if row.get(key)]
    if (row.get("worse") or 0) > (row.get("diverged") or 0):
        parts.append(f"{row['worse'] - row['diverged']} ended above the start")
    return ", ".join(parts)


def _charts(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """Figures over the first axis of numbers; a line for each combination of the others."""
    across = next((axis for axis in axes if _is_scale(axis, rows)), None)
    if across is None:
        return []
    others = [axis for axis in axes if axis != across]
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        settings = mapping(row.get("settings"))
        series.setdefault(" · ".join(str(settings.get(axis)) for axis in others), []).append(row)
    named = list(series.items())[:MOST_LINES]
    keys = [{"name": name, "hue": hue} for hue, (name, _) in enumerate(named) if name]
    out = []
    charts = [("test", f"Test {metric.replace('_', ' ')}", False), *_CHARTS] if metric else _CHARTS
    for figure, title, floor in charts:
        lines = [
            Line.of(
                name or title,
                [(mapping(row["settings"])[across], _figure(row, figure)) for row in group],
                hue,
                dots=True,
            )
            for hue, (name, group) in enumerate(named)
        ]
        chart = line_chart(lines, title, floor=0.0 if floor else None, x_label=across.rpartition(".")[2])
        if chart:
            out.append({"title": title, "chart": chart, "keys": keys})
    return out


def _is_scale(axis: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    values = {json.dumps(mapping(row.get("settings")).get(axis)) for row in rows}
    return len(values) > 1 and all(finite(json.loads(value)) for value in values)


def _figure(row: Mapping[str, Any], figure: str) -> Any:
    return mapping(row.get("test")).get("estimate") if figure == "test" else row.get(figure)
