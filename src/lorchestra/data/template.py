"""A tokenizer with its chat template, looked at closely: what it writes, where an answer begins and ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lorchestra.data.chat_sandbox import render
from lorchestra.data.example import Message
from lorchestra.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without a chat template: plain text. An answer follows its prompt as both are written, and ends with eos.
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% elif m['role'] != 'user' %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)
_QUESTION, _ANSWER = "lorchestra asks", "lorchestra answers"
_EMPTY_BLOCK = re.compile(r"<(\w+)>\s*</\1>\s*$")  # how a template says: no thinking, answer at once


class ChatTemplate:
    """Texts and token ids of conversations.

    Args:
        tokenizer: with a chat template, or without (plain text: prompt, completion, eos).

    Attributes:
        plain: whether there is no chat template.
        end_text: the token that ends an answer, as text.
        end: its id.
        notes: what a user should know about the template.

    Raises:
        DataError: a template that fails, that ends an answer with no token generation could stop at, or that opens an
            answer otherwise than it renders a finished one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        own = own_template(tokenizer)
        self.plain, self._template = own is None, own or PLAIN
        self.leading = self._leading_ids() if self.plain else ()
        self._controls = self._control_tokens()
        self._control = re.compile("|".join(map(re.escape, self._controls)) or r"(?!)")
        self.end_text, self.end, self.notes = self._examine()

    def text(self, messages: Sequence[Message], generation: bool = False) -> str:
        """The template's rendering, with the generation prompt if ``generation``."""
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            return render(self._template, turns, generation, special_tokens(self.tokenizer))
        except Exception as error:  # a template is a program of its own: it raises what it likes
            raise DataError(
                f"the chat template refuses a conversation of {', '.join(turn.role for turn in messages)}: {error}. "
                "Leave out or merge turns, or set another chat template"
            ) from error

    def ids(self, text: str, bos: bool = True) -> tuple[int, ...]:
        """Token ids of rendered text; a template writes its own bos, plain text gets the tokenizer's if ``bos``."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return (*(self.leading if bos else ()), *ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def boundary(self, opening: str, whole: str) -> int:
        """Where in ``whole``, a finished conversation, the answer begins that ``opening`` (with the generation prompt)
        asks for.

        Usually ``whole`` begins with ``opening``. Some thinking models open an answer with an empty block that they do
        not render again when it is finished: then what inference sees stays the prompt, and the answer follows it.

        Raises:
            DataError: training and inference would differ.
        """
        if whole.startswith(opening):
            return len(opening)
        block = _EMPTY_BLOCK.search(opening)
        if block and whole.startswith(opening[: block.start()]):
            return block.start()
        at = shared(opening, whole)
        raise DataError(
            "the chat template opens an answer otherwise than it renders a finished one, so training and inference "
            f"would differ: after {opening[max(0, at - 40) : at]!r} the generation prompt goes on with "
            f"{opening[at:][:40]!r}, the finished conversation with {whole[at:][:40]!r}. Set a chat template whose two "
            "renderings agree (of a thinking model, the template without thinking)"
        )

    def head(self, messages: Sequence[Message]) -> str:
        """The rendering of ``messages`` up to where the text of the first turn after the system turn begins."""
        first = next(i for i, turn in enumerate(messages) if turn.role != "system")
        probe = (*messages[:first], Message(messages[first].role, _QUESTION), *messages[first + 1 :])
        return self.text(probe, generation=True).partition(_QUESTION)[0]

    def refuse_controls(self, conversations: Sequence[Sequence[Message]]) -> None:
        """Content must not contain control tokens: they would be read as the real ones.

        Raises:
            DataError: it does.
        """
        for turn in dict.fromkeys(turn for turns in conversations for turn in turns):
            if found := self._control.search(turn.content):
                raise DataError(
                    f"a {turn.role} turn contains the control token {found[0]!r} as text, which would be read as the "
                    "real one; remove it (data that is already rendered must be split into turns again)"
                )

    def _leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before plain text: often nothing or bos."""
        with_special = list(self.tokenizer("a")["input_ids"])
        bare = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        return tuple(with_special[: with_special.index(bare[0])]) if bare[0] in with_special else ()

    def _control_tokens(self) -> list[str]:
        special: dict[int, Any] = getattr(self.tokenizer, "added_tokens_decoder", {})
        named = [str(token) for token in special.values() if token.special]
        return sorted({token for token in (*named, *self.tokenizer.all_special_tokens) if token.strip()}, key=len)[::-1]

    def _examine(self) -> tuple[str, int, tuple[str, ...]]:
        """Find the end-of-turn token, by rendering a question and an answer that are easy to find again."""
        turns = (Message("user", _QUESTION), Message("assistant", _ANSWER))
        opening, whole = self.text(turns[:1], generation=True), self.text(turns)
        start = self.boundary(opening, whole)
        before, found, after = whole[start:].partition(_ANSWER)
        if not found:
            raise DataError("the chat template does not render the assistant's answer; set one that does")
        places = [(after.find(token), -len(token), token) for token in self._controls if token in after]
        if not places:
            raise DataError(
                f"no end-of-turn token: after an answer the chat template writes {after!r}, no special token, "
                "so a model could not learn to stop. "
                + (
                    "Give the tokenizer an eos_token."
                    if self.plain
                    else f"Let it write {self.tokenizer.eos_token or 'an eos token'} there, and use that template."
                )
            )
        text = min(places)[2]
        end = int(self.tokenizer.convert_tokens_to_ids(text))
        notes = []
        if self.plain:
            notes.append("the tokenizer has no chat template: prompt and completion are joined as they are written")
        elif before.strip():
            notes.append(f"the generation prompt does not include {before!r}: it is learned as part of the answer")
        if end != self.tokenizer.eos_token_id:
            notes.append(f"answers end with {text!r}, not with the eos token {self.tokenizer.eos_token!r}: stop at it")
        return text, end, tuple(notes)


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template; of several named ones (older models) the default; ``None`` where it has none."""
    own = getattr(tokenizer, "chat_template", None)
    return (own.get("default") if isinstance(own, dict) else own) or None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a chat template sees besides the turns: ``bos_token``, ``eos_token`` …, as texts."""
    named = tokenizer.special_tokens_map
    return {
        name: list(map(str, token)) if isinstance(token, list | tuple) else str(token) for name, token in named.items()
    }


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
