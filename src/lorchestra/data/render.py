"""``Example`` → token ids, with the supervised ones marked: exactly what inference sees, then exactly what it must say.

For a conversation ending in the gold answer, P is the chat template's rendering of everything before it with the
generation prompt, F its rendering of the whole. F must begin with P. The prompt is P tokenised alone, as inference
does it; the branch is the rest of F up to and including the end-of-turn token, at which generation stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorchestra.data.example import Example, Message
from lorchestra.data.template import ChatTemplate, shared
from lorchestra.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Branch:
    """One answer: ``ids`` with its end-of-turn token last, and which of them the loss counts."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt and the answers that branch off it.

    Args:
        prompt: token ids that inference would see.
        branches: one of SFT; chosen, rejected of a pair; one per choice.
        truncated: tokens cut off to fit ``max_length``, prompt and answers together.
    """

    prompt: tuple[int, ...]
    branches: tuple[Branch, ...]
    truncated: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(len(branch.ids) for branch in self.branches)

    @property
    def supervised(self) -> int:
        """Tokens that the loss counts, over all branches."""
        return sum(sum(branch.supervised) for branch in self.branches)


class Renderer:
    """Renders with one tokenizer and its chat template.

    Args:
        tokenizer: with a chat template, or without (plain text: prompt, completion, eos).
        max_length: tokens that a prompt with one answer may have; ``None``: any number.
        supervise: ``assistant``: every assistant turn; ``last``: the gold answer only.

    Attributes:
        end_of_turn: id of the token that ends an answer; generation must stop at it.
        notes: what a user should know about the template.

    Raises:
        DataError: a template that fails, that ends an answer with no token generation could stop at, or that opens an
            answer otherwise than it renders a finished one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        supervise: Literal["assistant", "last"] = "assistant",
    ) -> None:
        if max_length is not None and max_length < 2:
            raise DataError(f"max_length is {max_length}; expected at least 2 tokens, or none for no limit")
        if supervise not in ("assistant", "last"):
            raise DataError(f"supervise is {supervise!r}; expected 'assistant' (all of its turns) or 'last'")
        self.tokenizer, self.max_length, self.supervise = tokenizer, max_length, supervise
        self.template = ChatTemplate(tokenizer)
        self.end_of_turn, self.notes = self.template.end, self.template.notes

    # What goes in, what comes out

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of ``messages`` with the generation prompt, as inference tokenises them. Not truncated."""
        return self.template.ids(self.template.text(messages, generation=True))

    def sft(self, example: Example) -> Rendered:
        """One branch: the answer; with ``supervise="assistant"`` everything from the first assistant turn on.

        Raises:
            DataError: text that contains a control token, or that cannot be tokenised consistently.
        """
        first = next(i for i, turn in enumerate(example.messages) if i and turn.role == "assistant")
        first = first if self.supervise == "assistant" else len(example.messages) - 1
        return self._render(example, (example.messages,), first)

    def preference(self, example: Example) -> Rendered:
        """Two branches, chosen and rejected; only their last turns count, since everything before is shared.

        Raises:
            DataError: no rejected answer, or as :meth:`sft`.
        """
        if example.rejected is None:
            raise DataError(f"{example.origin}: a preference pair needs a rejected answer, and this example has none")
        return self._last_turns(example, (example.gold, example.rejected))

    def choice(self, example: Example) -> Rendered:
        """One branch for each of ``example.choices``, in order.

        Raises:
            DataError: no choices, or as :meth:`sft`.
        """
        if not example.choices:
            raise DataError(f"{example.origin}: a multiple-choice item needs choices, and this example has none")
        return self._last_turns(example, example.choices)

    def spans(self, rendered: Rendered) -> tuple[str, list[list[int]]]:
        """The text and the ``[start, end)`` characters of it that are supervised. Branches after the first stand below
        it, each under a line with its number."""
        text, spans = self.template.decode(rendered.prompt), []
        for number, branch in enumerate(rendered.branches, start=1):
            if number > 1:
                text += f"\n── answer {number}\n"
            start = 0
            for end in range(1, len(branch.ids) + 1):
                if end == len(branch.ids) or branch.supervised[end] != branch.supervised[start]:
                    piece = self.template.decode(branch.ids[start:end])
                    if branch.supervised[start]:
                        spans.append([len(text), len(text) + len(piece)])
                    text, start = text + piece, end
        return text, spans

    # How

    def _last_turns(self, example: Example, answers: Sequence[str]) -> Rendered:
        conversations = tuple((*example.prompt, Message("assistant", answer)) for answer in answers)
        return self._render(example, conversations, len(example.messages) - 1)

    def _render(self, example: Example, conversations: Sequence[Sequence[Message]], first: int) -> Rendered:
        try:
            self.template.refuse_controls(conversations)
            prompt_text = self.template.text(conversations[0][:first], generation=True)
            prompt = self.template.ids(prompt_text)
            branches = [self._branch(turns, first, prompt_text, prompt) for turns in conversations]
            return self._fit(prompt, branches, conversations[0][:first])
        except DataError as error:
            raise DataError(f"{example.origin}: {error}" if example.origin else str(error)) from error

    def _branch(self, turns: Sequence[Message], first: int, prompt_text: str, prompt: tuple[int, ...]) -> Branch:
        """The ids after ``prompt``, in alternating pieces: an answer (supervised), what leads to the next (not)."""
        whole = self.template.text(turns)
        ids, text = list(prompt), prompt_text  # so far
        supervised: list[bool] = []
        answers = [i for i in range(first, len(turns)) if turns[i].role == "assistant"]
        openings = [prompt_text, *(self.template.text(turns[:i], generation=True) for i in answers[1:])]
        starts = [self.template.boundary(opening, whole) for opening in openings]
        if len(answers) > 1 and starts != [len(opening) for opening in openings]:
            raise DataError(
                "the chat template renders an earlier answer otherwise than it opens it, so of a conversation only the "
                "last answer can be trained on: set supervise to last"
            )
        at = starts[0]
        for i, start, limit in zip(answers, starts, [*starts[1:], len(whole)], strict=True):
            end = whole.find(self.template.end_text, start) + len(self.template.end_text)
            if start < at or not start < end <= limit:
                raise DataError(
                    f"the chat template ends turn {i + 1} without the end-of-turn token {self.template.end_text!r}; "
                    "set supervise to last, which trains on the last answer alone"
                )
            for more, counts in ((whole[at:start], False), (whole[start:end], True)):
                if more:
                    new = self._continue(ids, text, more)
                    ids += new
                    text += more
                    supervised += [counts] * len(new)
            at = end
        return Branch(tuple(ids[len(prompt) :]), tuple(supervised))

    def _continue(self, ids: Sequence[int], text: str, more: str) -> tuple[int, ...]:
        """Ids of ``more``, which follows ``text`` with its ``ids``.

        Mostly the ids of both together begin with ``ids``. Where a token would reach over the border (a line break
        before, another after), inference has already fixed what stands before it, so the rest is tokenised alone.
        """
        whole = self.template.ids(text + more)
        if whole[: len(ids)] == tuple(ids):
            return whole[len(ids) :]
        alone = self.template.ids(more, bos=False)
        if self.template.decode((*ids, *alone)) != self.template.decode(whole):
            raise DataError(
                f"the tokenizer does not split {more[:60]!r} off what stands before it ({text[-40:]!r}); take white "
                "space away from where the answer begins"
            )
        return alone

    def _fit(self, prompt: tuple[int, ...], branches: list[Branch], messages: Sequence[Message]) -> Rendered:
        """Cut to ``max_length``: the prompt from the left, behind its system turn; an answer only if it alone is too
        long, from the right."""
        if self.max_length is None:
            return Rendered(prompt, tuple(branches))
        cut = 0
        for i, branch in enumerate(branches):
            if len(branch.ids) > self.max_length:
                cut += len(branch.ids) - self.max_length
                branches[i] = Branch(branch.ids[: self.max_length], branch.supervised[: self.max_length])
        room = self.max_length - max(len(branch.ids) for branch in branches)
        if len(prompt) > room:
            cut += len(prompt) - room
            head = self.template.ids(self.template.head(messages))
            head = head[: shared(head, prompt)]
            if 2 * len(head) > room:  # the question comes before a long system turn
                head = self.template.leading[:room]
            prompt = (*head, *prompt[len(prompt) - (room - len(head)) :])
        return Rendered(prompt, tuple(branches), cut)
