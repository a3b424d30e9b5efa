"""Jinja2 over the columns of a row, in a sandbox: recipes are shared, so their expressions are not trusted.

Beyond Jinja2's own sandbox (no private attributes, nothing mutable) what could take for ever or eat the memory is
refused: long ranges, deep loops, repetition, powers, padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorchestra.errors import DataError

MAX_RANGE = 1_000
MAX_LOOPS = 2
MAX_REPEAT = 10_000
MAX_OUTPUT = 4_000_000

# fmt: off
FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "join",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim",
    "truncate", "unique", "upper", "wordcount",
})
# fmt: on
PADDING = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"})
REFUSED = (nodes.Macro, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise OverflowError(f"a range may have at most {MAX_RANGE:,} numbers, this one has {len(numbers):,}")
    return numbers


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in PADDING and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text formatting with % is not available here; use ~ to join texts")
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if isinstance(times, int) and len(sized) * times > MAX_REPEAT:
                raise OverflowError(f"a repetition may come to at most {MAX_REPEAT:,} characters or items")
        if operator == "**" and not (abs(left) <= MAX_REPEAT and abs(right) <= 64):
            raise OverflowError("a power of numbers this large is not available here")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Environment:
    environment = _Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.globals.clear()
    environment.globals.update(range=_range)
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    return environment


_ENVIRONMENT = _environment()
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
            parsed = _ENVIRONMENT.parse("{{ (" + text + ") }}" if value else text)
            _refuse(parsed, 0)
            if value:
                self._evaluate: Any = _ENVIRONMENT.compile_expression(text, undefined_to_none=False)
            else:
                self._evaluate = self._rendered(_ENVIRONMENT.from_string(text))
        except jinja2.TemplateError as error:
            raise DataError(f"{purpose}: {text!r} is not valid Jinja2: {error.message}") from error
        except RecursionError as error:
            raise DataError(f"{purpose}: the expression is nested too deeply") from error

    def __call__(self, row: Mapping[str, Any]) -> Any:
        """The text (or value) for one row.

        Raises:
            DataError: a column that is not there, something the sandbox refuses, an operation that fails.
        """
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

    @staticmethod
    def _rendered(template: jinja2.Template) -> Any:
        def render(row: Mapping[str, Any]) -> str:
            parts, length = [], 0
            for part in template.generate(row):
                length += len(part)
                if length > MAX_OUTPUT:
                    raise OverflowError(f"the text is longer than {MAX_OUTPUT:,} characters")
                parts.append(part)
            return "".join(parts)

        return render


def _refuse(node: nodes.Node, loops: int) -> None:
    if isinstance(node, REFUSED):
        raise jinja2.TemplateSyntaxError(f"{type(node).__name__.lower()} is not available here", node.lineno or 1)
    if isinstance(node, nodes.For):
        loops += 1
        if node.recursive or loops > MAX_LOOPS:
            raise jinja2.TemplateSyntaxError(f"loops may be at most {MAX_LOOPS} deep, and not recursive", node.lineno)
    for child in node.iter_child_nodes():
        _refuse(child, loops)


def _columns(row: Mapping[str, Any], message: str) -> str:
    quoted = re.findall(r"'([^']+)'", message)
    near = [match for name in quoted for match in get_close_matches(name, list(row), n=1)]
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}The row has the columns {', '.join(map(str, row))}."
