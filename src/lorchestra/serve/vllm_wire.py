"""What goes to vLLM and comes back: bodies, parts of a stream, refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from lorchestra.errors import LorchestraError
from lorchestra.serve.engine import Call, Chunk, OverloadedError, RequestError, StoppingError, Usage
from lorchestra.serve.wire import ChatRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def path_of(call: Call) -> str:
    """The endpoint that answers ``call``."""
    return CHAT if isinstance(call.body, ChatRequest) else COMPLETIONS


def body_of(call: Call, model: str, salt: str, stream: bool) -> dict[str, Any]:
    """The request as it came, with what the adapter brings where the request does not say.

    Args:
        call: of which ``body.sent`` is passed on whole: tools, formats and template variables are vLLM's to understand.
        model: what vLLM calls who answers.
        salt: keeps the tenant's prefix cache apart from all others', in content and in timing.
        stream: in parts, with usage in each.
    """
    single = call.target.single
    sent = {key: value for key, value in call.body.sent.items() if value is not None}
    defaults = dict(single.defaults) if single else {}
    if "max_completion_tokens" in sent:
        defaults.pop("max_tokens", None)
    body = {**defaults, **sent, "model": model, "cache_salt": salt}
    body.pop("stream_options", None)
    body["stream"] = stream
    if stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if isinstance(call.body, ChatRequest) and single is not None:
        if single.chat_template is not None:
            body["chat_template"] = single.chat_template
        turns = body["messages"]
        if single.system_prompt is not None and not any(turn.get("role") in ("system", "developer") for turn in turns):
            body["messages"] = [{"role": "system", "content": single.system_prompt}, *turns]
    return body


def usage_of(payload: Mapping[str, Any]) -> Usage:
    """Tokens so far; zeros where vLLM does not say."""
    found = payload.get("usage") or {}
    return Usage(int(found.get("prompt_tokens") or 0), int(found.get("completion_tokens") or 0))


async def chunks_of(lines: AsyncIterator[str]) -> AsyncIterator[Chunk]:
    """Parts of a streamed answer.

    Raises:
        StoppingError: it ends before its end.
        RequestError, LorchestraError: vLLM says so in the middle of it.
    """
    usage = Usage(0, 0)
    async for line in lines:
        if not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip()
        if text == "[DONE]":
            return
        payload = json.loads(text)
        if "error" in payload:
            raise refusal(int(payload["error"].get("code") or 500), payload)
        usage = usage_of(payload) if payload.get("usage") else usage
        yield Chunk(payload["choices"], usage)
    raise StoppingError("vLLM stopped in the middle of the answer; send the request again")


def refusal(status: int, payload: Any) -> LorchestraError:
    """vLLM's answer with an error status, as what the HTTP side is told."""
    found = payload.get("error", payload) if isinstance(payload, dict) else {}
    found = found if isinstance(found, dict) else {"message": found}
    message = str(found.get("message") or payload)
    if status == 429:
        return OverloadedError(f"vLLM is full: {message}", 1.0)
    if status == 503 or (status == 500 and "EngineCore" in message):
        return StoppingError(f"vLLM is not ready: {message}")
    if 400 <= status < 500 and status not in (401, 403):
        param = found.get("param")
        return RequestError(message, param if isinstance(param, str) else None)
    return LorchestraError(f"vLLM answered with status {status}: {message}")
