"""The playground: what a mixture says to a prompt, streamed. It is answered as the key's own requests are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from lorchestra.console.guard import Asked, Route, failed
from lorchestra.serve.responses import answered_by, chosen
from lorchestra.serve.sse import EventStream, close, event, while_connected
from lorchestra.serve.wire import ChatRequest, CompletionRequest, parse

if TYPE_CHECKING:
    from lorchestra.serve.engine import Chunk
    from lorchestra.serve.gateway import TenantGateway


class Question(BaseModel):
    """A prompt and how it is to be answered.

    Args:
        model: an adapter, a version, a mixture, a gate or ``auto``.
        kind: ``chat`` by the chat template, ``completion`` without.
        prompt: a text.
        system: put before it, in a chat.
        user: of the tenant; with a canary it decides who answers.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=2048)]
    kind: Literal["chat", "completion"] = "chat"
    prompt: Annotated[str, Field(min_length=1, max_length=200_000)]
    system: Annotated[str, Field(max_length=20_000)] = ""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    user: Annotated[str, Field(max_length=512)] = ""

    def request(self) -> CompletionRequest | ChatRequest:
        """As OpenAI's API has it."""
        said: dict[str, Any] = {
            "model": self.model, "max_tokens": self.max_tokens, "temperature": self.temperature, "stream": True,
        }  # fmt: skip
        if self.seed is not None:
            said["seed"] = self.seed
        if self.user:
            said["user"] = self.user
        if self.kind == "completion":
            return parse(CompletionRequest, said | {"prompt": self.prompt})
        system = [{"role": "system", "content": self.system}] if self.system else []
        return parse(ChatRequest, said | {"messages": [*system, {"role": "user", "content": self.prompt}]})


class Playground:
    """Its routes.

    Args:
        gateway: answers.
    """

    def __init__(self, gateway: TenantGateway) -> None:
        self._gateway = gateway

    @property
    def routes(self) -> list[Route]:
        """Both; a viewer may ask, too, what its key may."""
        return [Route("GET", "/api/models", "viewer", self._models), Route("POST", "/api/ask", "viewer", self._ask)]

    async def _models(self, asked: Asked) -> Mapping[str, Any]:
        cards = self._gateway.models(asked.caller)
        found = [
            {"id": card.id, "base": card.base is None and card.digest is None, "version": card.version}
            for card in cards
        ]
        return {"models": found}

    async def _ask(self, asked: Asked) -> Response:
        body = (await asked.body(Question)).request()
        parts = self._gateway.stream(asked.caller, asked.request_id, body)
        try:
            first = await while_connected(asked.request, anext(parts, None))
        except BaseException:
            await close(parts)
            raise
        stream = EventStream(_events(first, parts, asked.request_id), parts)
        stream.headers.update(answered_by(first.by if first else None))
        return stream


async def _events(first: Chunk | None, parts: AsyncIterator[Chunk], request_id: str) -> AsyncIterator[bytes]:
    chunk = first
    try:
        while chunk is not None:
            text = "".join(_text(choice) for choice in chunk.choices)
            said = {"text": text, "prompt_tokens": chunk.usage.prompt, "tokens": chunk.usage.generated}
            yield event(said | chosen(chunk.by))
            chunk = await anext(parts, None)
        yield event({"end": True})
    except Exception as error:  # the status is long sent
        yield b"data: " + bytes(failed(error, request_id).body) + b"\n\n"
    finally:
        await close(parts)


def _text(choice: Mapping[str, Any]) -> str:
    found = choice.get("text")
    if found is None:
        found = (choice.get("delta") or {}).get("content")
    return found if isinstance(found, str) else ""
