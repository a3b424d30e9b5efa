"""``fields`` of the recipe: each part of an example from a column or a template, for data of any shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from lorchestra.data.expression import Expression, is_template
from lorchestra.data.formats import FORMATS, Draft, Row
from lorchestra.data.turns import answer_of, options_of
from lorchestra.errors import DataError

TARGETS = ("system", "messages", "prompt", "completion", "chosen", "rejected", "choices", "group")
KINDS: dict[str, frozenset[str]] = {
    "preference": frozenset({"prompt", "chosen", "rejected"}),
    "choice": frozenset({"prompt", "completion", "choices"}),
    "messages": frozenset({"messages"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
}


def read_cell(text: str, purpose: str) -> Callable[[Row], Any]:
    """A function from row to value: of the column named ``text``, or of the template that it is.

    Raises (the function returned): DataError: no such column, with the nearest name; a template that fails.
    """
    if is_template(text):
        return Expression(text, purpose)

    def read(row: Row) -> Any:
        if text in row:
            return row[text]
        near = get_close_matches(text, list(row), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{purpose}: there is no column {text!r}. {hint}The row has the columns {', '.join(map(str, row))}; "
            "a text of your own with columns in it is written with {{ column }}."
        )

    return read


def _read_choices(text: str) -> Callable[[Row], Any]:
    """Choices keep their type: ``{{ [opa, opb] }}`` is a list, an option may contain a line break."""
    inner = text.strip()
    if inner.startswith("{{") and inner.endswith("}}"):
        try:
            return Expression(inner[2:-2], "fields.choices", value=True)
        except DataError:
            pass  # several expressions, or text between them: a template, one option a line
    return read_cell(text, "fields.choices")


class FieldMapping:
    """``fields``, compiled.

    Args:
        fields: part (:data:`TARGETS`) → name of a column, or Jinja2 over the columns when it contains ``{{`` or ``{%``.

    Raises:
        DataError: an unknown part, parts that do not make an example, a template that does not compile.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        for target in fields:
            if target not in TARGETS:
                near = get_close_matches(target, TARGETS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise DataError(f"fields: unknown part {target!r}; expected {', '.join(TARGETS)}.{hint}")
        parts = frozenset(fields) - {"system", "group"}
        kind = next((kind for kind, needed in KINDS.items() if needed == parts), None)
        if kind is None:
            expected = "; ".join(f"{', '.join(sorted(needed))} ({kind})" for kind, needed in KINDS.items())
            raise DataError(
                f"fields: got {', '.join(sorted(parts)) or 'nothing'}; expected one of these sets: {expected}; "
                "and with any of them system and group"
            )
        self.kind = kind
        self.columns = dict(fields)
        self._read = {
            target: _read_choices(text) if target == "choices" else read_cell(text, f"fields.{target}")
            for target, text in fields.items()
        }

    def convert(self, row: Row) -> Draft:
        """One row, by the same conversion that the format of this kind uses."""
        values = {target: read(row) for target, read in self._read.items() if target != "group"}
        same = {target: target for target in values}
        if self.kind == "choice":
            # As written: where the recipe's prompt lists the options with their labels, the answer has its label too.
            options = options_of(values["choices"], "fields.choices")
            gold = options.written[answer_of(values["completion"], options, "fields.completion")]
            draft = FORMATS["prompt_completion"].convert(values | {"completion": gold}, same)
            return Draft(draft.prompt, draft.gold, choices=options.written)
        return FORMATS[self.kind].convert(values, same)

    def group(self, row: Row) -> Any:
        """What ``fields.group`` gives; ``None`` without it, or where the row has none."""
        return self._read["group"](row) if "group" in self._read else None
