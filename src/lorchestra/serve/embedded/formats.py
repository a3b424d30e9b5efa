"""OpenAI's choices, in its two formats: completions with the legacy log-probabilities, and chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lorchestra.serve.embedded.generation import Finish
from lorchestra.serve.embedded.vocabulary import Vocabulary
from lorchestra.serve.embedded.writing import Placed

LEAST = -9999.0  # stands for minus infinity, which JSON has not (OpenAI's and vLLM's)


class Format(Protocol):
    """One of the two. ``logprobs`` is what was asked for, ``None`` for none."""

    def whole(self, index: int, text: str, tokens: Sequence[Placed], finish: Finish | None) -> Mapping[str, Any]:
        """A choice of a whole answer."""
        ...

    def part(self, index: int, text: str, tokens: Sequence[Placed], finish: Finish | None) -> Mapping[str, Any]:
        """A choice of a chunk."""
        ...

    def opening(self, index: int) -> Mapping[str, Any] | None:
        """A choice of the chunk before the first text."""
        ...


class Completions:
    """``text_completion``."""

    def __init__(self, vocabulary: Vocabulary, logprobs: int | None) -> None:
        self._vocabulary = vocabulary
        self._logprobs = logprobs

    def whole(self, index: int, text: str, tokens: Sequence[Placed], finish: Finish | None) -> Mapping[str, Any]:
        told = None if self._logprobs is None else self._legacy(tokens)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    part = whole

    def opening(self, index: int) -> Mapping[str, Any] | None:
        return None

    def _legacy(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        shown = self._vocabulary.shown
        return {
            "tokens": [shown(placed.token.id) for placed in tokens],
            "token_logprobs": [
                None if placed.token.logprob is None else finite(placed.token.logprob) for placed in tokens
            ],
            "top_logprobs": [self._top(placed) for placed in tokens],
            "text_offset": [placed.start for placed in tokens],
        }

    def _top(self, placed: Placed) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one, which may be none of them."""
        token = placed.token
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for other, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(self._vocabulary.shown(other), finite(logprob))
        return top


class Chats:
    """``chat.completion``."""

    def __init__(self, vocabulary: Vocabulary, logprobs: int | None) -> None:
        self._vocabulary = vocabulary
        self._logprobs = logprobs

    def whole(self, index: int, text: str, tokens: Sequence[Placed], finish: Finish | None) -> Mapping[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._told(tokens), "finish_reason": finish}

    def part(self, index: int, text: str, tokens: Sequence[Placed], finish: Finish | None) -> Mapping[str, Any]:
        delta = {"content": text} if text or finish is None else {}
        return {"index": index, "delta": delta, "logprobs": self._told(tokens), "finish_reason": finish}

    def opening(self, index: int) -> Mapping[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _told(self, tokens: Sequence[Placed]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        content = []
        for placed in tokens:
            token = placed.token
            top = [self._entry(other, logprob) for other, logprob in token.top]
            logprob = LEAST if token.logprob is None else token.logprob
            content.append(self._entry(token.id, logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._vocabulary.shown(token),
            "logprob": finite(logprob),
            "bytes": list(self._vocabulary.bytes(token)),
        }


def finite(logprob: float) -> float:
    """``logprob``, but no less than :data:`LEAST`."""
    return max(logprob, LEAST)
