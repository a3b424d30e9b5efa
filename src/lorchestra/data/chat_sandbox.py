"""Chat templates, rendered as transformers renders them, within a budget of work.

A chat template is a program that comes with a base or an adapter, and transformers' sandbox bounds neither its time nor
its memory: ``{% for a in range(99999) %}{% for b in range(99999) %}…`` holds a thread for ever. Here it pays as
expressions of recipes do (:mod:`lorchestra.data.sandbox`), out of a budget that grows with the conversation. What is
there is transformers' environment: Jinja2's filters, loop controls, macros, ``namespace``, ``raise_exception``,
``strftime_now``, its ``tojson`` and ``{% generation %}``; without what no chat needs and no budget covers (includes,
blocks, recursive loops, filters that search by regular expressions).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.utils import Namespace

from lorchestra.data.sandbox import (
    FILTERS,
    ITEM,
    WORK,
    Charging,
    Sandbox,
    output,
    pay,
    through,
    weight_of,
)

LEAST_WORK, WORK_EACH, MOST_WORK = 10_000_000, 100, 60_000_000  # at least; for each character of the turns; at most
LONGEST = 262_144  # characters of a template
MAX_RANGE = 100_000  # Jinja2's own
MAX_LOOPS = 8

# Of texts and objects, beside METHODS: what these make may be as large as the product of what they are given.
MAKING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "encode", "isdecimal", "istitle",
                    "isascii", "copy", "rindex", "strftime", "hex", "is_integer"})  # fmt: skip
MAKERS = ("attr", "batch", "center", "e", "escape", "filesizeformat", "forceescape", "format", "groupby", "indent",
          "safe", "slice", "urlencode")  # fmt: skip
_WIDE = re.compile(r"[0-9]{4}|\*|:[^{}]*\{")  # a width in the thousands, or one that comes from elsewhere


def render(template: str, turns: Sequence[Mapping[str, Any]], generation: bool, variables: Mapping[str, Any]) -> str:
    """The text of a conversation.

    Args:
        template: Jinja2.
        turns: plain values: ``role``, ``content`` ….
        generation: with what opens an answer.
        variables: special tokens and further ones.

    Raises:
        jinja2.TemplateError: it is no template, refuses these turns, or is refused by the sandbox.
        Exception: whatever an operation in it raises.
    """
    compiled = _compiled(template)
    seen = {"tools": None, "documents": None, **variables, "messages": list(turns), "add_generation_prompt": generation}
    WORK.begin(MOST_WORK, f"the conversation has more than {MOST_WORK:,} characters and items")
    WORK.read(seen)
    most = min(LEAST_WORK + WORK_EACH * (MOST_WORK - WORK.left), MOST_WORK)
    WORK.begin(most, f"the template goes through more than {most:,} characters and items for these turns")
    return str(compiled.render(seen))


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    if len(text) > LONGEST:
        raise SecurityError(f"the template has {len(text):,} characters; at most {LONGEST:,} may be")
    try:
        parsed = _Charging().visit(_ENVIRONMENT.parse(text))
        parsed.set_environment(_ENVIRONMENT)
        return _ENVIRONMENT.from_string(parsed)
    except (RecursionError, MemoryError, SyntaxError) as error:  # of Python, which templates are compiled to
        raise jinja2.TemplateSyntaxError("the template is nested too deeply", 1) from error


class _Charging(Charging):
    """Macros are there, and pay for their body at each call."""

    refused = (nodes.Block, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    deepest = MAX_LOOPS

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self._body(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self._body(node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node)
        self.generic_visit(node)
        node.node = through("_cut", node.node)  # copies references, however much they lead to
        return node

    def _body(self, node: nodes.Macro | nodes.CallBlock) -> None:
        weight = sum(map(weight_of, node.body))
        outer, self.loops = self.loops, 0
        self.generic_visit(node)
        self.loops = outer
        paid = through("_spent", nodes.Const("", lineno=node.lineno), nodes.Const(ITEM + weight))
        node.body.insert(0, nodes.ExprStmt(paid, lineno=node.lineno))


class _Generation(Extension):
    """``{% generation %}``: what a model says, which training frameworks mark; it changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """As transformers has it: nothing that looks private is kept."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace keeps no {name!r}; call it something that does not begin with '_'")


class _ChatSandbox(Sandbox):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods that are listed, and what a template has made callable itself."""
        own = attr in MAKING or isinstance(obj, jinja2.utils.Cycler) or isinstance(value, Macro) or _is_global(value)
        if own:
            return super(Sandbox, self).is_safe_attribute(obj, attr, value)
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Paid for what is read and made."""
        name = getattr(obj, "__name__", "")
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", "")  # Jinja2 wraps `format`
        if isinstance(obj, Macro) or isinstance(owner, jinja2.utils.Cycler) or _is_global(obj):
            WORK.read(*args, *kwargs.values())
        elif name in MAKING:
            _product(owner, *args, *kwargs.values())
            if name == "format":
                _check_format(owner)
        else:
            return super().call(context, obj, *args, **kwargs)
        return super(Sandbox, self).call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As :meth:`call`."""
        if operator == "%" and isinstance(left, str):
            _product(left, right)
            _check_format(left)
            return super(Sandbox, self).call_binop(context, operator, left, right)
        return super().call_binop(context, operator, left, right)


