"""``diagnosis.html``: what ``lorchestra diagnose`` found, as one self-contained page.

Made of the command's JSON alone; every text in it is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lorchestra.report.drawing import ABSENT, finite, number
from lorchestra.report.figures import Line, bar, line_chart
from lorchestra.report.heatmap import Tone, conflict, grid, matrix, ratio, share, signed
from lorchestra.report.values import mapping, percent, records
from lorchestra.report.write import clean, document

PAIRS = 12  # maps of more pairs than this would bury the page; the most related are shown
# Figure of a pair → heading, colours, how a value is written.
_FIGURES: Mapping[str, tuple[str, Tone, Any]] = {
    "cosine": ("Cosine", signed, lambda v: number(v, 2)),
    "row_overlap": ("Row spaces: overlap", share, lambda v: number(v, 2)),
    "column_overlap": ("Column spaces: overlap", share, lambda v: number(v, 2)),
    "sign_conflict": ("Opposite signs, share of entries", conflict, lambda v: percent(round(v, 3))),
    "sign_conflict_weighted": ("Opposite signs, by product", conflict, lambda v: percent(round(v, 3))),
}
_TROUBLE = {"fight", "opposite", "drowns", "signs", "acts", "small", "large", "nothing"}


def render_diagnosis(data: Mapping[str, Any]) -> str:
    """The page as one HTML document; the same data gives the same text.

    Args:
        data: what ``lorchestra diagnose --json`` prints.
    """
    return document("diagnosis.html.j2", _view(clean(data)))


def _view(data: Mapping[str, Any]) -> dict[str, Any]:
    adapters = {name: mapping(found) for name, found in mapping(data.get("adapters")).items()}
    pairs = records(data.get("pairs"))
    shown = sorted(pairs, key=lambda pair: -abs(_number(mapping(pair.get("overall")).get("cosine"))))[:PAIRS]
    activation = {owner: mapping(found) for owner, found in mapping(data.get("activation")).items()}
    base = str(data.get("base") or "")
    return {
        "title": "lorchestra diagnose",
        "made": [text for text in (data.get("created"), _version(data), base and f"base {base}") if text],
        "names": list(adapters),
        "reading": [
            {"text": remark.get("text"), "trouble": remark.get("kind") in _TROUBLE}
            for remark in records(data.get("reading"))
        ],
        "adapters": [_adapter(name, found, adapters) for name, found in adapters.items()],
        "has_base": any(finite(found.get("relative")) for found in adapters.values()),
        "energy": _energy(adapters),
        "matrices": _matrices(list(adapters), pairs, adapters, activation),
        "norms": [
            {"name": name, "map": figure}
            for name, found in adapters.items()
            if (figure := _norm_map(name, found, adapters))
        ],
        "pairs": [_pair(pair) for pair in pairs if pair in shown],
        "left_out": len(pairs) - len(shown),
        "activation": [_activation(owner, found) for owner, found in activation.items()],
        "tiles": _tiles(mapping(data.get("tiles"))),
    }


def _version(data: Mapping[str, Any]) -> str:
    return f"lorchestra {data['lorchestra']}" if data.get("lorchestra") else ""


def _number(value: Any) -> float:
    return float(value) if finite(value) else 0.0


def _adapter(name: str, found: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    longest = max(_number(other.get("norm")) for other in adapters.values())
    return {
        "name": name,
        "hue": list(adapters).index(name),
        "modules": number(len(mapping(found.get("modules")))),
        "norm": number(found.get("norm"), 4),
        "bar": bar(found.get("norm"), longest, list(adapters).index(name)),
        "relative": percent(found.get("relative")) if finite(found.get("relative")) else ABSENT,
        "rank": number(found.get("rank")),
        "effective": number(found.get("effective_rank")),
        "rank_90": number(found.get("rank_90")),
        "rank_99": number(found.get("rank_99")),
    }


def _energy(adapters: Mapping[str, Mapping[str, Any]]) -> Markup:
    lines = [
        Line.of(
            name,
            [(float(rank), _number(kept) * 100) for rank, kept in mapping(found.get("kept")).items()],
            hue,
            dots=True,
        )
        for hue, (name, found) in enumerate(adapters.items())
    ]
    return line_chart(lines, "Share of ‖ΔW‖² kept at a rank, in percent", floor=0.0, ceiling=100.0, x_label="rank")


def _matrices(
    names: Sequence[str],
    pairs: Sequence[Mapping[str, Any]],
    adapters: Mapping[str, Mapping[str, Any]],
    activation: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Adapters × adapters, one for each figure that there is."""
    out = []
    if len(names) > 1:
        for figure, (title, tone, form) in _FIGURES.items():
            values: dict[tuple[str, str], Any] = {}
            for pair in pairs:
                value = mapping(pair.get("overall")).get(figure)
                values |= dict.fromkeys([(str(pair["a"]), str(pair["b"])), (str(pair["b"]), str(pair["a"]))], value)
            out.append({"title": title, "note": "", "figure": matrix(names, names, values, tone, title, form)})
        sizes = {name: _number(found.get("norm")) for name, found in adapters.items()}
        rows = {(a, b): sizes[a] / sizes[b] for a in names for b in names if a != b and sizes[b] > 0}
        out.append(
            {
                "title": "Norms, row over column",
                "note": "‖ΔW‖ of the row's adapter over the column's",
                "figure": matrix(names, names, rows, ratio, "Ratios of norms", lambda v: number(v, 2)),
            }
        )
    if activation:
        values = {
            (owner, name): value
            for owner, found in activation.items()
            for name, value in mapping(found.get("overall")).items()
        }
        out.append(
            {
                "title": "Effect on each other's data",
                "note": "row: whose data; column: whose effect, as a multiple of the row's own",
                "figure": matrix(list(activation), names, values, ratio, "Cross-activation", lambda v: number(v, 2)),
            }
        )
    return out


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    overall = mapping(pair.get("overall"))
    facts = [
        f"cosine {number(overall.get('cosine'), 2)}",
        f"row spaces overlap {number(overall.get('row_overlap'), 2)} (chance {number(overall.get('row_chance'), 2)}), "
        f"median angle {number(overall.get('row_angle'), 2)}°",
        f"column spaces overlap {number(overall.get('column_overlap'), 2)} "
        f"(chance {number(overall.get('column_chance'), 2)}), median angle {number(overall.get('column_angle'), 2)}°",
        f"{number(pair.get('shared'))} modules in common",
    ]
    maps = [
        {"title": title, "figure": figure}
        for key, (title, tone, _) in _FIGURES.items()
        if (figure := _map(pair, key, tone, f"{title} of {pair.get('a')} and {pair.get('b')}, layers by kinds"))
    ]
    return {"a": str(pair.get("a")), "b": str(pair.get("b")), "facts": " · ".join(facts), "maps": maps}


