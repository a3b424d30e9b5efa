"""Options and arguments that several verbs share, and how references to adapters are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lorchestra.errors import UserError

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="DIR[=WEIGHT]", help="An adapter and its weight (1). Repeat for a sum."),
]


@dataclass(frozen=True)
class Weighted:
    """An adapter named on the command line."""

    source: str
    weight: float

    @property
    def name(self) -> str:
        """What to call it in tables: the last part of its source."""
        return Path(self.source.rstrip("/")).name


def weighted(text: str) -> Weighted:
    """``DIR`` or ``DIR=WEIGHT`` (the weight after the last ``=``).

    Raises:
        UserError: the weight is not a finite number.
    """
    source, sign, weight = text.rpartition("=")
    if not sign:
        return Weighted(text, 1.0)
    return Weighted(source, number(weight, text))


def number(text: str, inside: str) -> float:
    """A finite float.

    Raises:
        UserError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{inside!r}: {text!r} is not a weight; write ADAPTER=NUMBER, as in ./clinic=0.5")
    return value


def distinct(members: list[Weighted]) -> dict[str, Weighted]:
    """Name → member; the same last path part twice is told apart by its parent directory.

    Raises:
        UserError: the same adapter is given twice.
    """
    out: dict[str, Weighted] = {}
    for member in members:
        name = member.name
        if name in out:
            name = "/".join(Path(member.source.rstrip("/")).parts[-2:])
        if name in out:
            raise UserError(f"adapter {member.source!r} is given twice; add its weights instead")
        out[name] = member
    return out
