"""What the HTTP side calls, and nothing else: it knows callers, requests and refusals, but neither engines nor keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lorchestra.errors import UserError
from lorchestra.serve.engine import Answer, Chunk

if TYPE_CHECKING:
    from lorchestra.serve.wire import ChatRequest, CompletionRequest, FeedbackRequest


class UnauthenticatedError(UserError):
    """No key, or one that is unknown or revoked: HTTP 401. The message never says which."""


class ForbiddenError(UserError):
    """The key is good, and may not do this: HTTP 403."""


class UnknownModelError(UserError):
    """No such model for this caller, whether it exists for others or not: HTTP 404."""

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message)
        self.model = model


class RevokedModelError(UnknownModelError):
    """The model is a version that was revoked, or an alias of one: HTTP 404, to those who may use the name."""


class UnknownRequestError(UserError):
    """Feedback on what was not answered to this caller, or so long ago that it is forgotten: HTTP 404."""


class WithdrawnError(UserError):
    """The version that was answering was revoked meanwhile: HTTP 409, or the last event of a stream."""


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        tenant: whose limits and share of time hold, and whose name the logs have.
    """

    tenant: str


@dataclass(frozen=True)
class Card:
    """A model as ``/v1/models`` shows it.

    Args:
        id: what a request's ``model`` says.
        created: seconds since 1970.
        base: id of the base of an adapter; ``None`` for the base itself.
        parents: name → coefficient of what an adapter was fused from.
        digest: of an adapter's weights, ``sha256:…``.
        max_length: positions, prompt and answer together; ``None`` where the engine does not say.
        version: of a registry, that answers at this moment: ``clinic@v2``.
        drift: measured differences of this server's base from the one that it was trained on, where they are others.
        chooses: of a gate, or ``auto``: the adapters that it chooses from; ``None`` for everything else.
    """

    id: str
    created: int
    base: str | None = None
    parents: Mapping[str, float] = field(default_factory=dict)
    digest: str | None = None
    max_length: int | None = None
    version: str = ""
    drift: Mapping[str, Any] = field(default_factory=dict)
    chooses: tuple[str, ...] | None = None


class Gateway(Protocol):
    """Everything between HTTP and the engine: keys, names, limits, queue, accounts.

    Any method may raise ``RequestError`` (400), :class:`ForbiddenError` (403), :class:`UnknownModelError` (404),
    ``AdapterError`` (400: the adapter cannot be used), ``OverloadedError`` (429) and ``StoppingError`` (503). Anything
    else is a failure of the server's own: 500, and the caller is not told what.
    """

    @property
    def ready(self) -> bool:
        """Whether it takes requests now: the engine is up, not draining, and the registry was seen lately enough."""
        ...

    @property
    def registry_stale(self) -> float | None:
        """Seconds since the registry was last seen; ``None`` where there is none, or nothing is wrong with it."""
        ...

    def authenticate(self, authorization: str | None) -> Caller:
        """Who sends this ``Authorization`` header.

        Raises:
            UnauthenticatedError: nobody that is known.
        """
        ...

    def models(self, caller: Caller) -> Sequence[Card]:
        """What ``caller`` may use, and no trace of anything else: the base, adapters, aliases."""
        ...

    async def answer(self, caller: Caller, request_id: str, body: CompletionRequest | ChatRequest) -> Answer:
        """The whole answer; cancelling the task frees what it held."""
        ...

    def stream(self, caller: Caller, request_id: str, body: CompletionRequest | ChatRequest) -> AsyncIterator[Chunk]:
        """The answer in parts. What can be refused is refused before the first part; closing it (``aclose``) frees
        what it held. The first part is asked for by another task than the others.
        """
        ...

    async def load(self, caller: Caller, name: str, path: str) -> None:
        """Serve the PEFT directory ``path`` as ``name``, from now on (vLLM's ``/v1/load_lora_adapter``).

        Raises:
            RequestError: the path leads out of the configured roots, or the name is taken by other weights.
        """
        ...

    async def unload(self, caller: Caller, name: str) -> None:
        """Serve ``name`` no longer."""
        ...

    async def feedback(self, caller: Caller, request_id: str, said: FeedbackRequest) -> None:
        """Keep what ``caller`` says of an answer that it was given.

        Args:
            caller: who says it.
            request_id: of this request.
            said: of which answer, and what.

        Raises:
            UnknownRequestError: nothing was answered to this caller under that id.
            UnprocessableError: a comment that cannot be kept.
        """
        ...

    def registry(self, caller: Caller) -> Mapping[str, Any]:
        """What is followed of the registry, and how that goes, as plain JSON. It is the operator's.

        Raises:
            ForbiddenError: the caller is none.
        """
        ...

    def told(self, kind: str, request_id: str, tenant: str | None, status: int, **more: Any) -> None:
        """Log a request that is no question to a model."""
        ...

    def metrics(self, caller: Caller) -> bytes:
        """Prometheus' text format. It names every tenant's adapters, so it is the operator's.

        Raises:
            ForbiddenError: the caller is none.
        """
        ...
