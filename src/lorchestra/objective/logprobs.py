"""Log-probabilities of answers: one forward pass, logits at supervised positions only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import LorchestraError
from lorchestra.objective.attention import NAME
from lorchestra.objective.batch import Batch, pack
from lorchestra.objective.flat import rounded

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
    row, column, flat = batch.row, batch.column, batch.flat
    with ExitStack() as hooks:
        if flat is not None:
            kwargs |= {"input_ids": flat.input_ids, "position_ids": flat.position_ids}
            kwargs |= {"attention_mask": _additive(flat.mask, model), "flat": flat}
            column = flat.place[row, column]
            hooks.enter_context(_last_mlp_at(model, _read(column, flat.input_ids.shape[1])))
            column = pad(column, (0, rounded(column.numel()) - column.numel()))
            row = torch.zeros_like(column)
        elif batch.mask is not None:
            kwargs |= {"attention_mask": _additive(batch.mask, model), "position_ids": batch.position_ids}
        hooks.enter_context(_gathered(model, row, column))
        logits = model(**kwargs).logits[0]
    logprobs = _logprobs(logits, batch.target)
    branches = batch.item.numel()
    sums = torch.zeros(branches, dtype=torch.float32, device=logprobs.device).index_add(0, batch.branch, logprobs)
    return BranchScores(sums, torch.bincount(batch.branch, minlength=branches), batch.item)


def _read(column: Tensor, length: int) -> Tensor:
    """``column [N]`` sorted, each once, with others below ``length`` up to a rounded number."""
    read = torch.unique(column)
    more = min(rounded(read.numel()), length) - read.numel()
    others = torch.ones(length, dtype=torch.bool, device=read.device).index_fill_(0, read, False).nonzero()[:more, 0]
    return torch.cat((read, others))


class _Logprobs(torch.autograd.Function):
    """log softmax(logits)[target] of the first rows in float32, a few at a time: the vocabulary is wide."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        found = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
        for rows in _slices(logits, target):
            vocabulary = torch.log_softmax(logits[rows].float(), dim=1)
            found[rows] = vocabulary.gather(1, target[rows, None])[:, 0]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, target = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        d_logits[len(target) :].zero_()
        for rows in _slices(logits, target):
            wanted = gradient[rows, None]
            part = torch.softmax(logits[rows].float(), dim=1).mul_(-wanted)
            d_logits[rows] = part.scatter_add_(1, target[rows, None], wanted)
        return d_logits, None


def _logprobs(logits: Tensor, target: Tensor) -> Tensor:
    """``[N]`` float32 from logits ``[at least N, V]`` and target ``[N]``."""
    out: Tensor = _Logprobs.apply(logits, target)  # type: ignore[no-untyped-call]
    return out


def _slices(logits: Tensor, target: Tensor) -> list[slice]:
    rows, n = max(1, CHUNK // logits.shape[1]), target.shape[0]
    return [slice(first, min(first + rows, n)) for first in range(0, n, rows)]


def _additive(mask: Tensor, model: nn.Module) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


@contextmanager
def _gathered(model: Any, row: Tensor, column: Tensor) -> Iterator[None]:
    """The output embedding sees ``[1, N, hidden]`` of ``[s, L, hidden]``."""
    head = model.get_output_embeddings()
    if head is None:
        raise LorchestraError(f"{type(model).__name__} has no output embedding; a causal language model was expected")

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][row, column][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _last_mlp_at(model: Any, read: Tensor) -> Iterator[None]:
    """The last layer's MLP sees positions ``read`` ``[n]`` of the one row alone, and adds 0 for those no one reads.

    Not where layers are computed anew in the backward pass: then the hooks are gone.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    last: Any = layers[-1] if layers else None
    mlp = getattr(last, "mlp", None)
    if mlp is None or (last.training and getattr(last, "gradient_checkpointing", False)):
        yield
        return
    shape: list[torch.Size] = []

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape[:] = [args[0].shape]
        return (args[0].index_select(1, read), *args[1:])

    def scatter(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.new_zeros(shape[0]).index_copy(1, read, output)

    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_exact: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_flat_exact: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def tree_is_exact(model: Any) -> bool:
    """Whether branches may share a prompt on ``model``: asked of the configuration, then tried once.

    Sliding windows, recurrent layers and attention kernels that ignore a given mask all make it inexact.
    """
    if model not in _exact:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        _exact[model] = kinds == {"full_attention"} and not sliding and _agree(model, {"tree": True}, {"tree": False})
    return _exact[model]


def flat_is_exact(model: Any) -> bool:
    """Whether batches may be one row on ``model``, as it attends now (:func:`quick_attention`); tried once.

    It is not on a model that does not hand on to its attention what it is given.
    """
    if model.config._attn_implementation != NAME or not tree_is_exact(model):
        return False
    if model not in _flat_exact:
        try:
            _flat_exact[model] = _agree(model, {"flat": True}, {"flat": False})
        except Exception:  # a foreign model's forward pass, in a way that it was not written for
            _flat_exact[model] = False
    return _flat_exact[model]


def _agree(model: Any, one: Mapping[str, bool], other: Mapping[str, bool]) -> bool:
    """Whether two ways to :func:`pack` give the same log-probabilities."""
    device = next(model.parameters()).device
    ids = [5 + (7 * i) % 11 for i in range(24)]
    supervised = (True,) * 4
    items = [
        Rendered(tuple(ids[:8]), (Branch(tuple(ids[8:12]), supervised), Branch(tuple(ids[12:16]), supervised)), 0),
        Rendered(tuple(ids[:3]), (Branch(tuple(ids[20:24]), supervised), Branch(tuple(ids[:4]), supervised)), 0),
    ]
    with torch.no_grad():
        a, b = (branch_logprobs(model, pack(items, 0, device, **how)).sums for how in (one, other))
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance))
