"""How one of the candidates was chosen: the reasons, what the choice is worth on unseen items, the Pareto table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorchestra.report.drawing import ABSENT, finite, number, spanned
from lorchestra.report.figures import interval_strip
from lorchestra.report.values import mapping, percent, records, strings

_RULES = {"one_se": "One standard error", "minimum": "Plain minimum"}
_MOST = 12  # rows of the Pareto table


def choice_section(search: Mapping[str, Any], members: Sequence[str]) -> dict[str, Any]:
    """Reasons, worth of each rule, and the candidates that no other beats in every domain; empty without a choice."""
    selection = mapping(search.get("selection"))
    standings = records(search.get("candidates"))
    if not selection:
        return {}
    return {
        "reasons": strings(selection.get("reasons")),
        "worth": [_worth(row, selection, standings, members) for row in records(selection.get("worth"))],
        "front": _front(selection, standings, members),
    }


def score_text(value: Any, *, signed: bool = False) -> str:
    """Four decimals, with a real minus sign."""
    return f"{value:{'+z' if signed else 'z'}.4f}".replace("-", "−") if finite(value) else ABSENT


def interval_text(row: Mapping[str, Any], *, signed: bool = False) -> str:
    """``[0.9012, 0.9344]``; empty where an end is not known."""
    low, high = row.get("low"), row.get("high")
    return (
        f"[{score_text(low, signed=signed)}, {score_text(high, signed=signed)}]" if finite(low) and finite(high) else ""
    )


def behind(row: Mapping[str, Any], span: tuple[float, float], taken: bool) -> dict[str, Any]:
    """How far a candidate lies above the lowest, on the same items: text, standard error, drawn interval."""
    found = mapping(row.get("behind"))
    if not finite(found.get("estimate")):
        return {}
    unclear = finite(found.get("low")) and found["low"] <= 0
    kind = "better" if taken else "unclear" if unclear else "plain"
    return {
        "text": score_text(found["estimate"]),
        "error": f"± {score_text(row.get('error'))}" if finite(row.get("error")) else "",
        "picked": percent(row["picked"]) if finite(row.get("picked")) and row["picked"] > 0 else "",
        "strip": interval_strip(found["estimate"], found.get("low"), found.get("high"), span, 0.0, kind),
    }


def behind_span(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The axis of all :func:`behind` strips. Far candidates run off it: the near ones are those that matter."""
    found = [mapping(row.get("behind")) for row in rows]
    near = sorted(b["estimate"] for b in found if finite(b.get("estimate")))[: max(len(rows) // 2, 8)]
    return spanned(near, include=(0.0,))


def _worth(
    row: Mapping[str, Any],
    selection: Mapping[str, Any],
    standings: Sequence[Mapping[str, Any]],
    members: Sequence[str],
) -> dict[str, Any]:
    honest, optimism = mapping(row.get("honest")), mapping(row.get("optimism"))
    taken = row.get("taken")
    known = isinstance(taken, int) and not isinstance(taken, bool) and 0 <= taken < len(standings)
    return {
        "rule": _RULES.get(str(row.get("rule")), str(row.get("rule") or "")),
        "applied": row.get("rule") == selection.get("rule"),
        "taken": _name(standings[taken], members) if known and isinstance(taken, int) else "",
        "naive": score_text(row.get("naive")),
        "honest": score_text(honest.get("estimate")),
        "honest_interval": interval_text(honest),
        "optimism": score_text(optimism.get("estimate"), signed=True),
        "optimism_interval": interval_text(optimism, signed=True),
    }


def _front(
    selection: Mapping[str, Any], standings: Sequence[Mapping[str, Any]], members: Sequence[str]
) -> dict[str, Any]:
    """Undominated candidates and the chosen one, by domains; empty with fewer than two domains."""
    marked = {
        number: word
        for key, word in (("minimum", "minimum"), ("chosen", "chosen"))
        if isinstance(number := selection.get(key), int)
    }
    shown = [(k, row) for k, row in enumerate(standings) if row.get("undominated") is True or k in marked]
    domains = list(dict.fromkeys(name for _, row in shown for name in mapping(row.get("ratios"))))
    if len(domains) < 2:
        return {}
    shown.sort(key=lambda pair: float(pair[1]["score"]) if finite(pair[1].get("score")) else float("inf"))
    kept = [pair for k, pair in enumerate(shown) if k < _MOST or pair[0] in marked]
    cells = {(k, name): mapping(mapping(row.get("ratios")).get(name)) for k, row in kept for name in domains}
    spans = {
        name: spanned((cells[k, name].get(end) for k, _ in kept for end in ("low", "estimate", "high")), include=(1.0,))
        for name in domains
    }
    return {
        "domains": domains,
        "more": len(shown) - len(kept),
        "limited": finite(selection.get("tolerance")),
        "rows": [
            {
                "name": _name(row, members),
                "mark": marked.get(k, ""),
                "dominated": row.get("undominated") is not True,
                "score": score_text(row.get("score")),
                "excess": score_text(row.get("excess")) if finite(row.get("excess")) and row["excess"] > 0 else "",
                "cells": [_cell(cells[k, name], spans[name]) for name in domains],
            }
            for k, row in kept
        ],
    }


def _cell(found: Mapping[str, Any], span: tuple[float, float]) -> dict[str, Any]:
    return {
        "text": score_text(found.get("estimate")),
        "interval": interval_text(found),
        "strip": interval_strip(found.get("estimate"), found.get("low"), found.get("high"), span, 1.0, "plain"),
    }


def _name(row: Mapping[str, Any], members: Sequence[str]) -> str:
    """``0.3·general + 0.7·clinic (gradient)``."""
    weights = mapping(row.get("weights"))
    names = [name for name in (*members, *(n for n in weights if n not in members)) if weights.get(name)]
    mixed = " + ".join(f"{number(weights[name])}·{name}" for name in names)
    origin = str(row.get("origin") or "")
    return f"{mixed} ({origin})" if mixed else origin or "the base"
