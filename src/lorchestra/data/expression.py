"""Jinja2 over the columns of a row, in :mod:`lorchestra.data.sandbox`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from lorchestra.data.sandbox import MAX_WORK, WORK, compile_template, compile_value
from lorchestra.errors import DataError

MAX_OUTPUT = 4_000_000

_TOO_MUCH = (
    f"this goes through more than {MAX_WORK:,} characters and items for one row. Loops over long texts, loops in loops "
    "and repeated joining or replacing are what costs; do with less of them, or prepare the column outside lorchestra"
)
_IS_TEMPLATE = re.compile(r"\{\{|\{%")


def is_template(text: str) -> bool:
    """Whether ``text`` holds Jinja2 (and is therefore not the name of a column)."""
    return _IS_TEMPLATE.search(text) is not None


class Expression:
    """A compiled template, or with ``value=True`` an expression whose value counts, not its text.

    Args:
        text: Jinja2. It sees every column by its name, and ``row['any name']``.
        purpose: where it stands in the recipe, for messages: ``where``, ``fields.prompt``.

    Raises:
        DataError: it cannot be compiled, or uses what the sandbox refuses.
    """

    def __init__(self, text: str, purpose: str, value: bool = False) -> None:
        self.text, self.purpose = text, purpose
        try:
            self._evaluate = compile_value(text) if value else _rendered(compile_template(text))
        except jinja2.TemplateError as error:
            raise DataError(f"{purpose}: {text!r} is not valid Jinja2: {error.message}") from error
        except (
            RecursionError,
            MemoryError,
            SyntaxError,
            ValueError,
        ) as error:  # of Python, which templates are compiled to
            why = "the expression is nested too deeply" if not isinstance(error, ValueError) else str(error)
            raise DataError(f"{purpose}: {text[:80]!r}: {why}") from error

    def __call__(self, row: Mapping[str, Any]) -> Any:
        """The text (or value) for one row.

        Raises:
            DataError: a column that is not there, something the sandbox refuses, an operation that fails.
        """
        WORK.begin(MAX_WORK, _TOO_MUCH)
        try:
            result = self._evaluate({"row": row, **row})
            if isinstance(result, jinja2.Undefined):
                str(result)  # raises, and says what is not defined
            return result
        except jinja2.UndefinedError as error:
            raise DataError(f"{self.purpose}: {error.message}. {_columns(row, error.message or '')}") from error
        except SecurityError as error:
            raise DataError(f"{self.purpose}: refused by the sandbox: {error}") from error
        except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError(f"{self.purpose}: {self.text!r} failed: {type(error).__name__}: {error}") from error


def _rendered(template: jinja2.Template) -> Callable[[Mapping[str, Any]], str]:
    def render(row: Mapping[str, Any]) -> str:
        parts, length = [], 0
        for part in template.generate(row):
            length += len(part)
            if length > MAX_OUTPUT:
                raise SecurityError(f"the text is longer than {MAX_OUTPUT:,} characters")
            parts.append(part)
        return "".join(parts)

    return render


def _columns(row: Mapping[str, Any], message: str) -> str:
    quoted = re.findall(r"'([^']+)'", message)
    near = [match for name in quoted for match in get_close_matches(name, list(row), n=1)]
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}The row has the columns {', '.join(map(str, row))}."
