"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorchestra.serve.embedded.generation import Finish, Produced, Token
from lorchestra.serve.embedded.vocabulary import Vocabulary


@dataclass(frozen=True)
class Placed:
    """A token, and the characters of its text: it begins at ``start`` and ends before ``end``."""

    token: Token
    start: int
    end: int


@dataclass(frozen=True)
class Piece:
    """What may be shown now: text, its tokens, and why it ended."""

    text: str = ""
    tokens: tuple[Placed, ...] = ()
    finish: Finish | None = None


class Writer:
    """The text of one answer.

    A character is shown when its last byte is there; one that the length limit cuts is left out. Text that may be the
    beginning of a stop string is held back until it is none.

    Args:
        vocabulary: what tokens write.
        stops: texts that end the answer, and are no part of it.
        min_tokens: so many tokens before a stop string counts.
        start: characters before the answer, that offsets count from.

    Attributes:
        count: tokens so far.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = (), min_tokens: int = 0, start: int = 0) -> None:
        self._vocabulary = vocabulary
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = start  # characters that were shown, and those before the answer
        self._held = ""
        self._tokens: list[Placed] = []
        self.count = 0

    def add(self, produced: Produced) -> Piece:
        """What ``produced`` lets be shown. After a piece with ``finish`` there is nothing to come."""
        for token in produced.tokens:
            self.count += 1
            start = self._shown + len(self._held)
            content = b"" if self._vocabulary.special(token.id) else self._vocabulary.bytes(token.id)
            self._held += self._decoder.decode(content)
            self._tokens.append(Placed(token, start, self._shown + len(self._held)))
            if self.count >= self._min_tokens and (cut := self._stop()) is not None:
                return self._end(cut, "stop")
        if produced.finish is not None:
            return self._end(len(self._held), produced.finish)
        return self._show(len(self._held) - self._doubtful())

    def _stop(self) -> int | None:
        """Where the first stop string begins, in what is held."""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _doubtful(self) -> int:
        """Length of the longest end of what is held that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _show(self, length: int) -> Piece:
        text, self._held = self._held[:length], self._held[length:]
        self._shown += length
        ready = next((i for i, placed in enumerate(self._tokens) if placed.end > self._shown), len(self._tokens))
        if not text:
            return Piece()
        tokens, self._tokens = self._tokens[:ready], self._tokens[ready:]
        return Piece(text, tuple(tokens))

    def _end(self, length: int, finish: Finish) -> Piece:
        whole = length == len(self._held)
        cut = self._shown + length
        tokens = tuple(placed for placed in self._tokens if whole or placed.start < cut)
        return Piece(self._held[:length], tokens, finish)


def placed_prompt(vocabulary: Vocabulary, tokens: Iterable[Token], hidden: int) -> tuple[Placed, ...]:
    """The tokens of a prompt with the places of their text; the first ``hidden`` ones write none."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    placed: list[Placed] = []
    at = 0
    for i, token in enumerate(tokens):
        length = len(decoder.decode(b"" if i < hidden else vocabulary.bytes(token.id)))
        placed.append(Placed(token, at, at + length))
        at += length
    return tuple(placed)
