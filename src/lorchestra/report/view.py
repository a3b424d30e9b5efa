"""What the page of a report shows, worked out from ``report.json``: texts, tables and figures, no markup of its own.

The data may lack anything; whatever is not there, or is not what it should be, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lorchestra.report.comparison import Comparison
from lorchestra.report.drawing import finite, number
from lorchestra.report.figures import Line, line_chart
from lorchestra.report.gate import gate_section
from lorchestra.report.lineage import Edge, Node, lineage
from lorchestra.report.values import duration, facts, flat, mapping, percent, present, records, strings
from lorchestra.report.weights import fusion_section, merge_section, search_section

_INK = -1


def page(data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template needs; sections without content are empty."""
    stages, fusion, merge = records(data.get("stages")), mapping(data.get("fusion")), mapping(data.get("merge"))
    hues = _hues(stages, fusion)
    mixed = [{**found, "baseline": True} for found in records([data.get("mixed")])]
    trained = [*stages, *mixed]
    verdict, evaluation = mapping(data.get("verdict")), mapping(data.get("evaluation"))
    comparison = Comparison(evaluation)
    return {
        "title": str(data.get("title") or "lorchestra run"),
        "made": [
            part
            for part in (
                data.get("created"),
                f"lorchestra {data['lorchestra']}" if data.get("lorchestra") else None,
                duration(data["seconds"]) if finite(data.get("seconds")) else None,
            )
            if part
        ],
        "sentence": str(verdict.get("sentence") or ""),
        "notes": strings(verdict.get("notes")),
        "tiles": comparison.tiles(),
        "reads": [f"{r.get('domain', '')} {number(r.get('reads'))}×" for r in records(evaluation.get("ledger"))],
        "graph": _graph(mapping(data.get("base")), stages, fusion, merge, hues),
        "tables": comparison.estimates(),
        "differences": comparison.differences(),
        "stages": [_stage(stage, {"mixed": len(hues), **hues}) for stage in trained],
        "search": search_section(mapping(data.get("search")), hues),
        "fusion": fusion_section(fusion, hues),
        "merge": merge_section(merge),
        "gate": gate_section(mapping(data.get("gate")), hues),
        "samples": records(data.get("samples")),
        "checks": [_check(name, mapping(found)) for name, found in mapping(data.get("data")).items()],
        "steps": records(data.get("steps")),
        "digests": _digests(data, trained, fusion, evaluation),
        "settings": [*flat(data.get("settings")), *flat({"settled": data.get("settled") or {}})],
        "recipe": str(data.get("recipe_text") or ""),
    }


FILTERS = {"number": number, "duration": duration}


# ---- lineage


def _hues(stages: Sequence[Mapping[str, Any]], fusion: Mapping[str, Any]) -> dict[str, int]:
    """Every adapter keeps one colour through the whole page: stages in their order, then what was brought in."""
    names = [str(stage.get("name")) for stage in stages]
    names += [name for stage in stages for name in mapping(stage.get("context"))]
    names += [*mapping(fusion.get("weights")), *mapping(fusion.get("norms"))]
    return {name: k for k, name in enumerate(dict.fromkeys(names))}


def _short(digest: Any) -> str:
    return str(digest).removeprefix("sha256:")[:12] if digest else ""


def _graph(
    base: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    fusion: Mapping[str, Any],
    merge: Mapping[str, Any],
    hues: Mapping[str, int],
) -> Markup:
    if not (base or stages):
        return Markup("")
    own = {str(stage.get("name")): stage for stage in stages}
    brought = [Node(name, ("brought in",), k, outside=True) for name, k in hues.items() if name not in own]
    made = []
    for name, stage in own.items():
        lora = mapping(stage.get("lora"))
        rank = f"r {lora['rank']}" if "rank" in lora else None
        about = " · ".join(present(str(stage.get("task") or ""), rank, str(lora.get("scaling") or "")))
        made.append(Node(name, present(about, _short(stage.get("digest"))), hues[name]))
    edges = [
        Edge(source, name, *_context_label(member))
        for name, stage in own.items()
        for source, member in mapping(stage.get("context")).items()
    ]
    size = base.get("parameters")
    panel = Node(
        str(base.get("name") or "base"),
        present(
            f"{number(size / 1e6)} M parameters" if finite(size) else None,
            " on ".join(present(base.get("dtype"), base.get("device"))),
            "frozen",
        ),
    )
    weights = {name: float(w) for name, w in mapping(fusion.get("weights")).items() if finite(w)}
    kept = f"{percent(fusion['retained'])} kept" if finite(fusion.get("retained")) else None
    rank = f"rank {fusion['rank']}" if fusion.get("rank") is not None else None
    fused = Node("fused", present(" · ".join(present(rank, kept)), _short(fusion.get("digest")))) if weights else None
    parity = f"parity {percent(merge['parity'])}" if finite(merge.get("parity")) else None
    dtype = f"base + ΔW, {merge['dtype']}" if merge.get("dtype") else "base + ΔW"
    merged = Node("merged model", present(dtype, parity)) if merge else None
    return lineage(panel, [*brought, *made], edges, weights, fused, merged)


def _context_label(member: Any) -> tuple[str, bool]:
    """What an arc says, and whether a schedule moves the weight."""
    if not isinstance(member, dict):
        return number(member), False
    schedule, weight = member.get("schedule") or "constant", number(member.get("weight", 1.0))
    if schedule == "constant":
        return weight, False
    return f"{weight} → {number(member.get('to', 0.0))} {schedule}", True


# ---- stages

_STAGE = {
    "task": "Task", "lora": "LoRA", "scale": "Scale s of ΔW = s·B·A", "trainable": "Trainable parameters",
    "examples": "Examples", "tokens": "Tokens", "tokens_per_second": "Tokens a second", "best_step": "Best step",
    "stopped_early": "Stopped early", "train": "Training", "digest": "Digest",
}  # fmt: skip


