"""The λ search, the fused adapter and the merged model, as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorchestra.report.choice import behind, behind_span, choice_section
from lorchestra.report.drawing import finite, number, spanned
from lorchestra.report.figures import Candidate, bar, colour_bar, interval_strip, score_span, simplex
from lorchestra.report.surface import surface
from lorchestra.report.values import duration, mapping, percent, records, strings

_SHOWN = 20  # candidates in the open; the rest is folded away


def search_section(search: Mapping[str, Any], hues: Mapping[str, int]) -> dict[str, Any]:
    found = [c for c in records(search.get("candidates")) if finite(c.get("score"))]
    if not found:
        return {}
    found.sort(key=lambda c: float(c["score"]))
    members = strings(search.get("members")) or list(dict.fromkeys(n for c in found for n in mapping(c.get("weights"))))
    chosen = _weights(search.get("chosen"), members)
    points = []
    for row in found:
        weights = _weights(row.get("weights"), members)
        at = ", ".join(f"{name} {number(w)}" for name, w in zip(members, weights, strict=True))
        title = f"{at}: score {number(row['score'], 4)} ({row.get('origin', '')})"
        points.append(Candidate(weights, float(row["score"]), title, best=weights == chosen))
    low, high = score_span(points)
    base = next((float(row["score"]) for row in found if row.get("origin") == "base"), None)
    span, apart = spanned((low, high)), behind_span(found)
    rows = [
        {
            "place": k + 1,
            "origin": row.get("origin") or "",
            "weights": [_fixed(w) for w in point.weights],
            "total": _fixed(point.total),
            "score": f"{point.score:.4f}",
            "strip": interval_strip(point.score, None, None, span, base, "better" if point.best else "plain"),
            "chosen": point.best,
            "behind": behind(row, apart, point.best),
        }
        for k, (row, point) in enumerate(zip(found, points, strict=True))
    ]
    facets = simplex(members, points)
    placed = sum(p.on_simplex for p in points)
    return {
        "strategy": search.get("strategy"),
        "items": number(search["validation_items"]) if finite(search.get("validation_items")) else "",
        "members": [(name, hues.get(name, 0)) for name in members],
        "facets": facets,
        "surface": surface(members, points),
        "elsewhere": len(points) - placed if facets else 0,
        "key": colour_bar(*score_span([p for p in points if p.on_simplex])) if facets else "",
        "rows": rows[:_SHOWN],
        "more": rows[_SHOWN:],
        "base": base is not None,
        "goal": str(mapping(search.get("selection")).get("goal") or "the mean over domains of loss / base loss"),
        "compared": any(row["behind"] for row in rows),
        "choice": choice_section(search, members),
    }


def _fixed(weight: float) -> str:
    return f"{weight:z.3f}".replace("-", "−") if weight else "0"


def _weights(weights: Any, members: Sequence[str]) -> tuple[float, ...]:
    found = mapping(weights)
    return tuple(float(found[name]) if finite(found.get(name)) else 0.0 for name in members)


def fusion_section(fusion: Mapping[str, Any], hues: Mapping[str, int]) -> dict[str, Any]:
    weights, norms = mapping(fusion.get("weights")), mapping(fusion.get("norms"))
    parts = {name: weights[name] * norms[name] for name in weights if finite(weights[name]) and finite(norms.get(name))}
    longest = max((abs(v) for v in parts.values()), default=0.0)
    names = list(dict.fromkeys([*weights, *norms]))
    return {
        "rows": [
            {
                "name": name,
                "hue": hues.get(name, 0),
                "weight": number(weights.get(name)),
                "norm": number(norms.get(name)),
                "share": number(parts.get(name)),
                "bar": bar(parts.get(name), longest, hues.get(name, 0)),
            }
            for name in names
        ],
        "facts": _known(
            ("Rank", number(fusion.get("rank")) if fusion.get("rank") is not None else None),
            ("Energy kept", percent(fusion["retained"]) if finite(fusion.get("retained")) else None),
            *((f"Trained again: {row.get('name')}", _refit(row)) for row in records(fusion.get("refit"))),
        ),
        "warnings": strings(fusion.get("warnings")),
    }


def _refit(row: Mapping[str, Any]) -> str:
    examples, steps = mapping(row.get("examples")).get("train"), records(row.get("history"))
    return f"{number(examples)} examples, {number(len(steps))} steps, {duration(row.get('seconds'))}"


def merge_section(merge: Mapping[str, Any]) -> list[tuple[str, str]]:
    def share(key: str) -> str | None:
        return percent(merge[key]) if merge.get(key) is not None else None

    return _known(
        ("Number format", str(merge["dtype"]) if merge.get("dtype") else None),
        ("Parity: logits that differ, as a share of the adapter's effect (law: at most 5 %)", share("parity")),
        ("Size of the update beside the weights", share("update_ratio")),
        ("Share of the update lost to rounding", share("rounding_lost")),
        ("Time", duration(merge["seconds"]) if finite(merge.get("seconds")) else None),
    )


def _known(*facts: tuple[str, str | None]) -> list[tuple[str, str]]:
    return [(label, text) for label, text in facts if text is not None]
