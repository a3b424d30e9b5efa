"""The sandbox: what a shared recipe may compute, and what it may not."""

from __future__ import annotations

import time

import pytest

from lorchestra.data.expression import Expression
from lorchestra.errors import DataError

ROW = {"question": "什么是 sepsis?", "n": 3, "options": ["a", "b"], "Long name": "x"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Q: {{ question }}", "Q: 什么是 sepsis?"),
        ("{{ row['Long name'] | upper }}", "X"),
        ("{% for o in options %}{{ loop.index }}. {{ o }}\n{% endfor %}", "1. a\n2. b\n"),
        ("{{ 'many' if n > 2 else 'few' }}", "many"),
        ("{{ options | join(', ') }}", "a, b"),
        ("{{ '-' * n }}", "---"),
        ("{{ question.split(' ')[1] }}", "sepsis?"),
        ("{% set x = n * 2 %}{{ x ** 2 }}", "36"),
    ],
)
def test_templates_see_the_columns(template: str, text: str) -> None:
    assert Expression(template, "fields.prompt")(ROW) == text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("n > 2 and 'sepsis' in question", True),
        ("n in [1, 2]", False),
        ("options", ["a", "b"]),
        ("n is divisibleby 2", False),
    ],
)
def test_expressions_keep_their_type(expression: str, value: object) -> None:
    assert Expression(expression, "where", value=True)(ROW) == value


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ question.__init__.__globals__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ options.append(1) }}",
    "{{ row.update({'a': 1}) }}",
    "{{ self.__init__ }}",
    "{{ cycler }}",
    "{{ lipsum.__globals__ }}",
    "{{ '{0.__class__}'.format(question) }}",
    "{{ ''.join.__self__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_escapes_are_refused(template: str) -> None:
    row = {**ROW, "options": list(ROW["options"])}
    with pytest.raises(DataError) as caught:
        Expression(template, "fields.prompt")(row)
    assert str(caught.value).startswith("fields.prompt")
    assert row == ROW, "a template changed its row"


BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(1001) %}x{% endfor %}",
    "{{ range(10**9) | list }}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9**9**9**9 }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for a in range(999) %}{% for b in range(999) %}{{ 'aaaaaaaa' }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", BOMBS)
def test_bombs_end_soon(template: str) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"fields\.prompt"):
        Expression(template, "fields.prompt")(ROW)
    assert time.perf_counter() - start < 3


def test_an_unknown_column_is_named_with_its_neighbour() -> None:
    with pytest.raises(DataError, match=r"'questoin' is undefined.*Did you mean 'question'.*question, n, options"):
        Expression("{{ questoin }}", "fields.prompt")(ROW)
    with pytest.raises(DataError, match="where: 'm' is undefined"):
        Expression("m > 1", "where", value=True)(ROW)


@pytest.mark.parametrize("template", ["{{ question", "{% if %}", "{{ question | shout }}", "{% for x in options %}"])
def test_what_does_not_compile_is_a_data_error(template: str) -> None:
    with pytest.raises(DataError, match="not valid Jinja2"):
        Expression(template, "fields.prompt")


def test_a_failing_operation_says_what_failed() -> None:
    with pytest.raises(DataError, match=r"where: 'n / 0' failed: ZeroDivisionError"):
        Expression("n / 0", "where", value=True)(ROW)
    with pytest.raises(DataError, match="failed: TypeError"):
        Expression("question > n", "where", value=True)(ROW)