def _activation(owner: str, found: Mapping[str, Any]) -> dict[str, Any]:
    names = list(mapping(found.get("overall")))
    maps = [
        {"title": name, "figure": figure}
        for name in names
        if (figure := _map(found, name, ratio, f"Effect of {name} on the data of {owner}, layers by kinds"))
    ]
    return {"owner": owner, "tokens": number(found.get("tokens")), "maps": maps}


def _norm_map(name: str, found: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]]) -> Markup:
    """‖ΔW‖/‖W‖, or ‖ΔW‖ without a base, on one scale for all adapters."""
    key = "relative" if finite(found.get("relative")) else "norm"
    most = max(_number(cell.get(key)) for other in adapters.values() for cell in records(other.get("cells")))
    return _map(found, key, lambda value: ratio((value / most) ** 0.5 if most > 0 else 0.0), f"{key} of {name}")


def _map(found: Mapping[str, Any], key: str, tone: Tone, label: str) -> Markup:
    """Layers × kinds of one figure; empty markup where nothing is known of it."""
    cells = [cell for cell in records(found.get("cells")) if finite(cell.get(key))]
    layers = sorted({cell["layer"] for cell in cells if isinstance(cell.get("layer"), int)})
    kinds = list(dict.fromkeys(str(cell.get("kind")) for cell in cells))
    values = {
        (str(cell.get("kind")), "" if cell.get("layer") is None else str(cell["layer"])): cell[key] for cell in cells
    }
    columns = [str(layer) for layer in layers]
    if any(cell.get("layer") is None for cell in cells):
        columns.append("")
    return grid(kinds, columns, values, tone, label) if cells else Markup("")


def _tiles(found: Mapping[str, Any]) -> dict[str, Any]:
    sampled = mapping(found.get("sampled"))
    return {
        "seen": number(found.get("seen")),
        "total": number(found.get("total")),
        "complete": not sampled,
        "modules": [
            {
                "path": path,
                "corners": ", ".join(f"({c[0]}, {c[1]})" for c in mapping(tiles).get("corners", []) if len(c) == 2),
                "total": number(mapping(tiles).get("total")),
            }
            for path, tiles in sampled.items()
        ],
    }
