"""Answers in words: generation on a model as it stands, with whatever a bank has switched on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorchestra.base.load import positions
from lorchestra.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. ``temperature`` 0 is greedy; ``max_new_tokens`` bounds an answer.

    ``repetition_penalty`` (1: none) divides the odds of tokens that the answer has already (Keskar et al. 2019,
    arXiv 1909.05858).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = Sampling(),
    *,
    stop: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Continue each prompt up to its end of turn.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        prompts: token ids that end where the answer begins; padded on the left into one batch.
        sampling: see :class:`Sampling`.
        stop: id of the token that ends an answer (``Renderer.end_of_turn``), beside the model's own.
        on_text: hears of pieces of text as they come (one prompt only).

    Returns:
        The answers' text, without special tokens; none goes on beyond the model's last position.

    Raises:
        UserError: a prompt takes all of the model's positions.
    """
    device = next(model.parameters()).device
    width = max(len(ids) for ids in prompts)
    room = (positions(model.config) or width + sampling.max_new_tokens) - width
    if room < 1:
        raise UserError(
            f"the prompt has {width:,} tokens, and the model has {width + room:,} positions for it and the answer "
            "together; shorten it, or begin a new conversation"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    kwargs: dict[str, Any] = {"do_sample": sampling.temperature > 0, "pad_token_id": pad}
    if sampling.temperature > 0:
        kwargs |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if on_text is not None:
        kwargs["streamer"] = _streamer(tokenizer, on_text)
    out = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=min(sampling.max_new_tokens, room),
        repetition_penalty=1.0,  # not the model's own taste, and ours on the answer alone:
        logits_processor=_penalty(sampling.repetition_penalty, width),
        eos_token_id=stop_ids(model, tokenizer, stop),
        **kwargs,
    )
    return [_whole(tokenizer.decode(row[width:], skip_special_tokens=True)).strip() for row in out]


def _whole(text: str) -> str:
    """Without the half of a character that a tokenizer of bytes leaves where an answer is cut off: � for each byte."""
    return text.rstrip("\ufffd")


def _penalty(penalty: float, width: int) -> Any:
    """The repetition penalty on the answer's own tokens: in the prompt's, the end of a turn would be penalised too."""
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    if penalty == 1.0:
        return LogitsProcessorList()
    return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=width)])


def stop_ids(model: Any, tokenizer: Any, stop: int | None = None) -> list[int]:
    """Token ids that end an answer: ``stop``, the tokenizer's and the generation config's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = [stop, tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return sorted({i for i in ids if i is not None})


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(_whole(text) if stream_end else text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
