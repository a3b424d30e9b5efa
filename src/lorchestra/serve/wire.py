"""OpenAI's requests, checked; what they do not say is left to the adapter's defaults.

A field that is here is understood, or refused by the engine that cannot do it; no field is silently ignored but those
that change no answer (``user``, ``metadata``, ``store`` …).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import from_json

from lorchestra.errors import AdapterError
from lorchestra.serve.engine import RequestError, UnprocessableError
from lorchestra.serve.mistakes import mistake

MOST_PROMPTS, MOST_CHOICES, MOST_STOPS, MOST_BIASES, MOST_MESSAGES = 2048, 128, 4, 1024, 4096
_INT64 = 2**63

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
# Of an adapter's sampling defaults, those that may be set.
SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "presence_penalty",
    "frequency_penalty", "min_tokens",
)  # fmt: skip


class StreamOptions(BaseModel):
    """What a stream tells besides its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(None, description="Usage in a last chunk, without choices.")
    continuous_usage_stats: bool | None = Field(None, description="Usage in every chunk (vLLM's).")
    include_obfuscation: bool | None = Field(None, description="Accepted; chunks are not padded.")


class _Request(BaseModel):
    """What both requests have. ``None`` is unset: the adapter's default, or else OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=2048)] = Field(
        description="The base, an adapter, an alias, a mixture (general=0.3+clinic=0.5), a gate, or auto."
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="At most so many new tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Choices of each prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="Choice i has seed + i.")
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = (
        Field(None, description="Token id, as a text of digits, to what is added to its logit.")
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    user: str | None = Field(None, description="Of a canary, which version answers; else it changes nothing.")

    top_k: int | None = Field(None, ge=-1, lt=2**31, description="The likeliest k; 0 or -1 for all (vLLM's).")
    min_p: float | None = Field(None, ge=0, le=1, description="Of the likeliest token's probability (vLLM's).")
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="So many before it may end (vLLM's).")
    ignore_eos: bool | None = Field(None, description="Go on after the end of the answer (vLLM's).")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = Field(None, description="vLLM's.")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="vLLM's.")
    skip_special_tokens: bool | None = Field(None, description="vLLM's.")
    include_stop_str_in_output: bool | None = Field(None, description="vLLM's.")
    spaces_between_special_tokens: bool | None = Field(None, description="vLLM's.")
    structured_outputs: dict[str, Any] | None = Field(None, description="vLLM's.")
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31, description="vLLM's.")

    _sent: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def sent(self) -> Mapping[str, Any]:
        """The JSON object as it came, for an engine that passes it on."""
        return self._sent

    @property
    def choices(self) -> int:
        """``n``, 1 unless it is set."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as a sequence."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """New tokens that were asked for."""
        return self.max_tokens

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only where 'stream' is true; leave it out, or set 'stream': true")
        return self


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description="A text, token ids, or a list of either.")
    logprobs: int | None = Field(None, ge=0, le=5, description="So many of the likeliest tokens beside each one.")
    echo: bool | None = Field(None, description="The prompt before the answer; with 'logprobs', its log-probabilities.")
    suffix: str | None = Field(None, description="Refused: nothing is inserted before a text.")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Only as many as 'n'.")


