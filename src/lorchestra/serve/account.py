"""What is known of one request so far: who answers, how much, how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorchestra.serve.engine import Chunk, Usage
from lorchestra.serve.metrics import UNKNOWN, Metrics

if TYPE_CHECKING:
    from lorchestra.serve.engine import Target


class Account:
    """What is known of one request so far."""

    def __init__(self, clock: Callable[[], float], metrics: Metrics) -> None:
        self._clock, self._metrics = clock, metrics
        self.began = self._last = clock()
        self.target: Target | None = None
        self.usage = Usage(0, 0)
        self.first_token: float | None = None
        self.choices: Sequence[Any] | None = None
        self._parts: list[str] = []
        self._several = False

    @property
    def label(self) -> str:
        """Of metrics."""
        return UNKNOWN if self.target is None else self._metrics.name(self.target)

    @property
    def answer(self) -> str | None:
        """The text of the one answer, where prompts and answers are kept; ``None`` where there are several."""
        if self.choices is None:
            return None if self._several else "".join(self._parts) or None
        return _text(self.choices[0]) if len(self.choices) == 1 else None

    def received(self, chunk: Chunk, keep: bool) -> None:
        """A part has come: its tokens, and how long they took. ``keep`` its text, where prompts are kept."""
        if keep:
            self._parts += [_text(choice) or "" for choice in chunk.choices]
            self._several = self._several or any(choice.get("index") for choice in chunk.choices)
        now, tokens = self._clock(), chunk.usage.generated - self.usage.generated
        if tokens > 0:
            if self.first_token is None:
                self.first_token = now - self.began
                self._metrics.first_token.labels(self.label).observe(self.first_token)
            else:
                self._metrics.inter_token.labels(self.label).observe((now - self._last) / tokens)
            self._last = now
        self.usage = chunk.usage


def _text(choice: Mapping[str, Any]) -> str | None:
    """Of a choice or a part of one, chat or completion."""
    found = choice.get("text")
    if found is None:
        found = (choice.get("message") or choice.get("delta") or {}).get("content")
    return found if isinstance(found, str) else None
