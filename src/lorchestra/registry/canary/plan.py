"""The plan of a canary: which shares of the users, and how long each is held."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lorchestra.errors import UserError
from lorchestra.registry.canary.traffic import check_share

MOST_STEPS = 20
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Plan:
    """Steps and hold.

    Args:
        steps: shares of the users, growing, above 0 and at most 1.
        hold: how long each step lasts at least.
        promote: move the alias when the last step is over, without being asked.

    Raises:
        UserError: no steps, too many, shares that do not grow, or a negative hold.
    """

    steps: tuple[float, ...] = (0.01, 0.05, 0.25, 0.5, 1.0)
    hold: timedelta = timedelta(minutes=10)
    promote: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.steps) <= MOST_STEPS:
            raise UserError(f"a canary has 1 to {MOST_STEPS} steps, this one {len(self.steps)}")
        for share in self.steps:
            check_share(share)
        if self.steps[0] <= 0 or any(b <= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            told = ", ".join(f"{100 * share:g} %" for share in self.steps)
            raise UserError(f"the shares of a canary grow from step to step, from above 0 to 100 %; got {told}")
        if self.hold < timedelta(0):
            raise UserError(f"a step is held for {self.hold.total_seconds():g} seconds; that is less than nothing")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"steps": list(self.steps), "hold": self.hold.total_seconds(), "promote": self.promote}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """From :meth:`to_json`."""
        return cls(tuple(values["steps"]), timedelta(seconds=values["hold"]), values["promote"])


def parse_duration(text: str) -> timedelta:
    """``90s``, ``10m``, ``1h30m``, ``2d``.

    Raises:
        UserError: it is none.
    """
    parts = re.findall(r"(\d{1,9})([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        raise UserError(f"{text!r} is no duration; write 90s, 10m, 1h30m or 2d")
    try:
        return timedelta(seconds=sum(int(number) * _UNITS[unit] for number, unit in parts))
    except OverflowError:
        raise UserError(f"{text!r} is longer than a canary can last; write 90s, 10m, 1h30m or 2d") from None


def duration(span: timedelta) -> str:
    """As :func:`parse_duration` reads it, rounded up to the second."""
    seconds = max(-int(-span.total_seconds() // 1), 0)
    found = ""
    for unit, size in reversed(_UNITS.items()):
        count, seconds = divmod(seconds, size)
        found += f"{count}{unit}" if count else ""
    return found or "0s"
