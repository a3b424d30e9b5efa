"""Chat templates say what they say in transformers, and none of them hangs a server or eats its memory."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lorchestra.data import chat_sandbox
from lorchestra.data.chat_sandbox import render

SYSTEM, USER = {"role": "system", "content": " be brief\n"}, {"role": "user", "content": "<b>é</b>\n{{ 1 }} "}
ANSWER = {"role": "assistant", "content": "<think>hm</think> yes\n\n  no "}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None]}}}]}
TOKENS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}]
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, CALL, ANSWER],
    [ANSWER, ANSWER],
)

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content + '<|im_end|>' + '\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "lines and blanks": "{%- for m in messages %}\n    {%- if loop.first %}\n\n{{ bos_token }}\n    {% endif %}\n"
                        "  {{ m.role | upper }}: {{ m.content | trim }}\n  {% endfor %}\nend\n",
    "turns alternate": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
                       "{{ raise_exception('roles must alternate, got ' + m.role) }}{% endif %}{{ m.content }}"
                       "{% endfor %}",
    "system first": "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
                    "{% set turns = messages[1:] %}{% else %}{% set said = none %}{% set turns = messages %}{% endif %}"
                    "{{ said }}{% for m in turns[::-1] %}{{ m.content[:3] }}{{ m.content[-1] }}{% endfor %}",
    "namespace": "{% set ns = namespace(last=-1, text='', **{'a': 1}) %}{% for m in messages %}"
                 "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
                 "{% set ns.text = ns.text ~ m.role ~ ns.a %}{% endfor %}{{ ns.last }}{{ ns.text }}{{ ns }}",
    "a private name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "recursive macro": "{% macro told(x, deep=0) %}{% if x is mapping %}{ {%- for k, v in x | dictsort %}"
                       "{{ k }}:{{ told(v, deep + 1) }}{{ ',' if not loop.last }}{% endfor -%} }"
                       "{% elif x is string %}\"{{ x }}\"{% elif x is sequence %}[{% for y in x %}{{ told(y) }}"
                       "{% endfor %}]{% else %}{{ x }}{{ deep }}{% endif %}{% endmacro %}"
                       "{% for m in messages %}{{ told(m) }}{% endfor %}{{ told(tools) }}",
    "call": "{% macro quoted(n) %}{% for i in range(n) %}>{{ caller(i) }}{% endfor %}{{ varargs }}{% endmacro %}"
            "{% for m in messages %}{% call(i) quoted(2, 7) %}{{ i }}{{ m.role }}{% endcall %}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}"
                  "{{ m.content }}{{ eos_token }}\n{% endgeneration %}{{ x }}{% else %}{{ m.content }}{% endif %}"
                  "{% endfor %}",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
                          "{% if loop.index == 2 %}{% break %}{% endif %}{% else %}nobody{% endfor %}",
    "tools": "{% if tools is not none and tools %}{% for t in tools %}{{ t | tojson(indent=2) }}"
             "{{ t | tojson(separators=(',', ':'), sort_keys=true) }}{% endfor %}{% endif %}"
             "{% for m in messages if m.tool_calls is defined %}{% for c in m.tool_calls %}{% set f = c.function %}"
             "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})"
             "{% endfor %}{% endfor %}",
    "thinking": "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}"
                "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
                "[{{ r }}]{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ c }}{% endfor %}"
                "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
    "formats": "{{ '%s has %02d' | format(messages[0].role, messages | length) }}{{ '%s %5.1f' % ('a', 2) }}"
               "{{ '{0} {a:>4}'.format('x', a='y') }}{{ 'x'.center(7) }}{{ 'ab' | center(9) }}{{ '7'.zfill(3) }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') | title }}{{ messages | selectattr('role', 'equalto', "
               "'user') | list | length }}{{ messages[0].content | indent(2, true) | replace('\n', '|') | safe }}"
               "{{ [3, 1, 2] | sort | last }}{{ messages | groupby('role') | map('first') | list }}{{ 'a b' | e }}"
               "{{ [1, 2, 3] | batch(2, 0) | list }}{{ 'x' | default('y') }}{{ missing | default('y') }}",
    "what is missing": "{{ missing }}{% for x in missing %}{% endfor %}{{ messages[0].missing }}{{ missing.what }}",
    "helpers": "{% set c = cycler('a', 'b') %}{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ c.next() }}"
               "{{ loop.cycle(1, 2) }}{% endfor %}{{ dict(a=1) }}{{ {'a': 1} == dict(a=1) }}",
    "dates": "{{ strftime_now('%Y') | length }}"
             "{% if date_string is not defined %}{% set date_string = 'x' %}{% endif %}"
             "{{ date_string }}",
    "wrong": "{% for m in messages %}",
    "no such filter": "{{ messages | nonsense }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"tools": TOOLS}], ids=["", "thinking", "tools"])
def test_a_template_says_what_it_says_in_transformers(name: str, variables: Mapping[str, Any]) -> None:
    """Character by character, refusals too."""
    for turns in CONVERSATIONS:
        for generation in (True, False):
            extra = dict(variables)

            def theirs(turns: list[dict[str, Any]] = turns, generation: bool = generation, extra: Any = extra) -> str:
                rest = {key: value for key, value in extra.items() if key != "tools"}
                rest |= TOKENS | {"chat_template": TEMPLATES[name], "add_generation_prompt": generation}
                made = render_jinja_template([turns], extra.get("tools"), **rest)
                return str(made[0][0])

            def ours(turns: list[dict[str, Any]] = turns, generation: bool = generation, extra: Any = extra) -> str:
                return render(TEMPLATES[name], turns, generation, TOKENS | extra)

            assert told(ours) == told(theirs), (turns, generation)


def told(make: Any) -> str:
    """The text, or what kind of error instead."""
    try:
        return str(make())
    except jinja2.exceptions.SecurityError:
        return "refused"
    except jinja2.TemplateError as error:
        return f"{type(error).__name__}: {error.message}"
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def hostile_expressions() -> ModuleType:
    """The module of the recipes' sandbox' tests."""
    spec = importlib.util.spec_from_file_location("hostile_expressions", Path(__file__).with_name("test_sandbox.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MORE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nine loops": "{% for a in text %}" * 9 + "{% endfor %}" * 9,
    "a macro in a loop": "{% macro f() %}{% for a in range(9999) %}x{% endfor %}{% endmacro %}"
                         "{% for a in range(99999) %}{% set x = f() %}{% endfor %}",
    "a macro in a macro": "{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{% set x = f(n - 1) %}{% endif %}"
                          "{% endmacro %}{{ f(99) }}",
    "a call in a call": "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}"
                        "{% endcall %}{% endif %}{% endmacro %}{% call f(99) %}{% endcall %}",
    "a macro of constants": "{% macro f() %}" + "{{ 1 }}" * 3_000 + "{% endmacro %}"
                            "{% for a in range(99999) %}{% set x = f() %}{% endfor %}",
    "a macro for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that returns more": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set a = text %}"
                                 + "{% set a = f(a) %}" * 40 + "{{ a | length }}",
    "a namespace that grows": "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}"
                              "{% endfor %}",
    "namespaces of namespaces": "{% set a = namespace(x=1) %}"
                                + "{% set a = namespace(x=[a, a]) %}" * 50 + "{{ a }}",
    "a namespace in itself": "{% set a = namespace() %}{% set a.x = [a, a] %}{{ a }}",
    "dicts of dicts": "{% set a = dict(x=1) %}" + "{% set a = dict(x=a, y=a) %}" * 50 + "{{ a }}",
    "a cycler's": "{% set c = cycler(text, text) %}{% for a in range(99999) %}{{ c.next() }}{% endfor %}",
    "a joiner's": "{% set j = joiner(text) %}{% for a in range(99999) %}{{ j() }}{% endfor %}",
    "center": "{{ 'x' | center(999999999) }}",
    ".ljust": "{{ 'x'.ljust(999999999) }}",
    "indent by a lot": "{{ ('\n' * 9999) | indent(99999) }}",
    "indent by a text": "{{ ('\n' * 9999) | indent(text) }}",
    "batch": "{{ [1] | batch(999999999, text) | list | length }}",
    "slice": "{{ [1] | slice(999999999) | list | length }}",
    "format": "{{ '%999999999d' | format(1) }}",
    "format by what comes": "{{ '%*d' | format(999999999, 1) }}",
    "% by what comes": "{{ '%*d' % (999999999, 1) }}",
    ".format by what comes": "{{ '{:{}}'.format(1, 999999999) }}",
    "format again and again": "{{ ('%(a)s' * 1000) | format(a=text) | length }}",
    ".format again and again": "{{ ('{0}' * 3000).format(text) | length }}",
    "urlencode": "{% for a in range(99999) %}{% set x = text | urlencode %}{% endfor %}",
    "strftime_now": "{{ strftime_now('%c' * 9999999) | length }}",
    "tojson's separators": "{{ range(9999) | list | tojson(separators=(text, text)) | length }}",
    "a charge that pays back": "{{ [1, 2] | _steps(-999999999999) }}"
                               "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "a charge of nothing": "{{ '' | _spent(-999999999999) }}",
    "a charge that is no number": "{{ [1] | map('_spent', 'nan' | float) | list }}",
    "an include": "{% include 'x' %}",
    "a private attribute": "{{ raise_exception.__globals__['json'] }}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "what formats reach": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "a mutation": "{{ messages.append(1) }}",
}  # fmt: skip
ENDS = {**hostile_expressions().HOSTILE, **MORE}
VARIABLES = {"text": "fever and cough " * 1_250, "rows": [[i] * 10 for i in range(200)], "n": 3, "one": "a", "row": {}}


@pytest.mark.parametrize("name", ENDS)
def test_every_template_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the budget, so that this is soon over; whoever is refused hears what was too much."""
    monkeypatch.setattr(chat_sandbox, "LEAST_WORK", 1_000_000)
    monkeypatch.setattr(chat_sandbox, "WORK_EACH", 10)
    refused: Exception | None = None
    try:
        made = render(ENDS[name], [USER], True, VARIABLES)
    except Exception as error:
        refused = error
    if name in MORE:
        assert isinstance(refused, jinja2.TemplateError | RecursionError)
    elif refused is None:
        assert len(made) < 1_000_000
    else:
        assert not isinstance(refused, MemoryError)
        assert str(refused)


