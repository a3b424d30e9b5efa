"""What the HTTP side asks of an engine, and what it gets back; nothing here knows HTTP, torch or vLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lorchestra.errors import LorchestraError, UserError

if TYPE_CHECKING:
    from lorchestra.serve.wire import ChatRequest, CompletionRequest


class OverloadedError(LorchestraError):
    """A queue or a limit is full; try again after ``retry_after`` seconds (HTTP 429)."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppingError(LorchestraError):
    """The engine is draining or not ready: HTTP 503."""


class RequestError(UserError):
    """A request that this engine cannot do as asked (HTTP 400).

    Args:
        message: what, got, expected.
        param: the field of the request it is about.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnprocessableError(RequestError):
    """A request that is JSON, and does not say what it should: HTTP 422, on routes that are no OpenAI's."""


class TooLongError(RequestError):
    """A prompt and its answer that do not fit into the context: OpenAI's ``context_length_exceeded``."""


@dataclass(frozen=True)
class Served:
    """An adapter as a server knows it; ``key`` names these very weights and never others.

    Args:
        name: the tenant's name for it.
        digest: of its weights, ``sha256:…``.
        directory: a PEFT directory.
        parents: name → coefficient, for fused adapters.
        chat_template: its own (Jinja), where it differs from the base's.
        system_prompt: put before a chat without a system turn.
        defaults: of sampling, by OpenAI's field names; a request's own values win.
        reference: of a registry's version, ``clinic@v2``; empty for what is in none.
        version: its id there.
        base: digest of the weights that it was trained on, where it says so.
        sibling_of: digest of the base's weights that it was trained on, where those of this server's base are others
            and the registry has them on record as derived from it.
    """

    name: str
    digest: str
    directory: Path
    parents: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    system_prompt: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    version: int | None = None
    base: str = ""
    sibling_of: str = ""

    @property
    def key(self) -> str:
        """``name@digest``, short: what an engine mounts it under."""
        return f"{self.name}@{self.digest.removeprefix('sha256:')[:16]}"


@dataclass(frozen=True)
class Choice:
    """What a gate, or ``auto``, made of a prompt.

    Args:
        gate: its name, or ``auto``.
        coefficients: name of an adapter → its coefficient, in the order of the answer's members; the others have 0, and
            where all have, the base answers. With ``layers`` the mean over these, each counting once.
        nearest: of the prompts that the gate was fitted on, those that this one is nearest to, as plain JSON.
        layers: group of layers → name of an adapter → its coefficient there, but for 0; of a gate that gave groups of
            layers different ones.
    """

    gate: str
    coefficients: Mapping[str, float]
    nearest: tuple[Mapping[str, Any], ...] = ()
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """Who answers: adapters with coefficients, none for the base.

    Args:
        asked: the request's ``model``, which the response repeats.
        members: adapters and their coefficients; with ``layers`` the mean over these.
        arm: ``stable`` or ``candidate``, where a canary splits this traffic and the request counts for it.
        rollout: id of that canary.
        choice: who chose the members, where it was not the request itself.
        layers: group of layers (``layers.0-9``) → the members' coefficients there, in their order; none: the members'
            own hold in all layers.
    """

    asked: str
    members: tuple[tuple[Served, float], ...] = ()
    arm: Literal["", "stable", "candidate"] = ""
    rollout: int | None = None
    choice: Choice | None = None
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def single(self) -> Served | None:
        """The one adapter at coefficient 1, whose template, system prompt and defaults then hold."""
        alone = len(self.members) == 1 and self.members[0][1] == 1.0 and not self.layers
        return self.members[0][0] if alone else None


@dataclass(frozen=True)
class Call:
    """A request that may be answered: it was authenticated, resolved and is within its tenant's limits.

    Args:
        id: of the request, in logs and headers.
        tenant: whose it is, for fair scheduling.
        target: who answers.
        body: what was asked.
    """

    id: str
    tenant: str
    target: Target
    body: CompletionRequest | ChatRequest


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt, and generated ones so far."""

    prompt: int
    generated: int


@dataclass(frozen=True)
class Chunk:
    """A part of a streamed answer.

    Args:
        choices: OpenAI's ``choices`` of a streamed chunk (``delta`` for chats, ``text`` for completions).
        usage: so far.
        by: who answers; of the first part, set by the gateway.
    """

    choices: Sequence[Mapping[str, Any]]
    usage: Usage
    by: Target | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Args:
        choices: OpenAI's ``choices`` of a response (``message`` for chats, ``text`` for completions).
        usage: of all choices.
        by: who answered; set by the gateway.
    """

    choices: Sequence[Mapping[str, Any]]
    usage: Usage
    by: Target | None = None


class Observer(Protocol):
    """Hears from an engine what only it can know; any thread may call it."""

    def waited(self, members: Sequence[tuple[Served, float]], seconds: float) -> None:
        """A sequence's prompt was taken up ``seconds`` after it came."""
        ...

    def loaded(self, adapter: Served, seconds: float) -> None:
        """An adapter was read into memory."""
        ...

    def evicted(self, adapter: Served) -> None:
        """An adapter was put out of memory, for room or because it was unloaded."""
        ...


class Engine(Protocol):
    """Answers calls. One engine belongs to one event loop."""

    @property
    def ready(self) -> bool:
        """Whether it can answer now."""
        ...

    async def start(self) -> None:
        """Bring it up; returns when it is ready."""
        ...

    async def stop(self, grace: float) -> None:
        """Take nothing new, finish what runs within ``grace`` seconds, then let go of everything."""
        ...

    async def load(self, adapter: Served) -> None:
        """Make it resident, if it is not; concurrent calls load once.

        Raises:
            AdapterError: it cannot be read, is of another base, fits no module, is too large or not finite.
        """
        ...

    async def unload(self, adapter: Served) -> None:
        """Forget it; requests that use it end first."""
        ...

    def resident(self) -> Sequence[str]:
        """Keys of the adapters in memory."""
        ...

    async def features(self, body: CompletionRequest | ChatRequest, layers: int, last: bool) -> Sequence[float]:
        """What a gate sees of a request: ``[n]``, of its one prompt by the base's own chat template; nothing where the
        prompt has no text.

        Args:
            body: the request.
            layers: the states after so many of the base's layers; 0: the input embeddings.
            last: append the last token's state to the mean over all tokens.

        Raises:
            RequestError: several prompts, one that cannot be read, or an engine that has no gates.
            StoppingError: the engine starts or stops.
        """
        ...

    async def answer(self, call: Call) -> Answer:
        """The whole answer; cancelling the task frees what it held.

        Raises:
            RequestError, OverloadedError, StoppingError, AdapterError
        """
        ...

    def stream(self, call: Call) -> AsyncIterator[Chunk]:
        """The answer in parts; closing the iterator frees what it held. Raises as :meth:`answer`, before a first part
        where it can.
        """
        ...
