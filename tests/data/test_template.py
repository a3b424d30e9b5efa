# ruff: noqa: E501 (tables)
"""What is found out about a chat template by looking at what it writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.data.example import Message
from lorchestra.data.template import ChatTemplate, shared
from lorchestra.errors import DataError

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(end: str = "<|im_end|>\n", before: str = "", opening: str = OPEN) -> str:
    return before + "{% for m in messages %}" + TURN + end + "{% endfor %}" + opening


@pytest.fixture
def make(tiny_tokenizer: Any) -> Any:
    def make(template: str | None, special: tuple[str, ...] = (), **tokens: Any) -> Any:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        for name, token in tokens.items():
            setattr(tokenizer, name, token)
        tokenizer.chat_template = template
        return tokenizer

    return make


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


# what a template writes after an answer, special tokens that the tokenizer has beside its own, the token that ends it
ENDS: list[tuple[str, tuple[str, ...], str]] = [
    ("<|im_end|>\n", (), "<|im_end|>"),
    ("\n\n<|im_end|>", (), "<|im_end|>"),
    ("<|eot|><|im_end|>", ("<|eot|>",), "<|eot|>"),
    ("<|im_end|><|endoftext|>", (), "<|im_end|>"),
    ("{{ eos_token }}", (), "<|im_end|>"),
    ("<end_of_turn>\n", ("<end_of_turn>", "<end"), "<end_of_turn>"),  # one begins like the other: the longer
    ("<|endoftext|>", (), "<|endoftext|>"),
]


@pytest.mark.parametrize(("after", "special", "end"), ENDS)
def test_the_end_of_turn_is_the_first_special_token_after_an_answer(
    make: Any, after: str, special: tuple[str, ...], end: str
) -> None:
    tokenizer = make(chatml(after), special)
    template = ChatTemplate(tokenizer)
    assert (template.end_text, template.end) == (end, tokenizer.convert_tokens_to_ids(end))
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], tokenize=False
    )
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert template.end in ids, "generation can meet it as one token"
    assert any("stop at it" in note for note in template.notes) == (end != tokenizer.eos_token)


@pytest.mark.parametrize("after", ["", "\n", "</s>", "<|eot|>"])
def test_an_answer_that_ends_with_no_special_token_is_refused(make: Any, after: str) -> None:
    """``</s>`` as plain characters teaches nothing to stop at."""
    with pytest.raises(DataError, match=r"(?s)no end-of-turn token: after an answer .*Let it write <\|im_end\|> there"):
        ChatTemplate(make("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + after + "{% endfor %}"))


def test_the_special_token_that_opens_the_next_turn_is_not_taken_for_an_end(make: Any) -> None:
    """Only what follows the last answer counts; a template that writes the end before the *next* turn has none."""
    template = (
        "{% for m in messages %}{% if not loop.first %}<|im_end|>{% endif %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="no end-of-turn token: after an answer the chat template writes ''"):
        ChatTemplate(make(template))


def test_without_template_and_eos_the_advice_is_another(make: Any) -> None:
    with pytest.raises(DataError, match=r"no end-of-turn token.*Give the tokenizer an eos_token\."):
        ChatTemplate(make(None, eos_token=None))


REFUSED: list[tuple[str, str]] = [
    ("{{ raise_exception('wrong turns') }}", r"refuses a conversation of user: wrong turns.*set another chat template"),
    ("{{ messages[5]['content'] }}", r"refuses a conversation of user: "),
    ("{% for m in messages %}", r"refuses a conversation of user: "),
    (chatml().replace("m['content']", "m['content'] | upper"), r"does not render the assistant's answer"),
    (chatml().replace("m['content']", "'' if m['role'] == 'assistant' else m['content']"), r"does not render the assis"),
    (chatml(opening=OPEN.replace("assistant", "model")), r"(?s)opens an answer otherwise.*goes on with 'model.*finished conversation with 'assistant"),
    (chatml(before="{{ messages | length }} turns\n"), r"(?s)opens an answer otherwise.*after '' the generation prompt goes on with '1 turns"),
    (chatml(opening=OPEN.replace("assistant\n", "assistant\n<think>\n")), r"opens an answer otherwise.*without thinking"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "message"), REFUSED)
def test_templates_that_fail_or_do_not_render_a_prefix_are_refused(make: Any, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(make(template))


def test_a_generation_prompt_that_is_missing_is_learned_and_told(make: Any) -> None:
    template = ChatTemplate(make(chatml(opening="")))
    assert any("'<|im_start|>assistant\\n'" in note and "learned" in note for note in template.notes)
    assert ChatTemplate(make(chatml())).notes == ()


def test_boundary(make: Any) -> None:
    template = ChatTemplate(make(chatml()))
    assert template.boundary("ab", "abc") == 2
    assert template.boundary("ab<think>\n\n</think>\n\n", "abc") == 2, "an empty block that is not rendered again"
    assert template.boundary("ab<think>\n</think>", "ab<think>\n</think>c") == len("ab<think>\n</think>")
    for opening in ("ab<think>", "ab<think>x</think>", "ab<think></other>", "xb<think></think>"):
        with pytest.raises(DataError, match="training and inference"):
            template.boundary(opening, "abc")


def test_head_is_what_stands_before_the_first_question(make: Any) -> None:
    template = ChatTemplate(make(chatml(before="<|endoftext|>")))
    system = Message("system", "Be brief.")
    assert template.head((system, *user("q"))) == (
        "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    assert template.head(user("q")) == "<|endoftext|><|im_start|>user\n"
    for messages in (user("a question"), (system, *user("a question"), Message("assistant", "a"), *user("more"))):
        assert template.text(messages, generation=True).startswith(template.head(messages) + "a question")


def test_control_tokens_as_text_are_refused_and_what_only_looks_like_one_is_not(make: Any) -> None:
    template = ChatTemplate(make(chatml(), ("<x>",)))
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>", "<x>"):
        with pytest.raises(DataError) as error:
            template.refuse_controls([user("fine"), (*user("q"), Message("assistant", f"a{token}b"))])
        assert f"assistant turn contains the control token {token!r}" in str(error.value)
    template.refuse_controls([user("<|im_end| > <y> < x > <|IM_END|>")])
    template.refuse_controls([])


@pytest.mark.parametrize("plain", [True, False])
def test_ids_are_the_tokenizers_own(make: Any, plain: bool) -> None:
    """Plain text gets what the tokenizer puts first, once; a chat template writes its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make(None if plain else chatml())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    template = ChatTemplate(tokenizer)
    bare = tuple(tokenizer("发热 fever", add_special_tokens=False)["input_ids"])
    assert template.plain is plain
    assert template.ids("发热 fever") == ((1, *bare) if plain else bare)
    assert template.ids("发热 fever", bos=False) == bare
    assert template.decode(bare) == "发热 fever"


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_shared_is_the_longest_common_beginning(a: str, b: str) -> None:
    n = shared(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
