"""The sandbox of a recipe's Jinja2: recipes are shared, so their expressions are not trusted. That of chat templates
(:mod:`lorchestra.data.chat_sandbox`) is made of the same parts.

Beyond Jinja2's own sandbox (no private attributes, nothing mutable), only methods and filters that are listed here can
be called, and what an expression may do for one row is bounded by a budget of *work*: every operation is charged for
what it reads and makes before it is carried out, a loop for all its steps before the first. Macros, blocks and includes
are refused, so nothing can call itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Set, ValuesView
from numbers import Number
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK = 5_000_000  # a character costs 1, an item or one node of a loop's body ITEM
ITEM = 10
MAX_DEPTH = 64
MAX_RANGE = 1_000
MAX_LOOPS = 2
MAX_REPEAT = 10_000
MAX_BITS = 4_096

# fmt: off
FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "join",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim",
    "truncate", "unique", "upper", "wordcount",
})
METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower",
    "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",  # of texts (count and index of lists too)
    "get", "items", "keys", "values",  # of objects
    "isoformat",  # of dates
    "changed", "cycle",  # of `loop`
})
# fmt: on
REFUSED = (nodes.Macro, nodes.CallBlock, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class _Work(threading.local):
    """What is left of the budget for the row, or the conversation, at hand."""

    left = 0
    said = ""

    def begin(self, most: int, said: str) -> None:
        """From now on ``most`` may be spent; whoever wants more is told ``said``."""
        self.left, self.said = most, said

    def check(self, amount: int) -> None:
        if not (isinstance(amount, int) and 0 <= amount <= self.left):  # a template that names `_steps` pays, too
            raise SecurityError(self.said)

    def spend(self, amount: int) -> None:
        self.check(amount)
        self.left -= amount

    def read(self, *values: Any) -> None:
        """Charge for everything in ``values``, however often the same thing is in them."""
        level = list(values)
        for _ in range(MAX_DEPTH):
            cost, inner = ITEM * len(level), list[Any]()
            for value in level:
                if isinstance(value, str | bytes):
                    cost += len(value)
                elif isinstance(value, int):
                    cost += value.bit_length() // 64
                elif isinstance(value, Namespace):
                    inner.append(attributes(value))
                elif isinstance(value, Mapping) and not isinstance(value, Context):
                    self.check(cost + ITEM * len(inner) + 2 * ITEM * len(value))
                    inner.extend(value.keys())
                    inner.extend(value.values())
                elif isinstance(value, list | tuple | Set | ValuesView):
                    self.check(cost + ITEM * len(inner) + ITEM * len(value))
                    inner.extend(value)
            self.spend(cost)
            if not inner:
                return
            level = inner
        raise SecurityError(f"a value is nested more than {MAX_DEPTH} deep")


WORK = _Work()


def attributes(namespace: Namespace) -> dict[str, Any]:
    """What a template keeps in a ``namespace()``, which is written out with it."""
    return dict[str, Any](object.__getattribute__(namespace, "_Namespace__attrs"))


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"a range may have at most {MAX_RANGE:,} numbers, this one has {len(numbers):,}")
    return numbers


def _steps(values: Any, weight: int) -> Any:
    """What a loop goes over, its steps paid for; an iterator becomes a list."""
    if isinstance(values, jinja2.Undefined):
        return values  # says itself what is not defined
    if not hasattr(values, "__len__"):
        values = _listed(values)
    WORK.spend(len(values) * weight)
    return values


def _listed(values: Iterable[Any]) -> list[Any]:
    out = []
    for value in values:
        WORK.spend(ITEM)
        out.append(value)
    return out


def _kept(value: Any) -> Any:
    """``value``, paid for: it is kept under a name, compared or looked up."""
    WORK.read(value)
    return value


def _concat(parts: list[Any]) -> str:
    """``a ~ b``"""
    WORK.read(parts)
    return "".join(map(str, parts))


def _replaced(text: Any, old: Any, new: Any, count: Any = -1) -> None:
    """Charge for a replacement."""
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        found = text.count(old)
        WORK.spend((min(found, count) if isinstance(count, int) and count >= 0 else found) * len(new))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new, times = str(value), str(old), str(new), -1 if count is None else count
    _replaced(text, old, new, times)
    return text.replace(old, new, times)


@jinja2.pass_eval_context
def _join(context: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    parts = value if isinstance(value, str) else _listed(value)
    WORK.spend(len(parts) * len(str(d)))
    return str(jinja2.filters.do_join(context, parts, d, attribute))


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if not isinstance(start, Number):  # of lists it would copy the first a thousand times
        raise SecurityError("sum is for numbers; join joins texts")
    return jinja2.filters.do_sum(environment, values, attribute, start)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if not -20 <= precision <= 20:
        raise SecurityError(f"round has at most 20 digits, got {precision}")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_eval_context
def _tojson(context: nodes.EvalContext, value: Any) -> str:
    return str(jinja2.filters.do_tojson(context, value))


def charged(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which is paid for what it is given."""

    @functools.wraps(function)  # keeps Jinja2's mark of what it wants as its first argument
    def call(*args: Any, **kwargs: Any) -> Any:
        WORK.read(*args, *kwargs.values())
        return function(*args, **kwargs)

    return call


