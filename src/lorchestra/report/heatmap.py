"""Heat maps as inline SVG: a grid of coloured cells, every value under the pointer and, where there is room, in it.

Colours are mixed from the style sheet's, so they follow light, dark and paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lorchestra.report.drawing import element, finite, number, shortened

Tone = Callable[[float], str]


def signed(value: float) -> str:
    """CSS fill of −1 … 1: orange below zero, blue above."""
    # Small cosines are the usual ones, and should be seen.
    return _mixed("--worse" if value < 0 else "--better", min(abs(value), 1.0) ** 0.6)


def share(value: float) -> str:
    """CSS fill of 0 … 1."""
    return _mixed("--hue2", value)


def conflict(value: float) -> str:
    """CSS fill of the share of opposed signs: grey at ½, which is chance; orange above, blue below."""
    return signed(1 - 2 * value)


def ratio(value: float) -> str:
    """CSS fill of a ratio ≥ 0, full at 1."""
    return _mixed("--hue4", value)


def _mixed(colour: str, amount: float) -> str:
    """From the background (0) to nearly the colour (1), so that text on it can be read."""
    return f"color-mix(in oklab, var({colour}) {min(max(amount, 0.0), 1.0) * 0.72:.1%}, var(--well))"


def grid(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], Any], tone: Tone, label: str
) -> Markup:
    """Layers across, kinds of module down; small cells, a value shows under the pointer. A missing one is empty.

    Args:
        rows, columns: names, in order.
        values: (row, column) → number or nothing.
        tone: value → CSS fill.
        label: what the figure shows, for those who do not see it.
    """
    wide, high, left, top = max(min(400 / max(len(columns), 1), 24.0), 5.0), 17.0, 132.0, 4.0
    parts: list[Markup] = []
    for i, row in enumerate(rows):
        name = element("title", row), element("tspan", shortened(row, 20))
        parts.append(element("text", *name, class_="tick", x=left - 6, y=top + i * high + 12, text_anchor="end"))
        for j, column in enumerate(columns):
            value = values.get((row, column))
            if finite(value):
                said = element("title", f"layer {column}, {row}: {number(value)}" if column else number(value))
                box = {"x": left + j * wide, "y": top + i * high, "width": wide - 1, "height": high - 1}
                parts.append(element("rect", said, class_="tile", style=f"fill:{tone(value)}", **box))
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10_000) if step * wide >= 20)
    bottom = top + len(rows) * high + 11
    for j, column in enumerate(columns):
        if j % every == 0:
            parts.append(
                element("text", column, class_="tick", x=left + j * wide + wide / 2, y=bottom, text_anchor="middle")
            )
    width, height = left + len(columns) * wide + 8, bottom + 5
    return _svg(width, height, label, *parts)


def matrix(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], Any], tone: Tone, label: str,
    form: Callable[[Any], str],
) -> Markup:  # fmt: skip
    """Adapters × adapters, the value in every cell. ``form`` writes it; else as :func:`grid`."""
    wide, high, left, top = 66.0, 30.0, 112.0, 24.0
    parts: list[Markup] = []
    for j, name in enumerate(columns):
        text = element("title", name), element("tspan", shortened(name, 10))
        x = left + j * wide + wide / 2
        parts.append(element("text", *text, class_="tick", x=x, y=top - 8, text_anchor="middle"))
    for i, row in enumerate(rows):
        text = element("title", row), element("tspan", shortened(row, 17))
        y = top + i * high
        parts.append(element("text", *text, class_="tick", x=left - 8, y=y + 19, text_anchor="end"))
        for j, column in enumerate(columns):
            value = values.get((row, column))
            if finite(value):
                x = left + j * wide
                said = element("title", f"{row}, {column}: {number(value)}")
                fill = f"fill:{tone(value)}"
                parts.append(
                    element("rect", said, class_="tile", x=x, y=y, width=wide - 2, height=high - 2, style=fill)
                )
                parts.append(element("text", form(value), class_="said", x=x + wide / 2 - 1, y=y + 19))
    return _svg(left + len(columns) * wide + 4, top + len(rows) * high + 2, label, *parts)


def _svg(width: float, height: float, label: str, *parts: Markup) -> Markup:
    return element(
        "svg", *parts, class_="heat", viewBox=f"0 0 {width:.0f} {height:.0f}", width=width, height=height, role="img",
        aria_label=label,
    )  # fmt: skip
