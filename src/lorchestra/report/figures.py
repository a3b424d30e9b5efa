"""The figures of the report, as inline SVG: curves, intervals, the λ simplex.

Each takes plain numbers and gives escaped markup. Colours are the style sheet's (``hue0`` … ``hue7``); what a colour
says is also said by a shape, a label or a table beside the figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from lorchestra.report.drawing import Scale, element, finite, hue_class, number, ramp, shortened, spanned, tick

_POINTS = 300  # more steps than a chart has pixels are averaged in equal runs


@dataclass(frozen=True)
class Line:
    """One series of a chart; points with a missing value are left out.

    ``style``: ``line``, ``faint`` (raw values under a smoothed line), ``dots`` (few points, joined).
    """

    name: str
    points: tuple[tuple[float, float], ...]
    hue: int = 0
    style: Literal["line", "faint", "dots"] = "line"

    @classmethod
    def of(cls, name: str, pairs: Iterable[tuple[object, object]], hue: int = 0, *, dots: bool = False) -> Line:
        """A series of the pairs (x, y) that are two numbers."""
        points = tuple((float(x), float(y)) for x, y in pairs if finite(x) and finite(y))
        return cls(name, points, hue, "dots" if dots else "line")

    def faint(self) -> Line:
        """The same, drawn under another."""
        return Line(self.name, self.points, self.hue, "faint")

    def smoothed(self, name: str) -> Line:
        """Exponential mean over about a twelfth of the points, corrected for its start (as Adam's means are)."""
        keep = math.exp(-12 / max(len(self.points), 24))
        mean, mass, out = 0.0, 0.0, []
        for x, y in self.points:
            mean, mass = keep * mean + (1 - keep) * y, keep * mass + (1 - keep)
            out.append((x, mean / mass))
        return Line(name, tuple(out), self.hue)

    def thinned(self) -> Line:
        """At most ``_POINTS`` points."""
        run = math.ceil(len(self.points) / _POINTS)
        if run <= 1:
            return self
        runs = [self.points[k : k + run] for k in range(0, len(self.points), run)]
        means = tuple((sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs)
        return Line(self.name, means, self.hue, self.style)


def line_chart(
    lines: Sequence[Line], label: str, *, floor: float | None = None, ceiling: float | None = None,
    marks: Sequence[tuple[float, str]] = (), x_label: str = "step", values: Sequence[float] = (),
) -> Markup:  # fmt: skip
    """Curves over steps. ``floor`` and ``ceiling`` are kept in view; ``marks`` are labelled vertical lines.

    With ``values`` the curves are over these (ranks, say), each of which is marked on the axis; they stand evenly
    where each is a multiple of the one before.

    The axis turns logarithmic when positive values span more than a factor of 50 and no ``floor`` is asked for.
    Empty markup without any point.
    """
    lines = [line.thinned() for line in lines if line.points]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    log = floor is None and min(ys) > 0 and max(ys) / min(ys) > 50
    kept = [v for v in (floor, ceiling) if v is not None]
    low, high = (min(ys) * 0.8, max(ys) * 1.25) if log else spanned(ys, include=kept)
    if floor is not None and min(ys) >= floor:
        low = floor
    width, height = 380, 200
    left, right = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    wide = bool(values) and left > 0 and right / left >= 4
    inset = 8 if values else 0
    across = Scale(left, right, 46 + inset, width - 10 - inset, wide)
    up = Scale(low, high, height - 32, 12, log)
    parts: list[Markup] = []
    for at in up.ticks(5):
        parts.append(element("line", class_="grid", x1=46, x2=width - 10, y1=up(at), y2=up(at)))
        parts.append(element("text", tick(at), class_="tick", x=40, y=up(at) + 3.5, text_anchor="end"))
    for at in values or across.ticks(5):
        parts.append(element("text", tick(at), class_="tick", x=across(at), y=height - 16, text_anchor="middle"))
    parts.append(element("text", x_label, class_="tick axis", x=across.stop, y=height - 4, text_anchor="end"))
    parts.append(element("line", class_="base", x1=46, x2=width - 10, y1=up.start, y2=up.start))
    for at, text in marks:
        end = across(at) > width * 0.7
        parts.append(element("line", class_="mark", x1=across(at), x2=across(at), y1=up.stop, y2=up.start))
        place = across(at) - 4 if end else across(at) + 4
        parts.append(element("text", text, class_="tick", x=place, y=20, text_anchor="end" if end else "start"))
    for line in lines:
        parts += _curve(line, across, up)
    frame: dict[str, object] = {
        "x": [left, right, across.start, across.stop],
        "y": [low, high, up.start, up.stop],
        "log": log,
    }
    frame |= {"name": x_label} | ({"places": [[round(across(at), 1), tick(at)] for at in values]} if values else {})
    return _svg(width, height, label, *parts, data_frame=json.dumps(frame), class_="chart")


def _curve(line: Line, across: Scale, up: Scale) -> list[Markup]:
    places = [(across(x), up(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.2f}" for x, y in places)
    kind = f"curve {line.style} {hue_class(line.hue)}"
    out = [element("polyline", class_=kind, points=path, data_name=line.name)]
    if line.style == "dots" or len(places) == 1:
        out += [element("circle", class_=f"dot {hue_class(line.hue)}", cx=x, cy=y, r=2.8) for x, y in places[:80]]
    return out


def interval_strip(
    estimate: object, low: object, high: object, span: tuple[float, float], reference: float | None, kind: str
) -> Markup:
    """One row of a forest plot: a dot with its interval on the common ``span``, and a line at ``reference``.

    ``kind`` is ``better``, ``worse`` or ``unclear``; unclear dots are hollow.
    """
    width, height, middle = 130, 18, 9.0
    across = Scale(span[0], span[1], 5, width - 5)
    parts = [element("line", class_="grid", x1=1, x2=width - 1, y1=middle, y2=middle)]
    if reference is not None:
        parts.append(element("line", class_="mark", x1=across(reference), x2=across(reference), y1=1, y2=height - 1))
    if finite(low) and finite(high):
        ends = {"x1": across(float(low)), "x2": across(float(high))}
        parts.append(element("line", class_=f"whisker {kind}", y1=middle, y2=middle, **ends))
    if finite(estimate):
        parts.append(element("circle", class_=f"estimate {kind}", cx=across(float(estimate)), cy=middle, r=3.6))
    return element(
        "svg", *parts, class_="strip", viewBox=f"0 0 {width} {height}", width=width, height=height, aria_hidden="true"
    )


def bar(value: object, longest: float, hue: int = 0) -> Markup:
    """A horizontal bar of length ``|value| / longest``; negative values are hatched by the style sheet."""
    if not finite(value):
        return Markup("")
    share = min(abs(float(value)) / longest, 1.0) if longest > 0 else 0.0
    kind = f"bar {hue_class(hue)}" + (" negative" if float(value) < 0 else "")
    body = element("rect", class_=kind, x=0, y=4, width=max(share * 150, 1.0), height=10, rx=1.5)
    return element("svg", body, class_="strip", viewBox="0 0 150 18", width=150, height=18, aria_hidden="true")


@dataclass(frozen=True)
class Candidate:
    """One point of the λ search: weights in the order of the members; ``best`` is the chosen one."""

    weights: tuple[float, ...]
    score: float
    title: str
    best: bool = False

    @property
    def total(self) -> float:
        """Σλ."""
        return sum(self.weights)

    @property
    def on_simplex(self) -> bool:
        """Whether it has a place on (total scale) × simplex: no negative weight, some weight."""
        return min(self.weights) >= 0 and self.total > 0


def simplex(members: Sequence[str], candidates: Sequence[Candidate]) -> list[tuple[str, Markup]]:
    """Heat maps over the simplex of three members, one for each total scale (label, figure).

    Colour is the score. With four points or more a facet is shaded by the nearest candidate: nothing is
    interpolated. More than four total scales are put into four facets.
    """
    placed = [c for c in candidates if c.on_simplex]
    if len(members) != 3 or not placed:
        return []
    low, high = score_span(placed)
    return [
        (label, _triangle(members, [c for c in placed if c in chosen], low, high, label))
        for label, chosen in _facets(placed)
    ]


def score_span(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """Lowest and highest score."""
    return min(c.score for c in candidates), max(c.score for c in candidates)


def _facets(candidates: Sequence[Candidate], most: int = 4) -> list[tuple[str, list[Candidate]]]:
    totals = sorted({round(c.total, 2) for c in candidates})
    if len(totals) <= most:
        return [(number(t), [c for c in candidates if round(c.total, 2) == t]) for t in totals]
    ordered = sorted(candidates, key=lambda c: c.total)
    cuts = [ordered[len(ordered) * k // most].total for k in range(1, most)]
    out = []
    for k in range(most):
        inside = [c for c in ordered if sum(c.total >= cut for cut in cuts) == k]
        if inside:
            first, last = number(inside[0].total), number(inside[-1].total)
            out.append((first if first == last else f"{first} to {last}", inside))
    return out


_CORNERS = ((120.0, 22.0), (22.0, 182.0), (218.0, 182.0))  # top: the first member


def _place(weights: Sequence[float]) -> tuple[float, float]:
    total = sum(weights)
    x = sum(w * corner[0] for w, corner in zip(weights, _CORNERS, strict=True)) / total
    y = sum(w * corner[1] for w, corner in zip(weights, _CORNERS, strict=True)) / total
    return x, y


def _triangle(members: Sequence[str], shown: Sequence[Candidate], low: float, high: float, total: str) -> Markup:
    def colour(score: float) -> str:
        return ramp((score - low) / (high - low) if high > low else 0.0)

    def path(corners: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)

    parts = [
        element("polygon", class_="shade", points=path(tile), fill=colour(near.score))
        for tile, near in (_tiles(shown) if len(shown) >= 4 else [])
    ]
    parts.append(element("polygon", class_="frame", points=path(_CORNERS)))
    for name, (x, y), anchor, drop in zip(members, _CORNERS, ("middle", "start", "end"), (-8, 17, 17), strict=True):
        at = {"start": 2.0, "end": 238.0}.get(anchor, x)
        label = element("title", name), element("tspan", shortened(name, 16))
        parts.append(element("text", *label, class_="label", x=at, y=y + drop, text_anchor=anchor))
    for candidate in sorted(shown, key=lambda c: (c.best, -c.score)):
        x, y = _place(candidate.weights)
        if candidate.best:
            parts.append(element("circle", class_="ring", cx=x, cy=y, r=10.5))
        dot = element("title", candidate.title)
        parts.append(element("circle", dot, class_="candidate", cx=x, cy=y, r=6, fill=colour(candidate.score)))
    return _svg(240, 206, f"Candidates with total scale {total}", *parts, class_="triangle")


def _tiles(shown: Sequence[Candidate], n: int = 14) -> list[tuple[list[tuple[float, float]], Candidate]]:
    """The triangle cut into n² small ones, each with the candidate nearest to its centre."""
    places = [(_place(c.weights), c) for c in shown]
    out = []
    for i in range(n):
        for j in range(n - i):
            first = [(i, j), (i + 1, j), (i, j + 1)]
            second = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
            for grid in (first, second) if i + j < n - 1 else (first,):
                tile = [_place((a / n, b / n, (n - a - b) / n)) for a, b in grid]
                x, y = (sum(axis) / 3 for axis in zip(*tile, strict=True))
                near = min(places, key=lambda p: (p[0][0] - x) ** 2 + (p[0][1] - y) ** 2)[1]
                out.append((tile, near))
    return out


def colour_bar(low: float, high: float) -> Markup:
    """The key of the heat maps: best (lowest) score at the left."""
    steps = [element("rect", x=k * 5, y=0, width=5.5, height=10, fill=ramp(k / 31)) for k in range(32)]
    ends = (
        element("text", f"{number(low)} best", class_="tick", x=0, y=23),
        element("text", number(high), class_="tick", x=160, y=23, text_anchor="end"),
    )
    return element(
        "svg", *steps, *ends, class_="colourkey", viewBox="0 0 162 26", width=162, height=26, aria_hidden="true"
    )


def _svg(width: float, height: float, label: str, *parts: Markup, **attributes: str) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, **attributes)