def _stage(stage: Mapping[str, Any], hues: Mapping[str, int]) -> dict[str, Any]:
    hue, history = hues[str(stage.get("name"))], records(stage.get("history"))
    context = ", ".join(
        f"{name} at {_context_label(member)[0]}" for name, member in mapping(stage.get("context")).items()
    )
    summary = present(
        str(stage.get("task") or ""),
        f"{number(len(history))} steps" if history else None,
        duration(stage["seconds"]) if finite(stage.get("seconds")) else None,
        f"beside {context}" if context else "on the bare base",
        "baseline: one adapter on the data of all stages, mixed" if stage.get("baseline") else None,
    )
    return {
        "name": stage.get("name"),
        "hue": hue,
        "summary": " · ".join(summary),
        "facts": facts(stage, _STAGE),
        "charts": [chart for chart in _charts(stage, history, hue, hues) if chart["figure"]],
    }


def _charts(
    stage: Mapping[str, Any], history: list[dict[str, Any]], hue: int, hues: Mapping[str, int]
) -> list[dict[str, Any]]:
    loss = Line.of("training", _over_steps(history, "loss"), hue)
    validation = Line.of("validation", _over_steps(records(stage.get("validation")), "loss"), _INK, dots=True)
    best = stage.get("best_step")
    curves = [loss.faint(), loss.smoothed("training, smoothed"), validation]
    weights = [(row.get("step"), mapping(row.get("context"))) for row in history]
    members = dict.fromkeys(name for _, row in weights for name in row)
    context = [Line.of(name, [(step, row.get(name)) for step, row in weights], hues.get(name, 0)) for name in members]
    single: dict[str, tuple[str, dict[str, Any]]] = {
        "Preference accuracy of the batch": ("accuracy", {"floor": 0.0, "ceiling": 1.0}),
        "Preference margin": ("margin", {}),
        "Learning rate": ("learning_rate", {"floor": 0.0}),
        "Gradient norm": ("gradient_norm", {}),
        "Orthogonality": ("orthogonality", {}),
    }
    charts = [_chart("Loss", curves, marks=[(best, "best")] if finite(best) else [])]
    charts += [
        _chart(title, [Line.of(title, _over_steps(history, key), hue)], **view) for title, (key, view) in single.items()
    ]
    # A context at constant weights is said in the stage's summary; a flat line would say no more.
    if any(len({weight for _, weight in line.points}) > 1 for line in context):
        charts.append(_chart("Weights of the context", context, floor=0.0, ceiling=1.0, keys=True))
    return charts


def _over_steps(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[Any, Any]]:
    return [(row.get("step"), row.get(key)) for row in rows]


def _chart(title: str, lines: Sequence[Line], *, keys: bool = False, **view: Any) -> dict[str, Any]:
    shown = [line for line in lines if line.points]
    legend = shown if keys or len(shown) > 1 else []
    return {
        "title": title,
        "keys": [(k.name, k.hue, k.style) for k in legend],
        "figure": line_chart(lines, title, **view),
    }


# ---- data check, digests

_PARTS = ("train", "validation", "test")
_CHECK = {
    "format": "Format", "rows": "Rows read", "sources": "Source", "dropped": "Left out",
    "truncated": "Cut to the maximum length", "cut_answers": "Answers cut", "duplicates": "Repeated, left out",
    "near_duplicates": "Near-duplicates", "leakage": "Held-out items with their like in another part",
    "leakage_exact": "of these, with the very same prompt", "end_of_turn": "An answer ends with",
}  # fmt: skip
_PART_ROWS = {"counts": "Examples", "groups": "Groups", "supervised": "Supervised tokens"}
_LENGTHS = {"mean": "mean", "p50": "median", "p90": "90 %", "p99": "99 %", "max": "longest"}


def _check(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    tables = [(label, mapping(found.get(key))) for key, label in _PART_ROWS.items()]
    parts = [part for part in _PARTS if any(part in row for _, row in tables)]
    lengths = mapping(found.get("lengths"))
    return {
        "name": name,
        "parts": parts,
        "rows": [(label, [number(row.get(part)) for part in parts]) for label, row in tables if row],
        "lengths": [(_LENGTHS.get(key, key), number(value)) for key, value in lengths.items()],
        "facts": facts(found, _CHECK),
        "warnings": strings(found.get("warnings")),
        "examples": [_marked(str(e.get("text") or ""), e.get("supervised")) for e in records(found.get("examples"))],
    }


def _marked(text: str, spans: Any) -> list[tuple[str, bool]]:
    """The text cut into (piece, supervised); spans that overlap or leave the text are trimmed."""
    pieces: list[tuple[str, bool]] = []
    at = 0
    rows = spans if isinstance(spans, list) else []
    known = [s for s in rows if isinstance(s, list) and len(s) == 2 and all(isinstance(edge, int) for edge in s)]
    for start, end in sorted(known):
        start, end = max(start, at), min(end, len(text))
        if start < end:
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
    return [piece for piece in [*pieces, (text[at:], False)] if piece[0]]


def _digests(
    data: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    fusion: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> list[tuple[str, str]]:
    base = mapping(data.get("base"))
    found = [(f"base {part}", base.get(part)) for part in ("weights", "tokenizer", "template")]
    found += [(f"adapter {stage.get('name')}", stage.get("digest")) for stage in stages]
    found.append(("fused adapter", fusion.get("digest")))
    found += [(f"sealed test of {row.get('domain')}", row.get("digest")) for row in records(evaluation.get("ledger"))]
    return [(label, str(digest)) for label, digest in found if digest]
