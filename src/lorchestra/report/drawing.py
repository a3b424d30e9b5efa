"""Small parts of a drawing: escaped SVG elements, numbers for people, scales with round ticks, a colour ramp.

Figures are drawn here and not by a plotting library so that they take their colours from the page's style sheet
(light, dark and paper) and the same data always gives the same bytes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from markupsafe import Markup, escape

ABSENT = "–"

# Nine stops of cividis (Nuñez et al. 2018, doi 10.1371/journal.pone.0199239): even for every kind of colour vision.
_CIVIDIS = (
    (0, 34, 78),
    (26, 56, 111),
    (67, 78, 108),
    (97, 101, 111),
    (125, 124, 120),
    (155, 149, 118),
    (187, 175, 109),
    (222, 203, 93),
    (254, 232, 56),
)


def element(name: str, *children: Markup | str, **attributes: Any) -> Markup:
    """One element; children and values are escaped unless they are ``Markup``.

    ``class_`` becomes ``class``, ``stroke_width`` becomes ``stroke-width``; ``None`` leaves an attribute out.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), pixels(value))
        for key, value in attributes.items()
        if value is not None
    )
    if not children:
        return Markup("<{}{}/>").format(Markup(name), written)
    body = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, body)


def pixels(value: Any) -> str:
    """Two decimals of a coordinate at most; other values as text."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


def finite(value: object) -> TypeGuard[float]:
    """A number that can be drawn: no truth value, text, NaN, infinity or integer beyond floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number(value: Any, digits: int = 3) -> str:
    """For people: ``digits`` significant digits, thousands apart, a true minus sign; text passes through."""
    if not finite(value):
        return ABSENT if value is None or isinstance(value, float) else str(value)
    if isinstance(value, int) or (abs(value) >= 10**digits and float(value).is_integer()):
        return f"{int(value):,}".replace("-", "−")
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}".replace("-", "−")
    if abs(value) < 1e-3:
        return _power(value, digits)
    return f"{value:.{digits}g}".replace("-", "−")


def _power(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{power}".replace("-", "−")


def tick(value: float) -> str:
    """Short, for an axis: ``0.25``, ``12,000``, ``1.5e-4``."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:,.6g}".replace("-", "−")


@dataclass(frozen=True)
class Scale:
    """Data [low, high] → pixels [start, stop], linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of ``value``; outside values are held at the nearer end."""
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, max(value, self.low)))
            if self.log
            else (
                self.low,
                self.high,
                value,
            )
        )
        share = 0.5 if high == low else min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Round values inside the scale, about ``count`` of them."""
        if self.log:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            powers = [10.0**k for k in decades]
            if len(powers) >= 2:
                return powers[:: math.ceil(len(powers) / (count + 1))]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        raw = span / count
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def spanned(values: Iterable[object], *, margin: float = 0.06, include: Sequence[float] = ()) -> tuple[float, float]:
    """(low, high) around the values, with some air; never empty."""
    known = [v for v in values if finite(v)] + list(include)
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    air = (high - low) * margin or abs(high) * 0.1 or 1.0
    return low - air, high + air


def hue_class(index: int) -> str:
    """Style class of a series colour: eight hues, over and over; the colour of the text below 0."""
    return f"hue{index % 8}" if index >= 0 else "ink"


def ramp(share: float) -> str:
    """Colour of ``share`` ∈ [0, 1] on cividis, as ``#rrggbb``."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    at = min(int(place), len(_CIVIDIS) - 2)
    mixed = (round(a + (b - a) * (place - at)) for a, b in zip(_CIVIDIS[at], _CIVIDIS[at + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` columns of text, wide (Chinese) characters counting two."""
    import unicodedata

    used = 0
    for at, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > limit:
            return text[: max(at - 1, 1)] + "…"
    return text
