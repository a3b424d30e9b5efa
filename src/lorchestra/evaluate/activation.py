"""What adapters would do to a module's output on given text: ‖ΔW x‖ with x what the base hands the module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank.mount import linear_shape
from lorchestra.data.render import Rendered
from lorchestra.errors import AdapterError
from lorchestra.evaluate.score import TOKENS_PER_BATCH
from lorchestra.objective.batch import Batch, batches, pack
from lorchestra.objective.logprobs import branch_logprobs


@torch.no_grad()
def activation_norms(
    model: Any,
    adapters: Mapping[str, Adapter],
    items: Sequence[Rendered],
    pad_id: int,
    on_batch: Callable[[int], None] = lambda items: None,
) -> tuple[dict[str, dict[str, float]], int]:
    """Module path → adapter → √ of the mean of ‖ΔW x‖² over supervised tokens; and how many tokens those are.

    x ``[n]`` is what the module receives in the base at the position that predicts the token. ‖ΔW x‖² = ‖B(A x)‖² is
    taken in the rank's space: (A x)ᵀ(BᵀB)(A x), in float32, summed in float64.

    Args:
        model: the base, as it stands.
        adapters: name → adapter.
        items: rendered examples.
        pad_id: token id for padding.
        on_batch: hears how many items are done.

    Raises:
        AdapterError: the model lacks a module of an adapter, or has it in another shape.
    """
    device = next(model.parameters()).device
    updates: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, adapter in adapters.items():
        for path, update in adapter.modules.items():
            _check(model, name, path, update.shape, path in adapter.embeddings)
            gram = update.B.double().T @ update.B.double()
            pieces = update.A.to(device), gram.float().to(device)
            updates.setdefault(path, {})[name] = pieces
    sums = {path: dict.fromkeys(of_module, 0.0) for path, of_module in updates.items()}
    reading: list[Batch] = []

    def watch(path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x.shape[:2] != reading[0].input_ids.shape:
                raise AdapterError(
                    f"{path!r} does not see every token (it is handed {tuple(x.shape)}), so what it does per token is "
                    "not measured; leave --data out"
                )
            x = x[reading[0].row, reading[0].column]
            for name, (A, gram) in updates[path].items():
                z = x.float() @ A.T if x.is_floating_point() else A.T[x]  # an embedding looks its column up
                sums[path][name] += float((z @ gram * z).sum(dim=1).cpu().sum(dtype=torch.float64))  # MPS has none

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in updates]
    tokens = 0
    try:
        for indices in batches(items, TOKENS_PER_BATCH, tree=False):
            batch = pack([items[i] for i in indices], pad_id, device, tree=False)
            reading[:] = [batch]
            branch_logprobs(model, batch)
            tokens += batch.supervised
            on_batch(len(indices))
    finally:
        for handle in handles:
            handle.remove()
    means = {
        path: {name: math.sqrt(max(total, 0.0) / max(tokens, 1)) for name, total in of_module.items()}
        for path, of_module in sums.items()
    }
    return means, tokens


def _check(model: Any, name: str, path: str, shape: tuple[int, int], embedding: bool) -> None:
    try:
        module = model.get_submodule(path)
        found = tuple(module.weight.shape[::-1]) if embedding else linear_shape(module)
    except AttributeError:
        raise AdapterError(
            f"adapter {name!r} changes {path!r}, which {type(model).__name__} does not have; it belongs to another base"
        ) from None
    if found != shape:
        raise AdapterError(
            f"adapter {name!r} has an update of shape {shape} for {path!r}, whose shape in the base is {found}; it "
            "belongs to another base"
        )
