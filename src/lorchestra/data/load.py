"""A source named in a recipe → examples, with a plain account of how it was read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from lorchestra.data.example import Example, Message
from lorchestra.data.expression import Expression
from lorchestra.data.formats import Draft, Row, detect, expected, known_format, named
from lorchestra.data.mapping import FieldMapping, read_cell
from lorchestra.data.records import Record, read_records
from lorchestra.data.split import normalise
from lorchestra.data.turns import Unusable, text_of
from lorchestra.errors import DataError, counted
from lorchestra.events import SILENT, Reporter

SAMPLE = 50  # rows looked at to find the format


@dataclass(frozen=True)
class DataSpec:
    """One source of a stage.

    Args:
        source: a path, ``hf:org/name@revision``, ``pip:distribution==version/path/inside``.
        format: ``auto``, or a name of :data:`lorchestra.data.formats.FORMATS`.
        fields: part → column or template, for data in no known format; see :class:`FieldMapping`.
        group: column or template of what must not be parted by the split; by default the first question.
        where: Jinja2 expression over the columns; rows for which it is false are left out.
        limit: read no further than this many examples.
        system: a system prompt for the rows that have none.
    """

    source: str
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    where: str | None = None
    limit: int | None = None
    system: str | None = None


@dataclass(frozen=True)
class Loaded:
    """What a source gave.

    Args:
        examples: in the order of the source.
        format: the format it was read as; of a field mapping, the kind of example it makes.
        rows: rows read.
        dropped: reason → rows left out for it.
        digest: SHA-256 over the examples (not over their origins), hex.
        source: as in the recipe.
        how: ``detected``, ``named in the recipe`` or ``field mapping``.
        columns: part → the column or template it was read from.
        unread: columns that nothing was read from.
        content: SHA-256 of the file or directory itself, however it was read, hex.
    """

    examples: tuple[Example, ...]
    format: str
    rows: int
    dropped: Mapping[str, int]
    digest: str
    source: str = ""
    how: str = "detected"
    columns: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    content: str = ""

    def describe(self) -> str:
        """The account in one or two lines, for people."""
        parts = ", ".join(p if p == c else f"{p} ← {_short(c)}" for p, c in self.columns.items())
        text = f"{self.source}: {self.format} ({self.how}; {parts}); "
        text += f"{counted(self.rows, 'row')}, {counted(len(self.examples), 'example')}"
        if self.dropped:
            text += "; left out: " + ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        if self.unread:
            text += f"\n  columns not read: {', '.join(self.unread)}"
        return text


def check_spec(spec: DataSpec, task: Literal["sft", "dpo"]) -> None:
    """Look at ``spec`` itself, before anything is fetched.

    Raises:
        DataError: an unknown format, fields that make no example, a template or condition that does not compile.
    """
    _Reader(spec, task)


def load_examples(
    spec: DataSpec,
    task: Literal["sft", "dpo"],
    *,
    relative_to: Path | None = None,
    reporter: Reporter = SILENT,
    fetch: bool = True,
) -> Loaded:
    """Read ``spec`` for a stage of kind ``task``.

    A row that has nothing to learn from (an empty answer, chosen equal to rejected) is left out and counted; a row
    of another shape is an error.

    Raises:
        DataError: names file and row, what was got, what was expected.
        SourceError: the source cannot be found or fetched, or is not here and ``fetch`` is false.
    """
    from lorchestra.base.locate import content_sha256, locate

    # Before anything is fetched: what is wrong with the recipe itself.
    reader = _Reader(spec, task)
    path = locate(spec.source, relative_to=relative_to, reporter=reporter, repo_type="dataset", fetch=fetch)
    name = spec.source if path.is_dir() else path.name
    loaded = replace(reader.read(read_records(path, name), name), content=content_sha256(path))
    reporter.say(loaded.describe())
    reporter.event("data", source=spec.source, format=loaded.format, rows=loaded.rows, dropped=dict(loaded.dropped),
                   examples=len(loaded.examples), digest=loaded.digest)  # fmt: skip
    return loaded


class _Reader:
    """``spec``, compiled."""

    def __init__(self, spec: DataSpec, task: str) -> None:
        if spec.fields and spec.format != "auto":
            raise DataError(
                f"{spec.source}: got format {spec.format!r} and fields; keep one of them (fields say how to read all)"
            )
        if spec.format != "auto":
            known_format(spec.format)
        if spec.limit is not None and spec.limit < 1:
            raise DataError(f"{spec.source}: limit is {spec.limit}; expected a number of examples, at least 1")
        self.spec, self.task = spec, task
        self.mapping = FieldMapping(spec.fields) if spec.fields else None
        self.where = Expression(spec.where, "where", value=True) if spec.where else None
        self.group = read_cell(spec.group, "group") if spec.group else None

    def read(self, records: Iterable[Record], name: str) -> Loaded:
        stream = iter(records)
        sample = list(islice(stream, SAMPLE))
        if not sample:
            raise DataError(f"{name} has no rows; expected at least one example")
        convert, columns, shape, how = self._shape([record.values for record in sample], name)
        examples: list[Example] = []
        dropped: Counter[str] = Counter()
        rows = 0
        for record in chain(sample, stream):
            if self.spec.limit is not None and len(examples) >= self.spec.limit:
                break
            rows += 1
            try:
                if self.where is not None and not self.where(record.values):
                    raise Unusable("by where")
                examples.append(self._example(convert(record.values), record))
            except Unusable as reason:
                dropped[str(reason)] += 1
            except DataError as error:
                raise DataError(f"{record.origin}: {error}") from error
        if not examples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise DataError(
                f"{name}: {counted(rows, 'row')}, and none gives an example ({reasons}); check where and the columns"
            )
        used = set(columns.values()) | {self.spec.group}
        return Loaded(
            examples=tuple(examples),
            format=shape,
            rows=rows,
            dropped=dict(dropped),
            digest=digest(examples),
            source=self.spec.source,
            how=how,
            columns=columns,
            unread=tuple(
                str(column) for column in sample[0].values if not any(_mentions(text, column) for text in used if text)
            ),
        )

    def _shape(self, rows: Sequence[Row], name: str) -> tuple[Callable[[Row], Draft], Mapping[str, str], str, str]:
        if self.mapping is not None:
            return self.mapping.convert, self.mapping.columns, self.mapping.kind, "field mapping"
        automatic = self.spec.format == "auto"
        form, columns = detect(rows, name) if automatic else named(self.spec.format, rows, name)
        needed = [columns[part] for part in form.required]

        def convert(row: Row) -> Draft:
            if missing := [column for column in needed if column not in row]:
                raise DataError(f"no column {', '.join(map(repr, missing))}. {expected(row, [form])}")
            return form.convert(row, columns)

        return convert, columns, form.name, "detected" if automatic else "named in the recipe"

    def _example(self, draft: Draft, record: Record) -> Example:
        for text, what in ((draft.gold, "empty answer"), (draft.rejected, "empty rejected answer")):
            if text is not None and not text.strip():
                raise Unusable(what)
        if not any(turn.content.strip() for turn in draft.prompt if turn.role != "system"):
            raise Unusable("empty prompt")
        if self.task == "dpo" and draft.rejected is None:
            raise DataError(
                "a dpo stage needs pairs, and this row has no rejected answer; expected prompt, chosen, rejected, or "
                "fields: {prompt: …, chosen: …, rejected: …}"
            )
        prompt = draft.prompt
        if self.spec.system and prompt[0].role != "system":
            prompt = (Message("system", self.spec.system), *prompt)
        return Example(
            messages=(*prompt, Message("assistant", draft.gold)),
            rejected=draft.rejected,
            choices=draft.choices,
            group=normalise(self._group(record.values, draft)),
            origin=record.origin,
        )

    def _group(self, row: Row, draft: Draft) -> str:
        group: Any = None
        if self.group is not None:
            group = self.group(row)
        elif self.mapping is not None:
            group = self.mapping.group(row)
        if group is None or not str(group).strip():
            # The first question: a longer conversation that begins with it must not be parted from it.
            return next(turn.content for turn in draft.prompt if turn.role != "system" and turn.content.strip())
        return text_of(group, "group")


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) over what the examples say and how they are grouped, in order."""
    last = hashlib.sha256().hexdigest()
    for last in digests(examples):  # noqa: B007 (the last is what is wanted)
        pass
    return last


def digests(examples: Iterable[Example]) -> Iterator[str]:
    """:func:`digest` of the first example, of the first two, and so on: those of the source under every ``limit``."""
    total = hashlib.sha256()
    for example in examples:
        turns = [[turn.role, turn.content] for turn in example.messages]
        line = json.dumps([turns, example.rejected, list(example.choices), example.group], ensure_ascii=False)
        total.update(line.encode() + b"\n")
        yield total.hexdigest()


def _mentions(text: str, column: str) -> bool:
    return text == column or (("{{" in text or "{%" in text) and str(column) in text)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"
