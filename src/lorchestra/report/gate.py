"""The gate as the page shows it: verdict, table, mean coefficients by domain, some prompts with their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lorchestra.report.comparison import Comparison
from lorchestra.report.drawing import finite, number, spanned
from lorchestra.report.figures import Line, bar, interval_strip, line_chart
from lorchestra.report.heatmap import matrix, share, signed
from lorchestra.report.values import facts, mapping, percent, records, strings

_FACTS = {
    "activation": "Activation", "layers": "Layers that are read", "last_token": "Reads the last token too",
    "hidden": "Hidden units", "groups": "Groups of layers", "top_k": "Adapters that act at most",
    "none": "May choose none", "temperature": "Temperature", "prompts": "Training prompts",
    "parameters": "Numbers it learns", "seconds": "Seconds to fit", "digest": "Digest",
}  # fmt: skip
_LONGEST = 600  # characters of a prompt


def gate_section(gate: Mapping[str, Any], hues: Mapping[str, int]) -> dict[str, Any]:
    """Empty where there was no gate."""
    if not (gate.get("sentence") or gate.get("evaluation")):
        return {}
    comparison = Comparison(mapping(gate.get("evaluation")))
    means = {domain: mapping(row) for domain, row in mapping(gate.get("means")).items()}
    members = strings(gate.get("members")) or list(dict.fromkeys(name for row in means.values() for name in row))
    prompts = records(gate.get("prompts"))
    longest = max(
        (abs(c) for row in prompts for c in mapping(row.get("coefficients")).values() if finite(c)), default=0
    )
    return {
        "sentence": str(gate.get("sentence") or ""),
        "kept": gate.get("kept") is True,
        "notes": strings(gate.get("notes")),
        "warnings": strings(gate.get("warnings")),
        "reads": [f"{r.get('domain', '')} {number(r.get('reads'))}×" for r in records(gate.get("ledger"))],
        "tables": comparison.estimates(),
        "differences": comparison.differences(),
        "map": _map(means, members),
        "own": [
            (domain, percent(row["estimate"]), _ends(row))
            for domain, row in mapping(gate.get("own")).items()
            if finite(mapping(row).get("estimate"))
        ],
        "candidates": _candidates(records(gate.get("candidates"))),
        "chart": _chart(records(gate.get("history"))),
        "facts": facts(mapping(gate.get("settings")), _FACTS),
        "members": [(name, hues.get(name, 0)) for name in members],
        "prompts": [_prompt(row, members, hues, longest) for row in prompts],
    }


def _map(means: Mapping[str, Mapping[str, Any]], members: Sequence[str]) -> Markup:
    values = {(domain, name): row.get(name) for domain, row in means.items() for name in members}
    known = [value for value in values.values() if finite(value)]
    if not known:
        return Markup("")
    tone = signed if min(known) < 0 else share
    return matrix(list(means), members, values, tone, "Mean coefficient of each adapter, by domain", _fixed)


def _fixed(value: Any) -> str:
    return f"{value:z.2f}".replace("-", "−") if finite(value) else ""


def _ends(row: Mapping[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return f"{percent(low)} to {percent(high)}" if finite(low) and finite(high) else ""


def _candidates(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What λ-validation was asked to choose among: gates, and beside them what treats all prompts alike."""
    rows = [row for row in found if finite(row.get("value"))]
    span = spanned([row["value"] for row in rows], include=(1.0,)) if rows else (0.0, 1.0)
    return [
        {
            "name": str(row.get("name") or ""),
            "value": f"{row['value']:.4f}",
            "taken": row.get("taken") is True,
            "gate": row.get("gate") is True,
            "strip": interval_strip(row["value"], None, None, span, 1.0, "better" if row.get("taken") else "plain"),
        }
        for row in sorted(rows, key=lambda row: float(row["value"]))
    ]


def _chart(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    loss = Line.of("training", [(row.get("step"), row.get("loss")) for row in history], 0)
    held = Line.of("λ-validation", [(row.get("step"), row.get("validation")) for row in history], -1, dots=True)
    shown = [line for line in (loss, held) if line.points]
    return {
        "figure": line_chart(shown, "Loss while the gate was fitted"),
        "keys": [(line.name, line.hue, line.style) for line in shown],
    }


def _prompt(row: Mapping[str, Any], members: Sequence[str], hues: Mapping[str, int], longest: float) -> dict[str, Any]:
    weights = mapping(row.get("coefficients"))
    return {
        "domain": str(row.get("domain") or ""),
        "prompt": _short(row.get("prompt")),
        "weights": [
            {"name": name, "hue": hues.get(name, 0), "text": _fixed(weights[name]),
             "bar": bar(weights[name], longest, hues.get(name, 0))}
            for name in members if finite(weights.get(name))
        ],
        "nearest": [
            {
                "domain": str(near.get("domain") or ""),
                "prompt": _short(near.get("prompt")),
                "similarity": _fixed(near.get("similarity")),
            }
            for near in records(row.get("nearest"))
        ],
    }  # fmt: skip


def _short(text: Any) -> str:
    said = str(text or "")
    return said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"
