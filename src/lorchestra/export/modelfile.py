"""Ollama's Modelfile: where the weights are, how a conversation is written, where an answer stops.

A chat template is a Jinja program, Ollama's is a Go one. The pieces are found by rendering conversations with marks in
them; the template made of the pieces is used only if it renders every kind of conversation as the original does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from lorchestra.data.example import Message
from lorchestra.data.template import ChatTemplate
from lorchestra.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = {role: f"lorchestra {role} says" for role in ("system", "user", "assistant")}


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around texts, each a pair (before, after).

    Args:
        lead: before everything if there is no system turn; a default system text is in it.
        system: around the system text.
        user, assistant: around a turn.
        opening: the generation prompt.
        merged: the system text stands inside the first user turn, whose beginning is then in ``system``.
    """

    lead: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    merged: bool = False

    def render(self, turns: Sequence[Message]) -> str:
        """What Ollama writes with :meth:`go`."""
        system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
        out = f"{self.system[0]}{system}{self.system[1]}" if system else self.lead
        begun = self.merged and bool(system)
        for turn in turns:
            if turn.role == "user":
                out += f"{'' if begun else self.user[0]}{turn.content}{self.user[1]}"
                begun = False
            elif turn.role == "assistant":
                out += f"{self.assistant[0]}{turn.content}{self.assistant[1]}"
        return out + self.opening

    def go(self) -> str:
        """The Go template."""
        before, begin = self.user[0], ""
        if self.merged:
            before, begin = f"{_go('if not $begun')}{before}{_go('end')}{_go('$begun = ``')}", _go("$begun := .System")
        system, content, end = self.system, _go(".Content"), _go("end")
        return (
            f"{_go('if .System')}{system[0]}{_go('.System')}{system[1]}{_go('else')}{self.lead}{end}{begin}"
            f"{_go('range .Messages')}"
            f"{_go('if eq .Role `user`')}{before}{content}{self.user[1]}"
            f"{_go('else if eq .Role `assistant`')}{self.assistant[0]}{content}{self.assistant[1]}{end}{end}"
            f"{self.opening}"
        )

    def without(self, bos: str) -> Pieces:
        """The same without a leading bos token."""
        before, after = self.system
        return replace(self, lead=self.lead.removeprefix(bos), system=(before.removeprefix(bos), after))


def _go(action: str) -> str:
    """An action of a Go template; quotes in it are written as backquotes."""
    return "{{ " + action.replace("`", '"') + " }}"


def modelfile(weights: str, tokenizer: PreTrainedTokenizerBase, adapter: str = "") -> tuple[str, bool]:
    """The Modelfile's text, and whether it has a template (without, Ollama goes by the one in the GGUF file).

    Args:
        weights: file or model name of ``FROM``.
        tokenizer: with the chat template.
        adapter: file of ``ADAPTER``, if there is one.
    """
    lines = [f"FROM {weights}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    try:
        template = ChatTemplate(tokenizer)
    except DataError:
        return "\n".join(lines) + "\n", False
    pieces = None if template.plain else find_pieces(template)
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.go()}"""')
    stops = [template.end_text]
    if tokenizer.eos_token and tokenizer.eos_token not in stops:
        stops.append(str(tokenizer.eos_token))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n", pieces is not None


def find_pieces(template: ChatTemplate) -> Pieces | None:
    """The pieces that write every conversation as the chat template does; ``None`` if there are none.

    A bos token at the start is left out where the tokenizer puts it there itself: so does llama.cpp.
    """
    found = _cut(template)
    if found is None:
        return None
    tokenizer = template.tokenizer
    bos = ""
    if tokenizer.bos_token and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        bos = str(tokenizer.bos_token)
        found = found.without(bos)
    for turns in _conversations():
        try:
            expected = template.text(turns, generation=True)
        except DataError:
            if turns[0].role == "system":
                continue  # a template that refuses system turns: with Ollama, give none
            return None
        if found.render(turns) != expected.removeprefix(bos):
            return None
    pairs = (found.system, found.user, found.assistant)
    texts = (found.lead, found.opening, *(text for pair in pairs for text in pair))
    return None if any('"""' in text or "{{" in text for text in texts) else found


def _conversations() -> list[tuple[Message, ...]]:
    """With and without a system turn, of one to three questions; texts of several kinds."""
    texts = ("What lowers a fever?", "发烧怎么办?\n\nTwo lines.", "1 < 2 & {x}")
    out = []
    for system, questions in product((False, True), (1, 2, 3)):
        turns = [Message("system", "Be brief.")] if system else []
        for k in range(questions):
            turns += [Message("user", texts[k]), Message("assistant", f"Answer {k}.")]
        out.append(tuple(turns[:-1]))
    return out


def _cut(template: ChatTemplate) -> Pieces | None:
    """Cut renderings at the marks; ``None`` where a piece is not where it should be."""
    system, user, assistant = (Message(role, text) for role, text in _MARKS.items())
    try:
        opening = template.text((user,), generation=True).removeprefix(template.text((user,)))
        finished = template.text((user, assistant))
        whole = template.text((user, assistant, user), generation=True)
    except DataError:
        return None
    start, _, rest = whole.partition(user.content)
    middle, _, rest = rest.partition(assistant.content)
    between, _, end = rest.partition(user.content)
    after_assistant = finished.partition(assistant.content)[2]
    before_user, after_user = between.removeprefix(after_assistant), end.removesuffix(opening)
    if not (between.startswith(after_assistant) and start.endswith(before_user) and middle.startswith(after_user)):
        return None
    lead = start.removesuffix(before_user)
    around = (before_user, after_user), (middle.removeprefix(after_user), after_assistant)
    try:
        head, said, rest = template.text((system, user), generation=True).partition(system.content)
    except DataError:
        return Pieces(lead, (lead, ""), *around, opening)
    if not said:
        return None  # the system text is dropped
    after, _, _ = rest.partition(user.content)
    merged = not after.endswith(before_user)
    return Pieces(lead, (head, after if merged else after.removesuffix(before_user)), *around, opening, merged)
