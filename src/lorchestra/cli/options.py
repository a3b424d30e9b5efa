"""Options and arguments that several verbs share, and how references to adapters are read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.cli.completion import adapters, among
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.data.load import DataSpec

PLAIN_DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPES = (*PLAIN_DTYPES, "nf4")
FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "choice", "preference")

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or mps.", autocompletion=among("auto", "cpu", "cuda", "mps"))
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="auto, float32, bfloat16, float16, or nf4: 4 bits.", autocompletion=among(*DTYPES)),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="DIR[=WEIGHT]",
        help="An adapter and its weight (1). Repeat for a sum.",
        autocompletion=adapters,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="auto, messages, sharegpt, alpaca, prompt_completion, choice or preference.",
        autocompletion=among(*FORMATS),
        rich_help_panel="Data",
    ),
]
Field = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="PART=COLUMN",
        help="As in prompt=question, completion='{{ answer }}'. Repeat.",
        rich_help_panel="Data",
    ),
]


def either_dash(name: str) -> str:
    """An option's name with ``_`` for ``-``: ``--lora-rank`` is ``--lora_rank`` (typer's ``token_normalize_func``)."""
    return name.replace("-", "_")


@dataclass(frozen=True)
class Weighted:
    """An adapter named on the command line."""

    source: str
    weight: float


def weighted(text: str) -> Weighted:
    """``DIR`` or ``DIR=WEIGHT``, the weight after the last ``=``; a directory that is there may have ``=`` in its name.

    Raises:
        UserError: the weight is not a finite number.
    """
    source, sign, weight = text.rpartition("=")
    if not sign or Path(text).is_dir():
        return Weighted(text, 1.0)
    return Weighted(source, number(weight, f"{text!r}: write ADAPTER=WEIGHT, as in ./clinic=0.5"))


def number(text: str, context: str) -> float:
    """A finite float; ``context`` opens the message.

    Raises:
        UserError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{context}; {text!r} is not a finite number")
    return value


def distinct(members: list[Weighted]) -> dict[str, Weighted]:
    """Name → member: the last parts of its path, as many as it takes to tell the names apart.

    Raises:
        UserError: the same adapter is given twice.
    """
    places = [Path(member.source).resolve() for member in members]
    for place, member in zip(places, members, strict=True):
        if places.count(place) > 1:
            raise UserError(f"adapter {member.source!r} is given twice; give it once, with the sum of its weights")
    length = dict.fromkeys(places, 1)
    while True:
        names = ["/".join(place.parts[-length[place] :]) for place in places]
        clashing = [place for place, name in zip(places, names, strict=True) if names.count(name) > 1]
        if not clashing:
            return dict(zip(names, members, strict=True))
        length |= {place: length[place] + 1 for place in clashing}


def named_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Name → source, of ``NAME=DIR`` or ``DIR``; a directory that is there may have ``=`` in its name.

    Raises:
        UserError: half of ``NAME=DIR``, or two adapters of one name.
    """
    given: list[tuple[str, str]] = []
    for text in texts:
        name, sign, source = text.partition("=")
        if sign and not Path(text).is_dir() and not text.startswith(("hf:", "pip:")):
            if not name.strip() or not source.strip():
                raise UserError(f"{text!r}: write NAME=DIRECTORY, or the directory alone")
            given.append((name.strip(), source.strip()))
        else:
            given.append(("", text))
    unnamed = [source for name, source in given if not name]
    twice = [source for source in unnamed if unnamed.count(source) > 1]
    if twice:
        raise UserError(f"adapter {twice[0]!r} is given twice; once is enough")
    short = {member.source: name for name, member in distinct([Weighted(source, 1.0) for source in unnamed]).items()}
    out: dict[str, str] = {}
    for name, source in given:
        name = name or short[source]
        if name in out:
            raise UserError(
                f"two adapters are called {name!r} ({out[name]} and {source}); give them names of their own"
            )
        out[name] = source
    return out


def one_of(flag: str, value: str, known: Sequence[str]) -> str:
    """``value``, if it is among ``known``.

    Raises:
        UserError: it is not; the message names the nearest.
    """
    if value not in known:
        near = difflib.get_close_matches(value, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{flag} {value!r} is unknown; there are {', '.join(known)}{hint}")
    return value


def refuse_overwriting(out: Path, members: list[Weighted]) -> None:
    """A result must not take the place of what it is made from.

    Raises:
        UserError: ``out`` is one of the members.
    """
    for member in members:
        if Path(member.source).resolve() == out.resolve():
            raise UserError(
                f"--output_dir {out} is adapter {member.source!r}, which is needed as it is; choose another"
            )


def listed(texts: list[str]) -> list[str]:
    """Sources written with commas between them; a file whose own name has a comma is taken whole."""
    return [
        source
        for text in texts
        for source in ([text] if Path(text).expanduser().exists() else [part.strip() for part in text.split(",")])
        if source
    ]


def fields_of(texts: list[str] | None) -> dict[str, str]:
    """``PART=COLUMN``, … as part → column or template.

    Raises:
        UserError: no ``=``, or nothing after it.
    """
    fields = {}
    for text in texts or ():
        part, _, column = text.partition("=")
        if not column.strip():
            raise UserError(
                f"--field {text!r}: write PART=COLUMN, as in prompt=question, completion='{{{{ answer }}}}'"
            )
        fields[part.strip()] = column.strip()
    return fields


def domains(
    texts: list[str], format: str, field: list[str] | None, system: str | None
) -> dict[str, tuple[DataSpec, ...]]:
    """Domain → what it is read from, of ``NAME=FILE`` or ``FILE`` (then the file's name without its ending).

    Raises:
        UserError: half of ``NAME=FILE``, or two domains of one name.
    """
    from lorchestra.data.load import DataSpec

    out: dict[str, tuple[DataSpec, ...]] = {}
    for text in texts:
        name, sign, source = text.partition("=")
        whole = not sign or Path(text).exists() or text.startswith(("hf:", "pip:"))
        if not whole and not (name.strip() and source.strip()):
            raise UserError(f"--data {text!r}: write NAME=FILE, or the file alone")
        source, name = (text, Path(text).stem) if whole else (source.strip(), name.strip())
        if name in out:
            raise UserError(f"two --data are called {name!r}; give them names of their own, as in first={source}")
        out[name] = tuple(
            DataSpec(part, format=format, fields=fields_of(field), system=system) for part in listed([source])
        )
    return out
