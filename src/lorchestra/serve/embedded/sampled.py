"""What a request asks of the sampler, within what this engine can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorchestra.serve.embedded.generation import Sampling
from lorchestra.serve.engine import RequestError, TooLongError
from lorchestra.serve.wire import ChatRequest, CompletionRequest

COMPLETION_TOKENS = 16  # of a completion that does not say (OpenAI's)

# Fields that this engine does nothing for, with the values that ask for nothing.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",), "repetition_penalty": (1.0,), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "structured_outputs": ({},), "truncate_prompt_tokens": (),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "reasoning_effort": (), "audio": (), "modalities": (["text"], []),
    "prediction": (), "web_search_options": (), "verbosity": ("medium",), "moderation": (),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "add_special_tokens": (False,),
    "include_reasoning": (), "documents": ([],),
}  # fmt: skip


def refuse_unable(request: CompletionRequest | ChatRequest) -> None:
    """Raises RequestError where ``request`` asks for what this engine does not do."""
    for name, harmless in _NOTHING.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            raise RequestError(f"{name}: this engine does not do that; leave it out, or use --engine vllm", name)
    if isinstance(request, ChatRequest):
        if request.echo:
            raise RequestError("echo: only for completions; leave it out", "echo")
    elif request.best_of not in (None, request.choices):
        raise RequestError(
            f"best_of: got {request.best_of}, expected as many as n ({request.choices}); ask for n choices and take "
            "the best of them by their logprobs",
            "best_of",
        )


def sampling(
    request: CompletionRequest | ChatRequest,
    asked: int | None,
    length: int,
    max_length: int,
    ends: frozenset[int],
    size: int,
) -> Sampling:
    """How ``request`` chooses tokens; choice i then has the seed + i.

    Args:
        request: with the adapter's defaults in it.
        asked: new tokens that the client itself asked for: more than fit are refused, a default is cut down.
        length: of the prompt.
        max_length: of prompt and answer.
        ends: tokens that end an answer.
        size: token ids are below it.

    Raises:
        TooLongError: it does not fit.
        RequestError: tokens that there are not, or bounds that contradict each other.
    """
    room = max_length - length
    if asked is None:
        default = request.most_tokens
        if default is None:
            default = max_length if isinstance(request, ChatRequest) else COMPLETION_TOKENS
        most = min(default, max(room, 1))
    else:
        most = asked
    if most > room:
        place, verb = ("messages", "take") if isinstance(request, ChatRequest) else ("prompt", "takes")
        raise TooLongError(
            f"this model's context has {max_length} tokens; the {place} {verb} {length} and max_tokens {most} more: "
            "shorten the one or lower the other",
            place if length >= max_length else "max_tokens",
        )
    if request.min_tokens is not None and request.min_tokens > most:
        raise RequestError(f"min_tokens: got {request.min_tokens}, expected at most max_tokens ({most})", "min_tokens")
    stops = frozenset() if request.ignore_eos else ends
    greedy = request.top_p == 0  # a set of tokens that is as small as can be: the likeliest alone
    logprobs = _logprobs(request)
    return Sampling(
        max_tokens=most,
        temperature=0.0 if greedy else _or(request.temperature, 1.0),
        top_p=1.0 if greedy else _or(request.top_p, 1.0),
        top_k=max(request.top_k or 0, 0),
        min_p=_or(request.min_p, 0.0),
        seed=request.seed,
        logit_bias=_bias(request.logit_bias or {}, size),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logprobs=logprobs,
        prompt_logprobs=logprobs if isinstance(request, CompletionRequest) and request.echo else None,
        stop_ids=stops | frozenset(request.stop_token_ids or ()),
        min_tokens=request.min_tokens or 0,
    )


def _logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def _bias(given: Mapping[str, float], size: int) -> dict[int, float]:
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit()) or len(name) > 10 or int(name) >= size:
            raise RequestError(
                f"logit_bias: {name[:40]!r} is no token; expected the id of one, 0 to {size - 1}, in quotes",
                "logit_bias",
            )
        bias[int(name)] = float(value)
    return bias


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
