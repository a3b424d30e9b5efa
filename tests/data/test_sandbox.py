"""The budget of work: no template hangs a run or eats its memory; honest ones do not notice it."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import pytest

from lorchestra.data.expression import Expression
from lorchestra.data.sandbox import MAX_DEPTH
from lorchestra.errors import DataError

LONG = "fever and cough " * 12_500  # 200,000 characters, a long document
ROW = {"text": LONG, "rows": [[i] * 10 for i in range(2_000)], "n": 3, "one": "a"}


def grown(step: str, last: str, times: int = 60, first: str = "{% set a0 = text %}") -> str:
    """A variable made of the one before, many times over."""
    names = [f"a{i}" for i in range(times + 1)]
    return first + "".join(step.replace("NEW", new).replace("OLD", old) for old, new in pairwise(names)) + (
        last.replace("LAST", names[-1])
    )  # fmt: skip


def set_(value: str, last: str = "{{ LAST | length }}", first: str = "{% set a0 = text %}") -> str:
    return grown("{% set NEW = " + value + " %}", last, first=first)


LOOPS = {
    "over a text": "{% for a in text %}{% for b in text %}{% endfor %}{% endfor %}",
    "over a text, in a text": "{% for a in text %}{% if 'x' in text %}x{% endif %}{% endfor %}",
    "over words": "{% for a in text.split() %}{% for b in text.split() %}{% endfor %}{% endfor %}",
    "over a generator": "{% for a in text | map('upper') %}{% for b in text | select %}{% endfor %}{% endfor %}",
    "with a condition": "{% for a in text if text | upper == a %}{% endfor %}",
    "copying": "{% for a in range(1000) %}{% for b in range(1000) %}{% set x = text[1:] %}{% endfor %}{% endfor %}",
    "of constants": "{% for a in range(1000) %}{% for b in range(1000) %}" + "{{ n }}" * 300
                    + "{% endfor %}{% endfor %}",
    "into a variable": "{% set x %}{% for a in range(1000) %}{% for b in range(1000) %}" + "xyz " * 500
                       + "{% endfor %}{% endfor %}{% endset %}{{ x | length }}",
    "through a filter": "{% filter upper %}{% for a in range(1000) %}{% for b in range(1000) %}{{ text }}"
                        "{% endfor %}{% endfor %}{% endfilter %}",
    "with text filters": "{% for a in text %}{{ (text | upper | lower | title)[:0] }}{% endfor %}",
    "with methods": "{% for a in text %}{{ text.upper()[:0] }}{% endfor %}",
    "one after another": "{% for a in text %}{% endfor %}" * 200,
    "with arithmetic on lists": "{% for a in text %}{% set x = rows + rows %}{% endfor %}",
    "with tests": "{% for a in text %}{{ text is eq text }}{% endfor %}",
    "with loop.changed": "{% for a in text %}{{ loop.changed(text) }}{% endfor %}",
    "with sorting": "{% for a in text %}{{ (rows | sort | first)[:0] }}{% endfor %}",
    "with a charge that pays back": "{{ [1] | _steps(-(10**12)) }}{% for a in range(1000) %}{% for b in range(1000) %}"
                                    "{% endfor %}{% endfor %}",
    "as a mapped filter": "{{ text | map('default', text) | map('replace', 'a', text) | list | length }}",
    "as a selected test": "{{ rows | map('first') | select('in', text.split()) | list | length }}",
}  # fmt: skip
GROWTH = {
    "~": set_("OLD ~ OLD"),
    "~ of many": "{{ " + " ~ ".join(["text"] * 500) + " }}",
    "+": set_("OLD + OLD"),
    "+ of lists": set_("OLD + OLD", first="{% set a0 = rows %}"),
    "* of texts": set_("OLD * 10"),
    "* of lists": "{{ [[0] * 10000] * 10000 }}",
    "* of numbers": set_("OLD * OLD", "{{ LAST }}", first="{% set a0 = 99999 %}"),
    "**": set_("OLD ** 64", "{{ LAST }}", first="{% set a0 = 9 %}"),
    "blocks that are set": grown("{% set NEW %}{{ OLD }}{{ OLD }}{% endset %}", "{{ LAST | length }}"),
    "with": "{% with a = text ~ text %}" + "{% with a = a ~ a %}" * 20 + "{{ a | length }}" + "{% endwith %}" * 21,
    "nested lists": set_("[OLD, OLD]", "{{ LAST }}"),
    "nested lists compared": set_("[OLD, OLD]", "{{ LAST == [] }}"),
    "nested tuples as keys": set_("(OLD, OLD)", "{{ {LAST: 1} }}", first="{% set a0 = 1 %}"),
    "nested tuples looked up": set_("(OLD, OLD)", "{{ row[LAST] }}", first="{% set a0 = 1 %}"),
    "nested lists as JSON": set_("[OLD, OLD]", "{{ LAST | tojson }}", first="{% set a0 = 1 %}"),
    "nested lists as text": set_("[OLD, OLD]", "{{ LAST | string | length }}", first="{% set a0 = 1 %}"),
    "depth": grown("{% set NEW = [OLD] %}", "{{ LAST }}", times=MAX_DEPTH + 1),
    "replace": "{{ text | replace('a', text) | length }}",
    "replace nothing": "{{ text | replace('', text) | length }}",
    ".replace": "{{ text.replace('a', text) | length }}",
    ".replace nothing, so often": "{{ text.replace('', text, 199999) | length }}",
    "join": "{{ text | join(text) | length }}",
    "join of a list": "{{ rows | join(text) | length }}",
    ".join": "{{ text.join(text) | length }}",
    ".join of a generator": "{{ text.join(text | map('upper')) | length }}",
    "sum of lists": "{{ (rows | sum(start=[])) | length }}",
    "tojson indented": "{{ [1] | tojson(indent=10**9) }}",
    "tojson, indent by place": "{{ [1] | tojson(10**9) }}",
    "round up": "{{ 1 | round(10**9, 'ceil') }}",
    "round down": "{{ 1 | round(-(10**9), 'floor') }}",
    "translate": "{{ text.translate({97: text, 101: text}) | length }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') | length }}",
    "bytes": "{{ (text.encode() * 1000) | length }}",
    "% of bytes": "{{ one.encode() % 1 }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "zfill": "{{ one.zfill(10**9) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "a method by subscript": "{{ one['center'](10**9) }}",
    "a method by map": "{{ ([one] | map(attribute='center') | first)(10**9) }}",
    "indent": "{{ text | indent(10**9) }}",
    "wordwrap": "{{ text | wordwrap(1, wrapstring=text) }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "xmlattr": "{{ {'a': text} | xmlattr }}",
    "an integer of any base": "{{ text | int(base=36) | string * 99999 }}",
}
RECURSION = {
    "a block that calls itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "call": "{% call(x) f() %}{% endcall %}",
    "a recursive loop": "{% for a in rows recursive %}{{ loop(a) }}{% endfor %}",
    "three loops": "{% for a in rows %}{% for b in rows %}{% for c in rows %}{% endfor %}{% endfor %}{% endfor %}",
    "parentheses": "{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}",
    "lists": "{{ " + "[" * 150 + "]" * 150 + " }}",
    "not": "{{ " + "not " * 5_000 + "1 }}",
    "ifs": "{% if n %}" * 150 + "{% endif %}" * 150,
    "sums": "{{ " + "1 + " * 5_000 + "1 }}",
    "filters": "{{ n" + " | string" * 5_000 + " }}",
    "digits": "{{ " + "9" * 5_000 + " }}",
}
HOSTILE = {
    f"{kind}: {name}": text
    for kind, table in (("loop", LOOPS), ("growth", GROWTH), ("recursion", RECURSION))
    for name, text in table.items()
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_end_soon_with_one_message(template: str) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"^fields\.prompt") as caught:
        Expression(template, "fields.prompt")(ROW)
    assert time.perf_counter() - start < 10
    assert str(caught.value).isprintable() or "\t" in template


def test_the_budget_says_what_costs_and_what_to_do() -> None:
    with pytest.raises(DataError, match=r"^where: refused by the sandbox: this goes through more than 5,000,000 char.*"
                                        r"Loops over long texts.*prepare the column outside"):  # fmt: skip
        Expression("text.replace('a', text)", "where", value=True)(ROW)


def test_every_row_has_the_budget_anew() -> None:
    expression = Expression("{% for a in text %}{{ a }}{% endfor %}", "fields.prompt")
    row = {"text": "x" * 50_000}
    assert [len(expression(row)) for _ in range(4)] == [50_000] * 4, "together more than one budget"
    with pytest.raises(DataError, match="goes through"):
        expression({"text": "x" * 1_000_000})
    assert len(expression(row)) == 50_000, "a refused row leaves no debt"


HONEST = [
    ("{{ text }}\n\n{{ text | trim | replace('\\n', ' ') }}", {"text": LONG * 5}, 2 * len(LONG * 5) + 1),
    ("{{ text.split(' ')[:50] | join(' ') }}", {"text": LONG}, len(" ".join(LONG.split(" ")[:50]))),
    ("{% for o in options %}{{ 'ABCDE'[loop.index0] }}. {{ o }}{{ '' if loop.last else '\n' }}{% endfor %}",
     {"options": ["aspirin", "ibuprofen"]}, len("A. aspirin\nB. ibuprofen")),
    ("{% for turn in turns if turn.who != 'note' %}{{ turn['who'] }}: {{ turn.text }}\n{% endfor %}",
     {"turns": [{"who": "a", "text": "b" * 500}, {"who": "note", "text": "c"}] * 1_000}, 504 * 1_000),
    ("{% for r in rows | sort(reverse=true) | map('first') | unique %}{{ loop.length }}{% endfor %}",
     {"rows": [[i % 7] for i in range(500)]}, 7),
    ("{{ rows | map('sum') | sum }}", {"rows": [[1, 2]] * 5}, 2),
    ("{{ {'a': [1, 2.5, none, true]} | tojson }}", {}, len('{"a": [1, 2.5, null, true]}')),
    ("{{ 3.14159 | round(2) }}{{ 7 ** 2 + 1 }}{{ 7 // 2 }}{{ -n }}", {"n": 1}, len("3.14" "50" "3" "-1")),
    ("{{ a.get('k', '') }}{% for k, v in a.items() %}{{ k ~ '=' ~ v }}{% endfor %}", {"a": {"x": 1}}, 3),
    ("{{ loop_ }}{% for x in range(3) %}{{ loop.cycle('a', 'b') }}{% endfor %}", {"loop_": ""}, 3),
    ("{% with a = text ~ '!' %}{{ a.upper().count('É') }}{% endwith %}", {"text": "é"}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("template", "row", "length"), HONEST)
def test_honest_templates_are_not_held_up(template: str, row: dict[str, object], length: int) -> None:
    assert len(Expression(template, "fields.prompt")(row)) == length


def test_nothing_is_evaluated_when_a_template_is_compiled() -> None:
    """Jinja2 would fold constants at once, outside any row's budget; here an expression waits for its row."""
    for text in ("{{ 1 // 0 }}", "{{ 'a' | replace('a', 5 // 0) }}", "{{ range(9999999) | list }}"):
        made = Expression(text, "fields.prompt")
        with pytest.raises(DataError, match=r"failed: ZeroDivisionError|refused by the sandbox: a range"):
            made({})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_hostile_templates_need_little_memory() -> None:
    """All of them again, in a process that may have 300 MB more than it starts with."""
    code = f"""
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("hostile", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.Expression("a", "where", value=True)({{"a": 1}})
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300_000_000,) * 2)
for name, text in module.HOSTILE.items():
    try:
        module.Expression(text, "fields.prompt")(module.ROW)
    except module.DataError as error:
        assert not isinstance(error.__cause__, MemoryError), name
    else:
        raise AssertionError(name)
print("done")
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert made.stdout == "done\n", made.stderr
