"""``sweep.html``: a sweep's table, plots and recommendation, as one self-contained page made of ``sweep.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorchestra.report.drawing import ABSENT, finite, number
from lorchestra.report.figures import Line, interval_strip, line_chart
from lorchestra.report.values import between, duration, mapping, measure, metric_name, percent, records
from lorchestra.report.write import clean, document

MOST_LINES = 8  # colours of a chart
# Figure of a row → heading of its chart, and whether its axis begins at nought.
_CHARTS = (
    ("failed", "Stability: trainings that diverged or ended above the start", True),
    ("validation_spread", "Stability: standard deviation of the validation loss over seeds", True),
    ("test", "Test {metric}, mean over seeds", False),
    ("gap", "Overfitting: validation minus training loss at the end, nats a token", False),
    ("validation", "Validation loss of what was kept, nats a token", False),
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
    taken = [mapping(found["settings"]) for found in advice if found.get("settings") is not None]
    ends = [
        end for row in rows for end in (mapping(row.get("test")).get(key) for key in ("low", "high")) if finite(end)
    ]
    base = _start(mapping(data.get("start")))
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
        "metric": metric_name(metric),
        "base": measure(base, metric) if finite(base) else "",
        "rows": [_row(row, axes, metric, span, base, mapping(row.get("settings")) in taken) for row in rows],
        "readings": data.get("readings"),
        **_charts(rows, axes, metric),
        "spec": json.dumps(spec, indent=1, ensure_ascii=False),
        "folds": data.get("folds"),
    }


def _start(scores: Mapping[str, Any]) -> float | None:
    """The test score before training."""
    values, weights = ([x for x in scores.get(key) or () if finite(x)] for key in ("values", "weights"))
    return sum(values) / sum(weights) if values and len(values) == len(weights) and sum(weights) else None


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in settings.items())


def _shown(value: Any) -> str:
    """A setting's value: ranks without thousands, learning rates short; of a mapping all that is in it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(count: Any) -> str:
    """``4.88 M``, ``1,856``."""
    return f"{number(count / 1e6, 3)} M" if finite(count) and count >= 1e6 else number(count)


def _row(
    row: Mapping[str, Any], axes: Sequence[str], metric: str, span: tuple[float, float], base: float | None, taken: bool
) -> dict[str, Any]:
    test, settings = mapping(row.get("test")), mapping(row.get("settings"))
    spread, relative = row.get("validation_spread"), row.get("gradient_spread")
    return {
        "settings": [_shown(settings.get(axis)) for axis in axes],
        "taken": taken,
        "stability": _stability(row),
        "validation": measure(row.get("validation"), "nll"),
        "spread": f"± {number(spread, 2)}" if finite(spread) else "",
        "gradient": number(row.get("gradient"), 3),
        "relative": f"± {percent(round(relative, 3))}" if finite(relative) else "",
        "test": measure(test.get("estimate"), metric),
        "interval": between(test.get("low"), test.get("high"), metric),
        "strip": interval_strip(test.get("estimate"), test.get("low"), test.get("high"), span, base, "unclear"),
        "gap": measure(row.get("gap"), "nll"),
        "onset": f"epoch {number(row['onset'], 2)}" if finite(row.get("onset")) else "",
        "rising": f"{row.get('rising')} of {row.get('done')}" if row.get("rising") else "",
        "trainable": _short(row.get("trainable")),
        "seconds": duration(row.get("seconds")) if row.get("done") else ABSENT,
    }


def _stability(row: Mapping[str, Any]) -> str:
    """``3 of 3``, and what became of the others."""
    parts = [f"{row.get('done')} of {row.get('runs')}"]
    parts += [f"{row[key]} {key}" for key in ("diverged", "stopped") if row.get(key)]
    if (row.get("worse") or 0) > (row.get("diverged") or 0):
        parts.append(f"{row['worse'] - row['diverged']} ended above the start")
    return ", ".join(parts)


def _charts(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], metric: str) -> dict[str, Any]:
    """Figures over the first axis of numbers; a line for each combination of the others, with one legend for all."""
    across = next((axis for axis in axes if _is_scale(axis, rows)), None)
    if across is None:
        return {"charts": [], "legend": [], "left_out": 0}
    others = [axis for axis in axes if axis != across]
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        settings = mapping(row.get("settings"))
        series.setdefault(" · ".join(_shown(settings.get(axis)) for axis in others), []).append(row)
    named = list(series.items())[:MOST_LINES]
    values = sorted({float(mapping(row.get("settings"))[across]) for row in rows})
    charts = []
    for figure, title, floor in _CHARTS:
        title = title.format(metric=metric_name(metric))
        lines = [
            Line.of(
                name or across.rpartition(".")[2],
                [(mapping(row["settings"])[across], _figure(row, figure)) for row in _along(group, across)],
                hue,
                dots=True,
            )
            for hue, (name, group) in enumerate(named)
        ]
        if figure == "failed" and not any(y for line in lines for _, y in line.points):
            continue
        chart = line_chart(lines, title, floor=0.0 if floor else None, x_label=across.rpartition(".")[2], values=values)
        if chart:
            charts.append({"title": title, "chart": chart})
    legend = [{"name": name, "hue": hue} for hue, (name, _) in enumerate(named) if name]
    return {"charts": charts, "legend": legend, "left_out": len(series) - len(named)}


def _along(group: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    return sorted(group, key=lambda row: float(mapping(row["settings"])[axis]))


def _is_scale(axis: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    values = [mapping(row.get("settings")).get(axis) for row in rows]
    return all(map(finite, values)) and len(set(values)) > 1


def _figure(row: Mapping[str, Any], figure: str) -> float | None:
    """What a chart draws of a row; means over the survivors of a setting that diverged would flatter it."""
    if figure == "failed":
        return (row.get("worse") or 0) / row["runs"] if row.get("runs") else None
    if row.get("diverged"):
        return None
    value = mapping(row.get("test")).get("estimate") if figure == "test" else row.get(figure)
    return value if finite(value) else None
