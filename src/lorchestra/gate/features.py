"""What a gate sees of a prompt: the mean of its token embeddings, or of hidden states early in the base.

The states are the base's own: no adapter acts while they are made, so they do not depend on what is mounted or chosen,
and the first l layers are all that is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorchestra.bank import adapter_free
from lorchestra.errors import UserError

POSITIONS = 4096  # of one forward pass, padding included


@dataclass(frozen=True)
class FeatureSpec:
    """Which states are read, and how they become one vector.

    Args:
        layers: l. 0 reads the input embeddings; else the states after the first l decoder layers, which are
            transformers' ``hidden_states[l]``.
        last: append the last token's state to the mean over the prompt's tokens.

    Raises:
        UserError: a negative number of layers.
    """

    layers: int = 0
    last: bool = False

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise UserError(f"features come from the first 0, 1, 2, … layers; got {self.layers}")


def feature_size(model: Any, spec: FeatureSpec) -> int:
    """n: the width of the hidden states, twice with the last token's."""
    width = int(model.config.get_text_config().hidden_size)
    return 2 * width if spec.last else width


@torch.no_grad()
def features(model: Any, prompts: Sequence[Sequence[int]], spec: FeatureSpec) -> Tensor:
    """``[b, n]`` float32 on the CPU: one row a prompt, whatever stands beside it.

    Args:
        model: a transformers causal language model; adapters that a bank has mounted on it do not act here.
        prompts: token ids, as inference sees them.
        spec: what to read.

    Raises:
        UserError: an empty prompt, a token id that the model does not have, or more layers than it has.
    """
    if spec.layers > (most := len(_layers(model)) if spec.layers else 0):
        raise UserError(f"features of {spec.layers} layers were asked for; {type(model).__name__} has {most}")
    vocabulary = model.get_input_embeddings().num_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"prompt {i + 1} of {len(prompts)} is empty: it has no features; answer it with the base, or give text"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UserError(
                f"prompt {i + 1} of {len(prompts)} has a token id outside 0 … {vocabulary - 1}; it was made with "
                "another tokenizer"
            )
    out = torch.empty(len(prompts), feature_size(model, spec))
    device = next(model.parameters()).device
    with adapter_free(model):
        for rows in _batches(prompts):
            states = _states(model, [prompts[i] for i in rows], spec.layers, device)
            for i, state in zip(rows, states, strict=True):
                read = state[: len(prompts[i])].float()
                mean = read.mean(dim=0)
                out[i] = torch.cat([mean, read[-1]]) if spec.last else mean
    return out


def _states(model: Any, prompts: Sequence[Sequence[int]], layers: int, device: torch.device) -> Sequence[Tensor]:
    """``[L, width]`` of each prompt, or longer: padding on the right is seen by no token before it."""
    if layers == 0:
        embedding = model.get_input_embeddings()
        return [embedding(torch.tensor(list(prompt), device=device)) for prompt in prompts]
    ids = torch.zeros(len(prompts), max(len(prompt) for prompt in prompts), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt))
    return list(_hidden_states(model, ids.to(device), layers))


class _Reached(Exception):  # noqa: N818  # no error: how the forward pass is left
    """The states that were wanted are there; the layers after them need not be computed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _hidden_states(model: Any, ids: Tensor, layers: int) -> Tensor:
    """``[b, L, width]`` after ``layers`` decoder layers; after all of them as the head sees them (normalised)."""
    stack = _layers(model)
    decoder = model.get_decoder()
    if layers == len(stack):
        last: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return last

    def leave(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = stack[layers].register_forward_pre_hook(leave, with_kwargs=True)
    try:
        decoder(input_ids=ids, use_cache=False)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise UserError(f"{type(model).__name__} does not pass through its layers one by one; use features of 0 layers")


def _layers(model: Any) -> Any:
    """The decoder's layers, in order."""
    decoder = model.get_decoder()
    for name in ("layers", "h", "blocks"):
        if (found := getattr(decoder, name, None)) is not None:
            return found
    raise UserError(f"{type(model).__name__} has no list of decoder layers; use features of 0 layers")


def _batches(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices in batches of like length, each of at most ``POSITIONS`` positions, or of one prompt."""
    out: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
        if out and (len(out[-1]) + 1) * len(prompts[i]) <= POSITIONS:
            out[-1].append(i)
        else:
            out.append([i])
    return out
