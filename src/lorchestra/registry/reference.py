"""How adapters are called: ``name``, ``name@v2``, ``name@production``, ``name@sha256:…``, and mixtures of them.

A name is ASCII: it goes into URLs, headers, metric labels and file names, and of two letters that look alike to a
reader only one should exist. It has no path separator and no run of dots, so it can never be a path out of anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from lorchestra.errors import UserError, counted

RESERVED = frozenset({"auto"})  # besides these, the base's name and the names of gates, which their owner passes
LONGEST = 128  # characters of a name
MOST = 64  # members of a mixture
LONGEST_TEXT = 8192  # characters of a whole reference or mixture

_NAME = re.compile(rf"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.|\Z)){{0,{LONGEST - 1}}}", re.ASCII)
_VERSION = re.compile(r"v(0|[1-9][0-9]{0,8})", re.ASCII)
_LOOKS_LIKE_A_VERSION = re.compile(r"v[0-9]+", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{12,64}", re.ASCII)
# No + in a weight: it parts the members.
_WEIGHT = re.compile(r"-?(?:[0-9]{1,20}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE]-?[0-9]{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """One adapter.

    Args:
        name: of it.
        selector: which of that name: ``v2``, an alias (``production``), ``sha256:`` and at least 12 hexadecimal digits
            of its digest; empty for whatever goes by the name.

    Raises:
        UserError: not by the grammar.
    """

    name: str
    selector: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.selector:
            _check_selector(self.selector)

    @property
    def version(self) -> int | None:
        """2 of ``@v2``."""
        return int(self.selector[1:]) if _VERSION.fullmatch(self.selector) else None

    @property
    def digest(self) -> str:
        """``sha256:…``, perhaps shortened; empty where none is named."""
        return self.selector if self.selector.startswith("sha256:") else ""

    @property
    def alias(self) -> str:
        """``production`` of ``@production``; empty where none is named."""
        return "" if self.version is not None or self.digest else self.selector

    def __str__(self) -> str:
        return f"{self.name}@{self.selector}" if self.selector else self.name


@dataclass(frozen=True)
class Mixture:
    """A sum of adapters: reference and coefficient, in the order in which it was written.

    Raises:
        UserError: no members, too many, one of them twice, or a coefficient that is not finite.
    """

    members: tuple[tuple[Reference, float], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.members) <= MOST:
            raise UserError(f"a mixture has 1 to {MOST} members, this one {len(self.members)}")
        seen = set[Reference]()
        for reference, weight in self.members:
            if not math.isfinite(weight):
                raise UserError(f"the weight of {reference} is {weight}, not a finite number")
            if reference in seen:
                raise UserError(f"{reference} is in the mixture twice; name it once, with the sum of its weights")
            seen.add(reference)

    def __str__(self) -> str:
        if len(self.members) == 1 and self.members[0][1] == 1.0:
            return str(self.members[0][0])
        return "+".join(f"{reference}={_written(weight)}" for reference, weight in self.members)


def check_name(name: str, reserved: Collection[str] = RESERVED) -> None:
    """Whether ``name`` may be given to an adapter.

    Raises:
        UserError: it may not; the message says why.
    """
    if not name:
        raise UserError("an adapter's name is empty; give it one, as in clinic")
    if len(name) > LONGEST:
        raise UserError(f"the name {_short(name)} has {counted(len(name), 'character')}; at most {LONGEST} may be")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{_short(name)} is no name for an adapter: letters (a to z), digits, '_', '-' and single dots inside, the "
            "first a letter, a digit or '_', as in clinic-v1.5"
        )
    if name in reserved:
        raise UserError(f"the name {name!r} is reserved; choose another")


def parse_reference(text: str) -> Reference:
    """``name`` or ``name@selector``.

    Raises:
        UserError: not by the grammar; the message says where.
    """
    _check_length(text)
    name, sign, selector = text.partition("@")
    if sign and not selector:
        raise UserError(f"{_short(text)}: nothing follows the '@'; write name@v2, name@production or name@sha256:…")
    return Reference(name, selector)


def is_mixture(text: str) -> bool:
    """Whether ``text`` has weights, well written or not; a name or reference has none."""
    return "=" in text


def parse_mixture(text: str) -> Mixture:
    """``a=0.3+b=0.5+c=-0.2``, or a reference alone, which is itself at 1.

    Raises:
        UserError: not by the grammar; the message says which member.
    """
    _check_length(text)
    if not is_mixture(text) and "+" not in text:
        return Mixture(((parse_reference(text), 1.0),))
    parts = text.split("+")
    if len(parts) > MOST:
        raise UserError(f"a mixture has at most {MOST} members, this one {len(parts)}")
    return Mixture(tuple(_member(part, text) for part in parts))


def _member(part: str, text: str) -> tuple[Reference, float]:
    reference, sign, weight = part.rpartition("=")
    if not part or not sign:
        what = f"{_short(part)} has no weight" if part else "a member is missing beside a '+'"
        raise UserError(f"mixture {_short(text)}: {what}; write name=weight for each, as in general=0.3+clinic=0.5")
    if not _WEIGHT.fullmatch(weight) or not math.isfinite(float(weight)):
        raise UserError(
            f"mixture {_short(text)}: the weight {_short(weight)} of {_short(reference)} is no plain finite number, as "
            "in 0.5, -0.2 or 1e-3 (no blanks, and no '+', which parts the members)"
        )
    return parse_reference(reference), float(weight)


def _check_selector(selector: str) -> None:
    if selector.startswith("sha256:"):
        if not _DIGEST.fullmatch(selector):
            raise UserError(
                f"{_short(selector)} is no digest: write sha256: and 12 to 64 hexadecimal digits (0-9, a-f)"
            )
    elif _LOOKS_LIKE_A_VERSION.fullmatch(selector):
        if not _VERSION.fullmatch(selector):
            raise UserError(f"{_short(selector)} is no version: write v and a number without leading zeros, as in v2")
    elif not _ALIAS.fullmatch(selector):
        raise UserError(
            f"{_short(selector)} is no version, alias or digest: after the '@' comes v2, a word of small letters, "
            "digits, '_' and '-' (production), or sha256:…"
        )


def _check_length(text: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise UserError(f"a reference of {len(text):,} characters; at most {LONGEST_TEXT:,} may be")


def _written(weight: float) -> str:
    """The shortest decimal that reads back as ``weight``, without the + of an exponent."""
    return repr(weight).replace("e+", "e").removesuffix(".0")


def _short(text: str) -> str:
    """The text as a message quotes it."""
    return repr(text if len(text) <= 60 else text[:57] + "…")
