"""The naming convention: ``medical_diagnosis_v2_20250315``, ``legal_contract_review_dpo_tuned``.

A *full name* is, in this order and parted by single ``_``,

    domain _ task [_ task …] [_ vN] [_ YYYYMMDD] [_ tag …]

Domain and task are words: small letters and digits, the first a letter. A word of a tag, a version or a date is no
word of a task, so a name reads in one way only. Tags are those of :data:`TAGS`, each once, in the order of the table.

The convention is advised, not asked for: the registry takes any name that
:func:`lorchestra.registry.reference.check_name` does. What a full name means there:

- domain, task and tags are the name under which versions are kept: what was tuned with DPO is another line of versions
  than what was not;
- the version is the selector: ``medical_diagnosis_v2`` and ``medical_diagnosis@v2`` are the same;
- date and tags are labels, by which versions are found.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import NoReturn, Self

from lorchestra.errors import UserError
from lorchestra.registry.reference import LONGEST, Reference, parse_reference

FORM = "domain_task[_vN][_YYYYMMDD][_tag…], as in medical_diagnosis_v2_20250315 or legal_contract_review_dpo_tuned"
# In the order in which they stand in a name: how it was trained, what was done with it, in which form it is kept.
TAGS = MappingProxyType(
    {
        "pt": "continued pre-training on text",
        "sft": "supervised fine-tuning on answers",
        "dpo_tuned": "tuned on preferences (DPO and its relatives)",
        "rslora": "trained with rank-stabilised scaling, α/√r",
        "fused": "several adapters fused into one",
        "compressed": "brought to a lower rank",
        "merged": "merged into the weights of its base",
        "quantized": "for, or as, quantised weights",
    }
)
_TAG_WORDS = {word: tag for tag in TAGS for word in tag.split("_")}
_WORD = re.compile(r"[a-z][a-z0-9]*", re.ASCII)
_VERSION = re.compile(r"v[0-9]+", re.ASCII)
_GOOD_VERSION = re.compile(r"v(0|[1-9][0-9]{0,8})", re.ASCII)
_DIGITS = re.compile(r"[0-9]+", re.ASCII)
_DATED = re.compile(r"_(v[0-9]+|[0-9]{8})(_|\Z)", re.ASCII)
_CAPITALS = re.compile(r"[A-Za-z0-9]*[A-Z][A-Za-z0-9]*", re.ASCII)


@dataclass(frozen=True)
class FullName:
    """A name by the convention.

    Args:
        domain: one word.
        task: one or more words.
        version: of ``_vN``; ``None`` where none is named.
        date: ``None`` where none is named.
        tags: of :data:`TAGS`, in its order.

    Raises:
        UserError: not by the grammar.
    """

    domain: str
    task: tuple[str, ...]
    version: int | None = None
    date: date | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if _read(str(self)) != (self.domain, self.task, self.version, self.date, self.tags):
            raise UserError(f"{str(self)!r} would be read otherwise than it was put together; expected {FORM}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The parts of ``medical_diagnosis_v2_20250315``.

        Raises:
            UserError: not by the grammar; the message quotes the part that is wrong and says what was expected there.
        """
        return cls(*_read(text))

    def __str__(self) -> str:
        version = [] if self.version is None else [f"v{self.version}"]
        day = [] if self.date is None else [self.date.isoformat().replace("-", "")]
        return "_".join([self.domain, *self.task, *version, *day, *self.tags])

    @property
    def name(self) -> str:
        """Under which its versions are kept: domain, task and tags, without version and date."""
        return "_".join([self.domain, *self.task, *self.tags])

    @property
    def labels(self) -> tuple[str, ...]:
        """What a version pushed under this name is tagged with: its date (``20250315``), then its tags."""
        day = () if self.date is None else (self.date.isoformat().replace("-", ""),)
        return (*day, *self.tags)

    def reference(self) -> Reference:
        """``medical_diagnosis@v2`` of ``medical_diagnosis_v2_20250315``; without a version, the name alone."""
        return Reference(self.name, "" if self.version is None else f"v{self.version}")


def as_reference(text: str) -> Reference:
    """What ``text`` names in the registry: a full name with a version or date is read as one, all else as it stands.

    Args:
        text: ``clinic``, ``clinic@v2``, ``medical_diagnosis_v2_20250315``, ``medical_diagnosis_20250315@production``.

    Raises:
        UserError: no reference, or one that names two versions (``medical_diagnosis_v2@v3``).
    """
    return meant(parse_reference(text))