def _product(*values: Any) -> None:
    """Charge for the largest thing that could be made of ``values``."""
    WORK.read(*values)
    cost = 1
    for value in values:
        if isinstance(value, int):
            cost *= 1 + abs(value)
        elif hasattr(value, "__len__"):
            before = WORK.left
            WORK.read(value)
            cost *= 1 + (before - WORK.left)
        WORK.check(cost)
    WORK.spend(cost)


def _check_format(text: Any) -> None:
    if _WIDE.search(str(text)):
        raise SecurityError("a format may be at most 999 wide, and say so itself")


def _making(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps Jinja2's mark of what it wants as its first argument
    def call(*args: Any, **kwargs: Any) -> Any:
        values = [one for one in (*args, *kwargs.values()) if not isinstance(one, Context | jinja2.Environment)]
        _product(*values)
        return function(*args, **kwargs)

    return call


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(value)
    return str(jinja2.filters.do_format(str(value), *args, **kwargs))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """transformers', which escapes nothing for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError(f"tojson indents by at most 16, got {indent!r}")
    if separators is not None:
        _product(value, *separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _cut(value: Any) -> Any:
    """What a slice is taken of, paid for."""
    WORK.spend(ITEM + (len(value) if hasattr(value, "__len__") else 0))
    return value


def _spent(value: Any, amount: int) -> Any:
    WORK.spend(amount)
    return value


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"a range may have at most {MAX_RANGE:,} numbers, this one has {len(numbers):,}")
    return numbers


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(text: str) -> str:
    WORK.spend(100 * len(text))
    return datetime.now().strftime(text)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


_GLOBALS: Mapping[str, Any] = {
    "namespace": _Namespace, "dict": _dict, "range": _range, "cycler": jinja2.utils.Cycler,
    "joiner": jinja2.utils.Joiner, "raise_exception": _raise_exception, "strftime_now": _strftime_now,
}  # fmt: skip


def _is_global(value: Any) -> bool:
    return any(value is one for one in _GLOBALS.values()) or isinstance(value, jinja2.utils.Joiner)


def _environment() -> _ChatSandbox:
    environment = _ChatSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False, finalize=output
    )
    environment.globals.clear()
    environment.globals.update(_GLOBALS)
    filters = {name: environment.filters[name] for name in FILTERS}
    making = {name: environment.filters[name] for name in MAKERS} | {"format": _format}
    pay(environment, filters | {"tojson": _tojson} | {name: _making(function) for name, function in making.items()})
    environment.filters |= {"_cut": _cut, "_spent": _spent}
    return environment


_ENVIRONMENT = _environment()
