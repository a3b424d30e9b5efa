"""Ollama's template writes what the chat template writes, or is left out."""

from __future__ import annotations

import re

import pytest
from tests.conftest import make_tiny_tokenizer

from lorchestra.data.example import Message
from lorchestra.data.template import ChatTemplate
from lorchestra.export.modelfile import find_pieces, modelfile

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3's shape: bos, headers, a system block whether there is a system text or not.
HEADERS = (
    "{{ bos_token }}{% set s = '' %}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}<head>system</head>\n\nToday: 26 Jul 2024\n\n{{ s }}<|im_end|>"
    "{% for m in messages %}<head>{{ m['role'] }}</head>\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<head>assistant</head>\n\n{% endif %}"
)
# Gemma's: the system text stands in the first user turn.
MERGED = (
    "{{ bos_token }}{% set s = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set s = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if loop.first %}{{ s }}{% endif %}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
NO_DEFAULT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Not to be had with pieces: turns are counted.
COUNTED = (
    "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length + 1 }} assistant: {% endif %}"
)


def tokenizer(template, bos=False):
    found = make_tiny_tokenizer()
    found.chat_template = template
    if bos:
        from tokenizers.processors import TemplateProcessing

        found.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", found.bos_token_id)]
        )
    return found


def run_go(template, turns):
    """What Go's text/template makes of the actions used here."""
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    tokens = re.split(r"(\{\{ .*? \}\})", template)

    def block(at, env, writing):
        out = ""
        while at < len(tokens):
            action = tokens[at][3:-3] if tokens[at].startswith("{{ ") else None
            if action is None:
                out += tokens[at] if writing else ""
            elif action in (".System", ".Content"):
                out += (system if action == ".System" else env["turn"].content) if writing else ""
            elif ":=" in action or " = " in action:
                if writing:
                    env["begun"] = system if ":=" in action else ""
            elif action.startswith("if "):
                taken = False
                while True:
                    test = action.removeprefix("else ").removeprefix("if ")
                    now = writing and not taken and (action == "else" or holds(test, env))
                    taken = taken or now
                    text, at = block(at + 1, env, now)
                    out += text
                    action = tokens[at][3:-3]
                    if action == "end":
                        break
            elif action == "range .Messages":
                start = at
                for turn in turns:
                    text, at = block(start + 1, {**env, "turn": turn}, writing)
                    out += text
            else:
                assert action == "end" or action.startswith("else"), action
                return out, at
            at += 1
        return out, at

    def holds(test, env):
        if test == ".System":
            return bool(system)
        if test == "not $begun":
            return not shared["begun"]
        return env["turn"].role == re.fullmatch(r'eq \.Role "(\w+)"', test)[1]

    shared = {"begun": ""}

    class Env(dict):
        def __setitem__(self, key, value):
            shared[key] = value

    original = block

    def block(at, env, writing):
        return original(at, Env(env), writing)

    return block(0, {}, True)[0]


CONVERSATIONS = [
    [Message("user", "Hi")],
    [Message("system", "Be kind."), Message("user", "Hi")],
    [Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "发烧?")],
    [Message("system", "S"), Message("user", "1"), Message("assistant", "2"), Message("user", "3")],
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, HEADERS, MERGED, NO_DEFAULT])
def test_the_go_template_writes_what_the_chat_template_writes(template, bos):
    found = tokenizer(template, bos)
    text, has_template = modelfile("./m.gguf", found)
    assert has_template
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for turns in CONVERSATIONS:
        expected = ChatTemplate(found).text(turns, generation=True)
        if bos:  # the tokenizer puts it there
            expected = expected.removeprefix(found.bos_token)
        assert run_go(go, turns) == expected


def test_lines():
    text, _ = modelfile("base.gguf", tokenizer(DEFAULT_SYSTEM), adapter="./a.gguf")
    lines = text.splitlines()
    assert lines[:2] == ["FROM base.gguf", "ADAPTER ./a.gguf"]
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
    other = tokenizer(DEFAULT_SYSTEM)
    other.eos_token = "<|endoftext|>"
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"' in modelfile("b", other)[0]


def test_a_template_without_system_turns():
    text, has_template = modelfile("m", tokenizer(NO_SYSTEM))
    assert has_template
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    assert (
        run_go(go, CONVERSATIONS[2]) == "[user]Hi<|im_end|>[assistant]Hello!<|im_end|>[user]发烧?<|im_end|>[assistant]"
    )


@pytest.mark.parametrize("template", [COUNTED, DEFAULT_SYSTEM.replace("You help.", 'Say """.')])
def test_what_cannot_be_written_is_left_out(template):
    text, has_template = modelfile("m", tokenizer(template))
    assert not has_template
    assert "TEMPLATE" not in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_a_bos_token_that_no_piece_can_leave_out():
    """Every turn begins with what is also the bos token, and the tokenizer puts one before text."""
    template = make_tiny_tokenizer().chat_template
    assert modelfile("m", tokenizer(template))[1]
    assert not modelfile("m", tokenizer(template, bos=True))[1]


def test_no_chat_model():
    plain = tokenizer(None)
    assert modelfile("m", plain) == ('FROM m\nPARAMETER stop "<|im_end|>"\n', False)


def test_pieces_of_the_tiny_template():
    found = find_pieces(ChatTemplate(make_tiny_tokenizer()))
    assert found.user == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.assistant == ("<|im_start|>assistant\n", "<|im_end|>\n")
    assert (found.lead, found.opening, found.merged) == ("", "<|im_start|>assistant\n", False)