class Part(BaseModel):
    """A part of a turn's content; ``text`` is understood everywhere, other types by engines that can."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.type == "text" and self.text is None:
            raise ValueError("a part of type 'text' has a field 'text', a text")
        return self


class ChatMessage(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    # What the official client's own answers have when they are sent back.
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31, description="OpenAI's newer name of 'max_tokens'.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With 'logprobs': so many of the likeliest.")

    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    audio: dict[str, Any] | None = None
    modalities: list[str] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    verbosity: str | None = None
    moderation: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = Field(None, description="Accepted; changes nothing.")
    store: bool | None = Field(None, description="Accepted; nothing is stored.")
    service_tier: str | None = Field(None, description="Accepted; changes nothing.")
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_retention: str | None = Field(None, description="Accepted; changes nothing.")

    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template (vLLM's).")
    add_generation_prompt: bool | None = Field(None, description="vLLM's.")
    continue_final_message: bool | None = Field(None, description="vLLM's.")
    add_special_tokens: bool | None = Field(None, description="vLLM's.")
    include_reasoning: bool | None = Field(None, description="vLLM's.")
    documents: list[dict[str, Any]] | None = Field(None, description="vLLM's.")
    echo: bool | None = Field(None, description="vLLM's.")

    @property
    def most_tokens(self) -> int | None:
        """New tokens that were asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _alternatives(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only where 'logprobs' is true; set 'logprobs': true")
        if None not in (a := (self.max_tokens, self.max_completion_tokens)) and a[0] != a[1]:
            raise ValueError(f"max_completion_tokens: {a[1]}, while max_tokens says {a[0]}; leave one out")
        return self


class LoadRequest(BaseModel):
    """``POST /v1/load_lora_adapter`` (vLLM's)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: Literal[False] | None = Field(None, description="A name that serves never changes its weights.")


class UnloadRequest(BaseModel):
    """``POST /v1/unload_lora_adapter`` (vLLM's)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_int_id: int | None = Field(None, description="Accepted; changes nothing.")


class FeedbackRequest(BaseModel):
    """``POST /v1/feedback``."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    request_id: Annotated[str, Field(min_length=1, max_length=144)] = Field(
        description="Of the answer: its x-request-id, or the 'id' in its body."
    )
    score: float | None = Field(None, ge=0, le=1, description="0 is bad, 1 is good; either this or 'thumb'.")
    thumb: Literal["up", "down"] | None = Field(None, description="As a score of 1 or 0.")
    comment: Annotated[str, Field(max_length=4000)] = ""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.score is None) == (self.thumb is None):
            raise ValueError("score: either 'score', from 0 to 1, or 'thumb', up or down; and not both")
        return self


R = TypeVar("R", bound=BaseModel)
Asked = TypeVar("Asked", bound=_Request)


def read(kind: type[R], content: bytes) -> R:
    """A request from its JSON.

    Raises:
        RequestError: it is no JSON, or no such request; names the field, what was expected, and the nearest name.
    """
    try:
        data = from_json(content, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f'the body is {_kind(data)}; expected a JSON object, as {{"model": …}}')
    return parse(kind, data)


def parse(kind: type[R], data: Mapping[str, Any]) -> R:
    """A request from a JSON object. Raises as :func:`read`."""
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        refusal = UnprocessableError if kind is FeedbackRequest else RequestError
        raise refusal(*mistake(error, kind)) from error
    if isinstance(request, _Request):
        request._sent = data
    return request


def with_defaults(request: Asked, defaults: Mapping[str, Any], whose: str) -> Asked:
    """``request``, and what it leaves open by an adapter's sampling defaults.

    Args:
        request: its own values win.
        defaults: by the names of :data:`SAMPLING`.
        whose: the adapter's name, for the message.

    Raises:
        AdapterError: a default that is none, or out of bounds.
    """
    if not defaults:
        return request
    check_defaults(defaults, whose)
    own = {name: value for name, value in request if value is not None}
    if isinstance(request, ChatRequest) and request.most_tokens is not None:
        own["max_tokens"] = request.most_tokens
    missing = {name: value for name, value in defaults.items() if name not in own}
    filled = request.model_copy(update=missing)
    filled._sent = request.sent
    return filled


def check_defaults(defaults: Mapping[str, Any], whose: str) -> None:
    """Raises AdapterError where sampling defaults are not what a request could say."""
    for name in defaults:
        if name not in SAMPLING:
            raise AdapterError(f"adapter {whose!r} has a sampling default {name!r}; there are {', '.join(SAMPLING)}")
    try:
        CompletionRequest.model_validate({"model": "any", "prompt": "", **defaults})
    except ValidationError as error:
        raise AdapterError(
            f"the sampling defaults of adapter {whose!r}: {mistake(error, CompletionRequest)[0]}"
        ) from error


def _kind(data: Any) -> str:
    if data is None:
        return "null"
    return {list: "a list", str: "a text", bool: "true or false"}.get(type(data), "a number")
