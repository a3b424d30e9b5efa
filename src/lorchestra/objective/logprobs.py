"""Log-probabilities of answers: one forward pass, logits at supervised positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import LorchestraError
from lorchestra.objective.batch import Batch, pack

CHUNK = 1 << 22  # float32 logits at a time: 16 MiB


@dataclass(frozen=True)
class BranchScores:
    """Scores of the branches of a batch.

    Args:
        sums: ``[b]`` float32, Σ log p(token | before) over a branch's supervised tokens, in nats; differentiable.
        tokens: ``[b]`` int64, how many tokens that is.
        item: ``[b]`` int64, the item each branch belongs to.
    """

    sums: Tensor
    tokens: Tensor
    item: Tensor


def branch_logprobs(model: nn.Module, batch: Batch) -> BranchScores:
    """Σ log p over the supervised tokens of every branch.

    The hidden states of the positions that predict a supervised token are gathered in front of the output
    embedding, so the other positions never meet the vocabulary, and whatever a model does to its logits
    afterwards (soft-capping, scaling) still happens.

    Args:
        model: a transformers causal language model on the batch's device.
        batch: see :class:`Batch`.
    """
    kwargs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.mask is not None:
        kwargs |= {"attention_mask": _additive(batch.mask, model), "position_ids": batch.position_ids}
    with _gathered(model, batch):
        logits = model(**kwargs).logits[0]
    logprobs = _logprobs(logits, batch.target)
    branches = batch.item.numel()
    sums = torch.zeros(branches, dtype=torch.float32, device=logprobs.device).index_add(0, batch.branch, logprobs)
    return BranchScores(sums, torch.bincount(batch.branch, minlength=branches), batch.item)


class _Logprobs(torch.autograd.Function):
    """log softmax(logits)[target] of every row in float32, a few rows at a time: the vocabulary is wide."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        found = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
        for rows in _slices(logits):
            vocabulary = torch.log_softmax(logits[rows].float(), dim=1)
            found[rows] = vocabulary.gather(1, target[rows, None])[:, 0]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        for rows in _slices(logits):
            wanted = gradient[rows, None]
            part = torch.softmax(logits[rows].float(), dim=1).mul_(-wanted)
            d_logits[rows] = part.scatter_add_(1, target[rows, None], wanted)
        return d_logits, None


def _logprobs(logits: Tensor, target: Tensor) -> Tensor:
    """``[N]`` float32 from logits ``[N, V]`` and target ``[N]``."""
    out: Tensor = _Logprobs.apply(logits, target)  # type: ignore[no-untyped-call]
    return out


def _slices(logits: Tensor) -> list[slice]:
    rows = max(1, CHUNK // logits.shape[1])
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]


def _additive(mask: Tensor, model: nn.Module) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@contextmanager
def _gathered(model: Any, batch: Batch) -> Iterator[None]:
    """The output embedding sees ``[1, N, hidden]`` instead of ``[s, L, hidden]``."""
    head = model.get_output_embeddings()
    if head is None:
        raise LorchestraError(f"{type(model).__name__} has no output embedding; a causal language model was expected")

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][batch.row, batch.column][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


_exact: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def tree_is_exact(model: Any) -> bool:
    """Whether branches may share a prompt on ``model``: asked of the configuration, then tried once.

    Sliding windows, recurrent layers and attention kernels that ignore a given mask all make it inexact.
    """
    if model not in _exact:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        _exact[model] = kinds == {"full_attention"} and not sliding and _try_tree(model)
    return _exact[model]


def _try_tree(model: Any) -> bool:
    device = next(model.parameters()).device
    ids = [5 + (7 * i) % 11 for i in range(24)]
    supervised = (True,) * 4
    item = Rendered(tuple(ids[:8]), (Branch(tuple(ids[8:12]), supervised), Branch(tuple(ids[12:16]), supervised)), 0)
    other = Rendered(tuple(ids[16:20]), (Branch(tuple(ids[20:24]), supervised), Branch(tuple(ids[:4]), supervised)), 0)
    with torch.no_grad():
        shared = branch_logprobs(model, pack([item, other], 0, device, tree=True)).sums
        alone = branch_logprobs(model, pack([item, other], 0, device, tree=False)).sums
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
    return bool(torch.allclose(shared, alone, rtol=tolerance, atol=tolerance))
