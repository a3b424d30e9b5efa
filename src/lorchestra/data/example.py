"""``Example``: one labelled item, whatever format it came in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``role`` is ``system``, ``user`` or ``assistant`` (``tool`` passes through)."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with the gold answer.

    Args:
        messages: at least two; the last is the assistant's gold answer (for a preference pair: the chosen one).
        rejected: the worse last answer of a preference pair, else ``None``.
        choices: the possible last answers of a multiple-choice item; ``messages[-1].content`` is among them.
        group: normalised key of what must not be parted (same question, patient, document).
        origin: where it was read, ``file.jsonl:17`` (1-based row).
    """

    messages: tuple[Message, ...]
    rejected: str | None = None
    choices: tuple[str, ...] = ()
    group: str = ""
    origin: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the gold answer."""
        return self.messages[:-1]

    @property
    def asked(self) -> str:
        """The prompt's turns as text, without those of the system."""
        return "\n".join(turn.content for turn in self.prompt if turn.role != "system")

    @property
    def gold(self) -> str:
        """The gold answer."""
        return self.messages[-1].content

    @property
    def answer(self) -> int:
        """Index of the gold answer in ``choices``.

        Raises:
            ValueError: not a multiple-choice item.
        """
        return self.choices.index(self.gold)