@jinja2.pass_context  # with a context, nothing is evaluated while a template is compiled
def output(context: Context, value: Any) -> Any:
    """What ``{{ … }}`` writes."""
    WORK.read(value)
    return value


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's, where every call and every operation is paid for."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of methods, those that are listed."""
        return (attr in METHODS or not callable(value)) and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Paid for what is read and made."""
        if not isinstance(obj, jinja2.Undefined):
            name, owner = getattr(obj, "__name__", ""), getattr(obj, "__self__", None)
            if obj is not _range and name not in METHODS:  # Jinja2 would let its own `format` through
                raise SecurityError(f"{name or type(obj).__name__!r} cannot be called here")
            WORK.read(owner, *args, *kwargs.values())
            if name == "replace" and len(args) in (2, 3):
                _replaced(owner, *args)
            if name == "join" and isinstance(owner, str) and len(args) == 1:
                args = (args[0] if isinstance(args[0], str) else _listed(args[0]),)
                WORK.spend(len(owner) * len(args[0]))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As :meth:`call`."""
        WORK.read(left, right)
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("text formatting with % is not available here; use ~ to join texts")
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > MAX_BITS:
                raise SecurityError("a product of numbers this large is not available here")
        elif operator == "*" and not (isinstance(left, Number) and isinstance(right, Number)):
            sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if isinstance(times, int) and len(sized) * times > MAX_REPEAT:
                raise SecurityError(f"a repetition may come to at most {MAX_REPEAT:,} characters or items")
        if operator == "**" and not (abs(left) <= MAX_REPEAT and abs(right) <= 64):
            raise SecurityError("a power of numbers this large is not available here")
        return super().call_binop(context, operator, left, right)


class Charging(NodeTransformer):
    """Puts the charges into a template; refuses what is not available."""

    refused: tuple[type[nodes.Node], ...] = REFUSED
    deepest = MAX_LOOPS

    def __init__(self) -> None:
        self.loops = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Of any node; refuses what is not available."""
        if isinstance(node, self.refused):
            raise jinja2.TemplateSyntaxError(f"{type(node).__name__.lower()} is not available here", node.lineno or 1)
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.loops += 1
        if node.recursive or self.loops > self.deepest:
            raise jinja2.TemplateSyntaxError(
                f"loops may be at most {self.deepest} deep, and not recursive", node.lineno
            )
        weight = sum(weight_of(part) for part in (*node.body, node.test) if part is not None)
        self.generic_visit(node)
        node.iter = through("_steps", node.iter, nodes.Const(ITEM + weight))
        self.loops -= 1
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        node.node = _paid(node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.With:
        self.generic_visit(node)
        node.values = [_paid(value) for value in node.values]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _paid(node.expr)
        for operand in node.ops:
            operand.expr = _paid(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _paid(node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _paid(node.node)
        else:
            node.arg = _paid(node.arg)
        return node


def weight_of(node: nodes.Node) -> int:
    """What one evaluation of ``node`` costs at least; an inner loop pays for its steps itself."""
    if isinstance(node, nodes.For):
        return ITEM + weight_of(node.iter)
    own = len(node.data) if isinstance(node, nodes.TemplateData) else ITEM
    return own + sum(map(weight_of, node.iter_child_nodes()))


def _paid(node: nodes.Node) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else through("_kept", node)


def through(name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    """``node | name(args)``"""
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _environment() -> Sandbox:
    environment = Sandbox(undefined=jinja2.StrictUndefined, autoescape=False, optimized=False, finalize=output)
    environment.globals.clear()
    environment.globals.update(range=_range)
    filters = {name: environment.filters[name] for name in FILTERS}
    pay(environment, filters | {"tojson": _tojson})
    return environment


def pay(environment: Sandbox, filters: Mapping[str, Callable[..., Any]]) -> None:
    """``environment`` has these filters (four of them in our form), and pays for them and for tests."""
    known = dict(filters) | {"replace": _replace, "join": _join, "sum": _sum, "round": _round}
    environment.filters = {name: charged(function) for name, function in known.items()}
    environment.filters |= {"_steps": _steps, "_kept": _kept, "_concat": _concat}
    environment.tests = {name: charged(test) for name, test in dict[str, Any](environment.tests).items()}


_ENVIRONMENT = _environment()


def compile_template(text: str) -> jinja2.Template:
    """A template that pays for what it does.

    Raises:
        jinja2.TemplateError: it is not valid, or uses what is not available.
        RecursionError, SyntaxError, ValueError: it is nested too deeply, or a number in it is too long.
    """
    return _compiled(_ENVIRONMENT.parse(text))


def compile_value(text: str) -> Callable[[Mapping[str, Any]], Any]:
    """A function from columns to the value of an expression; raises as :func:`compile_template` does."""
    parser = Parser(_ENVIRONMENT, text, state="variable")
    expression = parser.parse_expression()
    if not parser.stream.eos:
        raise jinja2.TemplateSyntaxError("something follows the expression", parser.stream.current.lineno)
    template = _compiled(nodes.Template([nodes.Assign(nodes.Name("result", "store"), expression, lineno=1)], lineno=1))
    return jinja2.environment.TemplateExpression(template, undefined_to_none=False)


def _compiled(parsed: nodes.Template) -> jinja2.Template:
    paying = Charging().visit(parsed)
    paying.set_environment(_ENVIRONMENT)
    return _ENVIRONMENT.from_string(paying)