def test_the_budget_grows_with_the_conversation_and_every_one_has_it_anew() -> None:
    each = "{% for m in messages %}{% for a in m.content %}{{ a }}{% endfor %}{% endfor %}"
    long = [{"role": "user", "content": "x" * 200_000}] * 2
    assert [len(render(each, long, True, {})) for _ in range(2)] == [400_000] * 2
    squared = "{% for m in messages %}{% for n in messages %}{{ n.content | upper | length }}{% endfor %}{% endfor %}"
    assert len(render(squared, [USER] * 50, True, {})) == 2 * 2_500
    with pytest.raises(jinja2.exceptions.SecurityError, match=r"goes through more than 2\d,\d{3},\d{3} characters"):
        render(squared, [USER | {"content": "x" * 50}] * 900, True, {})


def test_a_template_of_a_megabyte_is_not_even_compiled() -> None:
    with pytest.raises(jinja2.exceptions.SecurityError, match=r"has 300,000 characters; at most 262,144"):
        render("x" * 300_000, [USER], True, {})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_every_template_ends_in_little_memory() -> None:
    """With the whole budget, in a process that may have 400 MB more than it starts with."""
    code = f"""
import importlib.util, resource
spec = importlib.util.spec_from_file_location("hostile", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.render("a", [module.USER], True, {{}})
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 400_000_000,) * 2)
for name, text in module.ENDS.items():
    try:
        module.render(text, [module.USER], True, module.VARIABLES)
    except MemoryError as error:
        raise AssertionError(name)
    except Exception:
        pass
print("done")
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert made.stdout == "done\n", made.stderr