@lru_cache(4096)
def meant(given: Reference) -> Reference:
    """What ``given`` names in the registry; see :func:`as_reference`.

    Raises:
        UserError: it names two versions.
    """
    full = full_name(given.name)
    if full is None:
        return given
    own = full.reference()
    if not own.selector or own.selector == given.selector:
        return Reference(own.name, given.selector)
    if given.selector:
        raise UserError(
            f"'{given}' names {own.selector} and {given.selector}; write {own} or {own.name}@{given.selector}"
        )
    return own


def full_name(name: str) -> FullName | None:
    """The full name that ``name`` is; ``None`` for a plain one."""
    try:
        return FullName.parse(name)
    except UserError:
        return None


def almost(name: str) -> str:
    """Why a name that has a version or a date is no full name all the same; empty if it is one, or has neither."""
    if not _DATED.search(name):
        return ""
    try:
        FullName.parse(name)
    except UserError as error:
        return str(error)
    return ""


def _read(text: str) -> tuple[str, tuple[str, ...], int | None, date | None, tuple[str, ...]]:
    if len(text) > LONGEST:
        raise UserError(f"a name of {len(text):,} characters; at most {LONGEST} may be. Expected {FORM}")
    parts = text.split("_")
    for place, part in enumerate(parts):
        _check_letters(text, part, place)
    words = 0
    while words < len(parts) and _WORD.fullmatch(parts[words]) and not _belongs_later(parts[words]):
        words += 1
    if words < 2:
        wanted = ("a domain, one word", "a task, one word or more")[words]
        _refuse(text, parts[words] if words < len(parts) else "", f"{wanted}, should stand here")
    rest = parts[words:]
    version = int(_version(text, rest.pop(0))) if rest and _VERSION.fullmatch(rest[0]) else None
    day = _date(text, rest.pop(0)) if rest and _DIGITS.fullmatch(rest[0]) else None
    return parts[0], tuple(parts[1:words]), version, day, _tags(text, rest, version, day)


def _check_letters(text: str, part: str, place: int) -> None:
    if not part:
        where = "at the beginning" if place == 0 else f"after {'_'.join(text.split('_')[:place])!r}"
        _refuse(text, "", f"an empty part {where}; single '_' stand between the parts, none before or after them")
    if _CAPITALS.fullmatch(part):
        _refuse(text, part, f"capital letters are not used; write {part.lower()}")
    if not (_WORD.fullmatch(part) or _DIGITS.fullmatch(part)):
        _refuse(text, part, "a part has small letters (a to z) and digits, and is a date or begins with a letter")


def _belongs_later(part: str) -> bool:
    return part in _TAG_WORDS or bool(_VERSION.fullmatch(part))


def _version(text: str, part: str) -> str:
    if not _GOOD_VERSION.fullmatch(part):
        _refuse(text, part, "a version is v and a number of up to nine digits without leading zeros, as in v2")
    return part[1:]


def _date(text: str, part: str) -> date:
    if len(part) != 8:
        _refuse(text, part, "a date has eight digits, year, month and day, as in 20250315")
    try:
        return date(int(part[:4]), int(part[4:6]), int(part[6:]))
    except ValueError as error:
        _refuse(text, part, f"no day of the calendar ({error})")


def _tags(text: str, parts: list[str], version: int | None, day: date | None) -> tuple[str, ...]:
    tags: list[str] = []
    while parts:
        tag = _TAG_WORDS.get(parts[0], parts[0])
        count = tag.count("_") + 1
        if tag in TAGS and parts[:count] == tag.split("_"):
            tags.append(tag)
            del parts[:count]
            continue
        _refuse(text, parts[0], _no_tag(parts, version, day))
    for first, second in pairwise(tags):
        if first == second:
            _refuse(text, second, "a tag stands once")
        if list(TAGS).index(first) > list(TAGS).index(second):
            right = [tag for tag in TAGS if tag in tags]
            _refuse(text, second, f"it stands before {first}: tags have one order, here {'_'.join(right)}")
    return tuple(tags)


def _no_tag(parts: list[str], version: int | None, day: date | None) -> str:
    if _VERSION.fullmatch(parts[0]):
        return "a second version" if version is not None else "the version stands before the date and the tags"
    if _DIGITS.fullmatch(parts[0]):
        return "a second date" if day is not None else "the date stands before the tags"
    owner = _TAG_WORDS.get(parts[0])
    tried = [parts[0]] if owner else ["_".join(parts[:2]), parts[0]]
    near = owner or next((close[0] for word in tried if (close := difflib.get_close_matches(word, TAGS, 1))), "")
    meant = f"; did you mean {near}?" if near else ""
    return f"no tag{meant} Tags are {', '.join(TAGS)}" if meant else f"no tag; tags are {', '.join(TAGS)}"


def _refuse(text: str, part: str, why: str) -> NoReturn:
    where = f"{part!r}: " if part else ""
    raise UserError(f"{text!r} is no full name: {where}{why}. Expected {FORM}")
