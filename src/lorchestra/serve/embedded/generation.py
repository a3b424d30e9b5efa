"""Requests and results in tokens: what the scheduler runs, and what the text side makes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lorchestra.serve.engine import Served

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_tokens: at most so many new ones; 0 only scores the prompt.
        temperature: 0 takes the likeliest.
        top_p: the smallest set of likeliest tokens with this probability in sum.
        top_k: the likeliest k; 0 for all.
        min_p: tokens at least this share of the likeliest one's probability.
        seed: of this request's own generator; ``None`` draws one.
        logit_bias: token → added to its logit before anything else.
        presence_penalty: subtracted from the logit of every generated token.
        frequency_penalty: subtracted for every time it was generated.
        logprobs: how many likeliest alternatives to report beside each token (0: its own alone); ``None``: none.
        prompt_logprobs: the same for the prompt's tokens.
        stop_ids: tokens that end it; they are not part of the answer.
        min_tokens: so many before ``stop_ids`` may end it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """One sequence to generate.

    Args:
        id: unique among those that run.
        tenant: whose it is.
        prompt: at least one token.
        members: adapters with their coefficients; none for the base.
        sampling: how.
        layers: group of layers → the members' coefficients there; see :class:`~lorchestra.serve.engine.Target`.
    """

    id: str
    tenant: str
    prompt: tuple[int, ...]
    members: tuple[tuple[Served, float], ...]
    sampling: Sampling
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """A token with its log-probability (nats, of the model after ``logit_bias``, before temperature and penalties).

    Args:
        id: of the token.
        logprob: ``None`` where none was asked for, and for a prompt's first token.
        top: the likeliest tokens there, likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Produced:
    """What a step added.

    Args:
        tokens: new ones.
        prompt: the prompt's tokens with log-probabilities, once, where they were asked for.
        finish: why it ended; nothing comes after that.
    """

    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()
    finish: Finish | None = None


class TokenEngine(Protocol):
    """Generates tokens for many sequences at once."""

    @property
    def max_length(self) -> int:
        """Positions of a sequence, prompt and answer together."""
        ...

    def generate(self, generation: Generation) -> AsyncIterator[Produced]:
        """Steps of ``generation`` as they come; closing the iterator (``aclose``) cancels it and frees its slot.

        Raises:
            RequestError, OverloadedError, StoppingError, AdapterError: before anything was produced.
        """
        ...
