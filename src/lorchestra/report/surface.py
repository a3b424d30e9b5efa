"""The surface of a search where it is no simplex of three: a map for two members, parallel coordinates for more."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lorchestra.report.drawing import Scale, element, finite, ramp, shortened, spanned, tick
from lorchestra.report.figures import Candidate

_MOST_AXES = 24  # beyond, axes would stand closer than their labels


def surface(members: Sequence[str], candidates: Sequence[Candidate]) -> Markup:
    """λ of every candidate, coloured by score; empty markup for three members (see :func:`figures.simplex`).

    One member: the score over λ. Two: a map with one λ across and one up. More: a line a candidate over one axis a
    member, the best on top.
    """
    shown = [c for c in candidates if all(finite(w) for w in c.weights)]
    if not shown or len(members) == 3 or len(members) > _MOST_AXES:
        return Markup("")
    worst_first = sorted(shown, key=lambda c: (c.best, -c.score))
    if len(members) == 1:
        return _line(members[0], worst_first)
    return _plane(members, worst_first) if len(members) == 2 else _parallel(members, worst_first)


def _colour(candidates: Sequence[Candidate]) -> dict[int, str]:
    """Colours by rank and not by score: one very bad candidate would take all contrast from the good ones."""
    order = sorted(range(len(candidates)), key=lambda k: candidates[k].score)
    return {k: ramp(place / max(len(order) - 1, 1)) for place, k in enumerate(order)}


def _dots(shown: Sequence[Candidate], places: Sequence[tuple[float, float]]) -> list[Markup]:
    colours, parts = _colour(shown), []
    for k, (candidate, (x, y)) in enumerate(zip(shown, places, strict=True)):
        if candidate.best:
            parts.append(element("circle", class_="ring", cx=x, cy=y, r=10.5))
        title = element("title", candidate.title)
        parts.append(element("circle", title, class_="candidate", cx=x, cy=y, r=6, fill=colours[k]))
    return parts


def _axes(across: Scale, up: Scale, x_label: str, y_label: str, height: float) -> list[Markup]:
    parts = []
    for at in up.ticks(5):
        parts.append(element("line", class_="grid", x1=across.start, x2=across.stop, y1=up(at), y2=up(at)))
        parts.append(element("text", tick(at), class_="tick", x=40, y=up(at) + 3.5, text_anchor="end"))
    for at in across.ticks(5):
        parts.append(element("line", class_="grid", x1=across(at), x2=across(at), y1=up.start, y2=up.stop))
        parts.append(element("text", tick(at), class_="tick", x=across(at), y=height - 20, text_anchor="middle"))
    parts.append(element("text", x_label, class_="tick axis", x=across.stop, y=height - 6, text_anchor="end"))
    parts.append(element("text", y_label, class_="tick axis", x=across.start, y=11))
    return parts


def _line(member: str, shown: Sequence[Candidate]) -> Markup:
    width, height = 380, 250
    across = Scale(*spanned([c.weights[0] for c in shown]), 46, width - 14)
    up = Scale(*spanned([c.score for c in shown]), height - 36, 20)
    places = [(across(c.weights[0]), up(c.score)) for c in shown]
    parts = _axes(across, up, f"λ of {shortened(member, 30)}", "score", height)
    return _svg(width, height, f"Score over λ of {member}", *parts, *_dots(shown, places))


def _plane(members: Sequence[str], shown: Sequence[Candidate]) -> Markup:
    width, height = 380, 340
    across = Scale(*spanned([c.weights[0] for c in shown], include=[0.0]), 46, width - 14)
    up = Scale(*spanned([c.weights[1] for c in shown], include=[0.0]), height - 36, 20)
    places = [(across(c.weights[0]), up(c.weights[1])) for c in shown]
    first, second = (shortened(name, 30) for name in members)
    parts = _axes(across, up, f"λ of {first}", f"λ of {second}", height)
    return _svg(width, height, f"Candidates by λ of {members[0]} and {members[1]}", *parts, *_dots(shown, places))


def _parallel(members: Sequence[str], shown: Sequence[Candidate]) -> Markup:
    width, height = max(420, 46 + 74 * len(members)), 300
    step = (width - 90) / (len(members) - 1)
    columns = [50 + k * step for k in range(len(members))]
    up = Scale(*spanned([w for c in shown for w in c.weights]), height - 46, 16)
    parts: list[Markup] = []
    for at in up.ticks(5):
        parts.append(element("line", class_="grid", x1=columns[0], x2=columns[-1], y1=up(at), y2=up(at)))
        parts.append(element("text", tick(at), class_="tick", x=columns[0] - 8, y=up(at) + 3.5, text_anchor="end"))
    for k, (name, x) in enumerate(zip(members, columns, strict=True)):
        parts.append(element("line", class_="base", x1=x, x2=x, y1=up.start, y2=up.stop))
        label = element("title", name), element("tspan", shortened(name, 14))
        drop = 16 if k % 2 == 0 else 32
        parts.append(element("text", *label, class_="tick", x=x, y=up.start + drop, text_anchor="middle"))
    colours = _colour(shown)
    for k, candidate in enumerate(shown):
        points = " ".join(f"{x:.1f},{up(w):.1f}" for x, w in zip(columns, candidate.weights, strict=True))
        style = {"fill": "none", "stroke": colours[k], "stroke_width": 4.0 if candidate.best else 1.6}
        title = element("title", candidate.title)
        parts.append(element("polyline", title, points=points, stroke_linejoin="round", **style))
        if candidate.best:
            ends = zip(columns, candidate.weights, strict=True)
            parts += [element("circle", class_="ring", cx=x, cy=up(w), r=6.0) for x, w in ends]
    return _svg(width, height, "Candidates, one axis for each λ", *parts)


def _svg(width: float, height: float, label: str, *parts: Markup) -> Markup:
    return element(
        "svg", *parts, class_="surface", viewBox=f"0 0 {width} {height}", width=width, role="img", aria_label=label
    )
