"""OpenAI's response bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lorchestra.errors import AdapterError, UserError
from lorchestra.serve.engine import (
    Answer,
    Chunk,
    OverloadedError,
    RequestError,
    StoppingError,
    Target,
    TooLongError,
    UnprocessableError,
    Usage,
)
from lorchestra.serve.ports import (
    Card,
    ForbiddenError,
    RevokedModelError,
    UnauthenticatedError,
    UnknownModelError,
    UnknownRequestError,
    WithdrawnError,
)
from lorchestra.serve.wire import ChatRequest, CompletionRequest


class Refusal(BaseModel):
    """What an error says."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refused(BaseModel):
    """OpenAI's body of an error."""

    error: Refusal


@dataclass(frozen=True)
class Said:
    """How an error is told: its status, the body, and seconds after which to try again."""

    status: int
    body: Refused
    retry_after: float | None = None


def refused(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Said:
    """An error of ``status`` with OpenAI's type for it."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return Said(status, Refused(error=Refusal(message=message, type=kind, param=param, code=code)))


def told(error: Exception) -> Said | None:
    """What the client hears of an error; ``None`` where it is not the client's and must not be shown."""
    message = str(error)
    match error:
        case UnprocessableError():
            return refused(422, message, param=error.param, code="invalid_value")
        case RequestError():
            code = "context_length_exceeded" if isinstance(error, TooLongError) else None
            return refused(400, message, param=error.param, code=code)
        case UnauthenticatedError():
            return refused(401, message, code="invalid_api_key")
        case ForbiddenError():
            return refused(403, message, code="forbidden")
        case RevokedModelError():
            return refused(404, message, param="model", code="model_revoked")
        case WithdrawnError():
            return refused(409, message, param="model", code="model_revoked")
        case UnknownRequestError():
            return refused(404, message, param="request_id", code="request_not_found")
        case UnknownModelError():
            return refused(404, message, param="model", code="model_not_found")
        case AdapterError():
            return refused(400, message, param="model", code="adapter_unusable")
        case OverloadedError():
            said = refused(429, message, code="rate_limit_exceeded")
            return Said(said.status, said.body, error.retry_after)
        case StoppingError():
            return refused(503, message, code="unavailable")
        case UserError():
            return refused(400, message)
    return None


@dataclass(frozen=True)
class Heading:
    """What every part of an answer repeats.

    Args:
        request: what was asked.
        request_id: of it.
        created: seconds since 1970.
    """

    request: CompletionRequest | ChatRequest
    request_id: str
    created: int

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of a response."""
        return self._body("", answer.choices) | {"usage": usage(answer.usage)} | chosen(answer.by)

    def part(self, chunk: Chunk) -> dict[str, Any]:
        """A streamed chunk."""
        body = self._body(".chunk", chunk.choices) | chosen(chunk.by)
        options = self.request.stream_options
        if options is not None and options.continuous_usage_stats:
            body["usage"] = usage(chunk.usage)
        elif options is not None and options.include_usage:
            body["usage"] = None
        return body

    def account(self, total: Usage) -> dict[str, Any]:
        """The last chunk, where usage was asked for."""
        return self._body(".chunk", ()) | {"usage": usage(total)}

    def _body(self, suffix: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        chat = isinstance(self.request, ChatRequest)
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.request_id}",
            "object": f"chat.completion{suffix}" if chat else "text_completion",
            "created": self.created,
            "model": self.request.model,
            "choices": list(choices),
        }


def usage(tokens: Usage) -> dict[str, int]:
    """OpenAI's account of tokens."""
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.generated,
        "total_tokens": tokens.prompt + tokens.generated,
    }


def model(card: Card) -> dict[str, Any]:
    """An entry of ``/v1/models``: OpenAI's fields, vLLM's ``root``, ``parent``, ``max_model_len``, and the parents."""
    shown: dict[str, Any] = {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "lorchestra",
        "root": card.base or card.id,
        "parent": card.base,
        "parents": dict(card.parents),
        "digest": card.digest,
        "max_model_len": card.max_length,
    }
    if card.version:
        shown["version"] = card.version
    if card.drift:
        shown["base_drift"] = dict(card.drift)
    if card.chooses is not None:
        shown["chooses"] = list(card.chooses)
    return shown


def answered_by(target: Target | None) -> dict[str, str]:
    """Headers that say who answered: ``clinic@v2``, an adapter of no registry by its name, a mixture with its weights;
    nothing for the base. Where a gate chose, its coefficients: ``clinic=0.7,law=0.3``, or ``none``.

    Where groups of layers have their own, group by group: ``layers.0-9:clinic=0.7,law=0.3;layers.10-19:none``.
    """
    if target is None:
        return {}
    choice = {}
    if target.choice is not None:
        layers = {group: list(found.items()) for group, found in target.choice.layers.items()}
        told = _by_layers(layers, ",") or _weighted(list(target.choice.coefficients.items()), ",")
        choice = {"x-lorchestra-coefficients": told}
    if not target.members:
        return choice
    names = [served.reference or served.name for served, _ in target.members]
    layers = {
        group: [(name, c) for name, c in zip(names, found, strict=True) if c] for group, found in target.layers.items()
    }
    weights = [c for _, c in target.members]
    shown = names[0] if target.single else _weighted(list(zip(names, weights, strict=True)), "+")
    model = {"x-lorchestra-model": _by_layers(layers, "+") or shown}
    return model | ({"x-lorchestra-arm": target.arm} if target.arm else {}) | choice


def _weighted(coefficients: Sequence[tuple[str, float]], between: str) -> str:
    return between.join(f"{name}={c!r}" for name, c in coefficients) or "none"


def _by_layers(layers: Mapping[str, Sequence[tuple[str, float]]], between: str) -> str:
    return ";".join(f"{group}:{_weighted(found, between)}" for group, found in layers.items())


def chosen(target: Target | None) -> dict[str, Any]:
    """The field of a body that says what a gate, or ``auto``, made of the prompt; nothing where none was asked."""
    if target is None or target.choice is None:
        return {}
    choice = target.choice
    told: dict[str, Any] = {"gate": choice.gate, "coefficients": dict(choice.coefficients)}
    if choice.layers:
        told["layers"] = {group: dict(found) for group, found in choice.layers.items()}
    if choice.nearest:
        told["nearest"] = [dict(one) for one in choice.nearest]
    return {"lorchestra": told}
