"""From requests to prompts in tokens: chat templates, system prompts, tokenising."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorchestra.data.chat_sandbox import render
from lorchestra.data.template import PLAIN, ChatTemplate, own_template, special_tokens
from lorchestra.errors import AdapterError, DataError
from lorchestra.serve.embedded.vocabulary import Vocabulary
from lorchestra.serve.engine import RequestError, Served, TooLongError
from lorchestra.serve.wire import ChatMessage, ChatRequest

# What the call of the template sets itself.
_TAKEN = frozenset({
    "messages", "conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
    "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length",
    "tokenizer_kwargs", "tools", "documents",
})  # fmt: skip
_UNKNOWN_TURNS = ("tool", "function")


@dataclass(frozen=True)
class Prompt:
    """What an answer follows.

    Args:
        ids: its tokens.
        text: what ``echo`` repeats.
        hidden: tokens at its beginning that are not in ``text``, such as bos.
    """

    ids: tuple[int, ...]
    text: str = ""
    hidden: int = 0


class Prompts:
    """Renders and tokenises. Its methods compute; call them off the event loop.

    Args:
        tokenizer: of transformers, with a chat template or without (then turns are joined as plain text).
        vocabulary: of it.
        size: ids are below it.
        max_length: tokens that fit; a text that is longer whatever its tokens are is not tokenised.
    """

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, size: int, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._size = size
        longest = vocabulary.longest
        self._max_length, self._most = max_length, None if longest is None else longest * max_length
        ids, bare = self._ids("a", "a", special=True), self._ids("a", "a")
        self._leading = ids[: ids.index(bare[0])] if bare[0] in ids else ()
        self._ends: dict[str | None, frozenset[int]] = {}

    def completion(self, item: str | Sequence[int], place: str) -> Prompt:
        """A prompt of a completion: a text, or token ids.

        Args:
            item: one of the request's.
            place: what the request calls it.

        Raises:
            RequestError: a token that there is not, nothing to continue, or a text that cannot fit.
        """
        if isinstance(item, str):
            return self._some(Prompt((*self._leading, *self._ids(item, place)), item, len(self._leading)), place)
        for i, token in enumerate(item):
            if token >= self._size:
                raise RequestError(
                    f"{place}: there is no token {token} (at {i}); the model's tokens are 0 to {self._size - 1}", place
                )
        written = codecs.decode(b"".join(map(self._vocabulary.bytes, item)), "utf-8", "replace")
        return Prompt(tuple(item), written)

    def chat(self, request: ChatRequest, adapter: Served | None) -> Prompt:
        """The conversation of ``request`` up to where the answer begins, by ``adapter``'s template and system prompt.

        Raises:
            RequestError: turns that this engine or the template cannot do.
        """
        turns = [_turn(message, f"messages.{i}") for i, message in enumerate(request.messages)]
        if adapter is not None and adapter.system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": adapter.system_prompt})
        extra = request.chat_template_kwargs or {}
        if taken := sorted(_TAKEN & extra.keys()):
            raise RequestError(
                f"chat_template_kwargs: {taken[0]!r} is the server's own; leave it out", "chat_template_kwargs"
            )
        template = self._template(adapter)
        try:
            text = self._render(turns, template, extra)
        except Exception as error:  # a template is a program of its own: it raises what it likes
            roles = ", ".join(turn["role"] for turn in turns)
            raise RequestError(
                f"messages: the model's chat template refuses these turns ({roles}): {error}", "messages"
            ) from error
        ids = self._ids(text, "messages")
        if template == PLAIN:
            return self._some(Prompt((*self._leading, *ids), text, len(self._leading)), "messages")
        return self._some(Prompt(ids, text), "messages")

    def ends(self, adapter: Served | None) -> frozenset[int]:
        """Tokens that end an answer in a chat, beside the model's own."""
        template = self._template(adapter)
        if template not in self._ends:
            own = copy.copy(self._tokenizer)
            own.chat_template = None if template == PLAIN else template
            try:
                self._ends[template] = frozenset({ChatTemplate(own).end})
            except DataError:  # a template that ends answers with text: the model's own end has to do
                self._ends[template] = frozenset()
        return self._ends[template]

    def check(self, adapter: Served) -> None:
        """Raises AdapterError where the adapter's own template does not render a question."""
        turns = [{"role": "user", "content": "a"}]
        try:
            self._render(turns, self._template(adapter), {})
        except Exception as error:  # as above
            raise AdapterError(
                f"the chat template of adapter {adapter.name!r} does not render a question: {error}"
            ) from error

    def _template(self, adapter: Served | None) -> str:
        own = adapter.chat_template if adapter is not None else None
        return own or own_template(self._tokenizer) or PLAIN

    def _render(self, turns: list[dict[str, str]], template: str, extra: Mapping[str, Any]) -> str:
        return render(template, turns, True, {**special_tokens(self._tokenizer), **extra})

    def _some(self, prompt: Prompt, place: str) -> Prompt:
        if not prompt.ids:
            raise RequestError(f"{place}: it is empty, and this model has no token that begins a text", place)
        return prompt

    def _ids(self, text: str, place: str, special: bool = False) -> tuple[int, ...]:
        # To tokenise megabytes takes seconds, in which nobody else's prompt is.
        if self._most is not None and len(text) > self._most:
            raise TooLongError(
                f"{place}: {len(text):,} characters are more tokens than the {self._max_length:,} of this model; "
                "shorten it",
                place.partition(".")[0],
            )
        return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _turn(message: ChatMessage, place: str) -> dict[str, str]:
    if message.role in _UNKNOWN_TURNS or message.tool_calls or message.function_call:
        raise RequestError(f"{place}: this engine has no tools; use --engine vllm for them", place)
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if content is None:
        raise RequestError(f"{place}.content: it is missing, expected a text", f"{place}.content")
    if not isinstance(content, str):
        for i, part in enumerate(content):
            if part.type != "text":
                raise RequestError(
                    f"{place}.content.{i}: a part of type {part.type!r}; this engine reads text alone",
                    f"{place}.content.{i}",
                )
    return {"role": role, "content": text_of(message)}


def text_of(message: ChatMessage) -> str:
    """What a turn says; parts that are no text say nothing."""
    content = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text or "" for part in content)
