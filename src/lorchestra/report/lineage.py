"""The lineage graph: a frozen base, the adapters that stand on it, what each was trained beside, and their sum.

The base is the panel that holds everything; stages are boxes in recipe order; arcs above are contexts with their
weights; the rail below carries each member, times its λ, into the fused adapter; the merged model leaves the panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lorchestra.report.drawing import element, hue_class, number, shortened


@dataclass(frozen=True)
class Node:
    """A box: ``name``, two short lines below it, a hue, and whether it was brought in from outside."""

    name: str
    lines: tuple[str, ...] = ()
    hue: int = 0
    outside: bool = False


@dataclass(frozen=True)
class Edge:
    """``source`` was in the context of ``target``; ``label`` says at what weight; ``fades`` if a schedule moves it."""

    source: str
    target: str
    label: str
    fades: bool = False


_WIDTH, _HEIGHT, _GAP = 154.0, 66.0, 44.0


def lineage(
    base: Node, nodes: Sequence[Node], edges: Sequence[Edge], fusion: Mapping[str, float],
    fused: Node | None, merged: Node | None,
) -> Markup:  # fmt: skip
    """Draw it; every part may be missing. Edges with an unknown end are left out."""
    column = {node.name: k for k, node in enumerate(nodes)}
    arcs = [e for e in edges if e.source in column and e.target in column and e.source != e.target]
    lanes = _lanes([(column[e.source], column[e.target]) for e in arcs])
    top = 62.0 + 26.0 * max(lanes, default=0)
    rail = top + _HEIGHT + 42
    left = 22.0
    place = {name: left + k * (_WIDTH + _GAP) for name, k in column.items()}
    end = left + len(nodes) * (_WIDTH + _GAP)
    inside = end + (_WIDTH + 20 if fused else -_GAP + 22)
    inside = max(inside, 340.0)
    bottom = (rail if fused else top + _HEIGHT) + 24
    width = inside + (_GAP + 12 + _WIDTH if merged else 0) + 4
    parts = [element("rect", class_="panel", x=2, y=2, width=inside - 2, height=bottom - 2, rx=10)]
    parts.append(
        element(
            "text",
            element("title", base.name),
            element("tspan", shortened(base.name, 46), class_="strong"),
            element("tspan", "  ·  ".join(("", *base.lines)), class_="soft"),
            x=18,
            y=26,
        )
    )
    parts += [part for edge, lane in zip(arcs, lanes, strict=True) for part in _arc(edge, place, lane, top)]
    members = [(node, fusion[node.name]) for node in nodes if node.name in fusion]
    if fused:
        parts += _rail(members, place, top + _HEIGHT, rail, end)
        parts += _box(fused, end, rail - _HEIGHT + 14, kind="fused")
    parts += [part for node in nodes for part in _box(node, place[node.name], top)]
    if fused and merged:
        y = rail - _HEIGHT / 2 + 14
        parts += _arrow(end + _WIDTH, y, inside + _GAP + 10, y, "flow")
        parts += _box(merged, inside + _GAP + 12, rail - _HEIGHT + 14, kind="merged")
    return element(
        "svg", *parts, class_="lineage", viewBox=f"0 0 {width:.0f} {bottom + 4:.0f}", role="img",
        aria_label="Lineage: the base, the stages with their contexts, and what was made of them",
        width=f"{width:.0f}", height=f"{bottom + 4:.0f}",
    )  # fmt: skip


def _box(node: Node, x: float, y: float, kind: str = "") -> list[Markup]:
    style = " ".join(filter(None, ("node", kind, "outside" if node.outside else "")))
    parts = [
        element("title", " · ".join((node.name, *node.lines))),
        element("rect", class_=style, x=x, y=y, width=_WIDTH, height=_HEIGHT, rx=6),
    ]
    if not kind:
        parts.append(
            element("rect", class_=f"stripe {hue_class(node.hue)}", x=x, y=y + 6, width=4, height=_HEIGHT - 12)
        )
    parts.append(element("text", shortened(node.name, 19), class_="strong", x=x + 13, y=y + 22))
    parts += [
        element("text", shortened(line, 21), class_="soft", x=x + 13, y=y + 40 + 15 * k)
        for k, line in enumerate(node.lines[:2])
    ]
    return [element("g", *parts)]


def _lanes(spans: Sequence[tuple[int, int]]) -> list[int]:
    """A height from 1 up for every arc, short ones first, so that no two lie on each other."""
    lanes: dict[int, int] = {}
    for k in sorted(range(len(spans)), key=lambda k: (abs(spans[k][1] - spans[k][0]), spans[k])):
        low, high = sorted(spans[k])
        taken = {lane for other, lane in lanes.items() if min(spans[other]) < high and max(spans[other]) > low}
        lanes[k] = next(lane for lane in range(1, len(spans) + 2) if lane not in taken)
    return [lanes[k] for k in range(len(spans))]


def _arc(edge: Edge, place: Mapping[str, float], lane: int, top: float) -> list[Markup]:
    start, stop = place[edge.source] + _WIDTH * 0.62, place[edge.target] + _WIDTH * 0.3
    height = 4 + 26.0 * lane
    bend = 14.0 if stop > start else -14.0
    path = (
        f"M{start:.1f},{top:.1f} C{start:.1f},{top - height:.1f} {start + bend:.1f},{top - height:.1f} "
        f"{start + 2 * bend:.1f},{top - height:.1f} L{stop - 2 * bend:.1f},{top - height:.1f} "
        f"C{stop - bend:.1f},{top - height:.1f} {stop:.1f},{top - height:.1f} {stop:.1f},{top - 7:.1f}"
    )
    title = element("title", f"{edge.source} → {edge.target}: {edge.label}")
    kind = "context fades" if edge.fades else "context"
    return [
        element("path", title, class_=kind, d=path),
        _head(stop, top, "down", "head"),
        element("text", edge.label, class_="weight", x=(start + stop) / 2, y=top - height + 4, text_anchor="middle"),
    ]


def _rail(
    members: Sequence[tuple[Node, float]], place: Mapping[str, float], top: float, rail: float, end: float
) -> list[Markup]:
    parts: list[Markup] = []
    starts = [place[node.name] + _WIDTH / 2 for node, weight in members if weight]
    if starts:
        parts += _arrow(min(starts), rail, end, rail, "flow")
    for node, weight in members:
        x = place[node.name] + _WIDTH / 2
        kind = "flow" if weight else "flow unused"
        parts.append(element("line", class_=kind, x1=x, x2=x, y1=top, y2=rail if weight else rail - 12))
        label = f"λ = {number(weight)}"
        parts.append(element("text", label, class_="weight", x=x + 8, y=(top + rail) / 2 + 2, text_anchor="start"))
    return parts


def _arrow(x1: float, y1: float, x2: float, y2: float, kind: str) -> list[Markup]:
    return [element("line", class_=kind, x1=x1, y1=y1, x2=x2 - 7, y2=y2), _head(x2, y2, "right", "head")]


def _head(x: float, y: float, way: str, kind: str) -> Markup:
    tail = [(x - 8, y - 4), (x - 8, y + 4)] if way == "right" else [(x - 4, y - 8), (x + 4, y - 8)]
    return element("polygon", class_=kind, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in [(x, y), *tail]))
