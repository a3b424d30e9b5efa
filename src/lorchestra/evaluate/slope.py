"""How the loss on held-out items changes with the coefficients: one backward pass gives all K derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lorchestra.bank import Bank
from lorchestra.evaluate.score import Domain, Scores
from lorchestra.objective.batch import batches, pack
from lorchestra.objective.logprobs import BranchScores, branch_logprobs, tree_is_exact

POSITIONS = 1024  # of a forward and backward pass, padding included: its activations are all that is kept


@dataclass(frozen=True)
class Slope:
    """Each domain's loss over the base's, and its derivative by each coefficient.

    Args:
        ratios: domain → loss / base loss.
        jacobian: domain → ``[K]`` ∂ratio/∂λ, in the order of the weights that were given.
    """

    ratios: dict[str, float]
    jacobian: dict[str, list[float]]


def slope(
    bank: Bank,
    domains: Mapping[str, Domain],
    weights: Mapping[str, float],
    reference: Mapping[str, Scores],
    betas: Mapping[str, float],
    pad_id: int,
    *,
    positions: int = POSITIONS,
    on_batch: Callable[[int], None] = lambda items: None,
) -> Slope:
    """Loss ratios as :meth:`Scores.loss` makes them, and their derivatives by every λ (also by one at zero).

    Nothing but the K coefficients requires a gradient: the backward pass goes through the activations alone, batch by
    batch, and makes no gradient of any weight.

    Args:
        bank: with every name of ``weights`` mounted, on a frozen model.
        domains: held-out items.
        weights: name → λ.
        reference: domain → the base's scores.
        betas: β of the preference domains.
        pad_id: token id for padding.
        positions: of one pass.
        on_batch: hears how many items are done.
    """
    model: Any = bank.model
    device = next(model.parameters()).device
    tree = tree_is_exact(model)
    names = list(weights)
    point = torch.tensor([float(weights[name]) for name in names], dtype=torch.float32, requires_grad=True)
    ratios, jacobian = {}, {}
    for name, domain in domains.items():
        base, beta = reference[name], betas.get(name, 0.1)
        total, gradient = 0.0, torch.zeros(len(names), dtype=torch.float64)
        for indices in batches(domain.items, positions, tree):
            batch = pack([domain.items[i] for i in indices], pad_id, device, tree)
            with torch.enable_grad(), bank.using(dict(zip(names, point.unbind(), strict=True))):
                loss = _loss(domain, branch_logprobs(model, batch), base, indices, beta)
            gradient += torch.autograd.grad(loss, point)[0].double()
            total += float(loss.detach())
            on_batch(len(indices))
        below = float(base.loss(base, beta)[1].sum())
        ratios[name], jacobian[name] = total / below, (gradient / below).tolist()
    return Slope(ratios, jacobian)


def _loss(domain: Domain, found: BranchScores, base: Scores, indices: list[int], beta: float) -> Tensor:
    """The numerators of :meth:`Scores.loss`, summed over the items ``indices``: a scalar to differentiate."""
    if domain.kind == "sft":
        firsts = torch.searchsorted(found.item, torch.arange(len(indices), device=found.item.device))
        gold = firsts + torch.tensor([domain.gold[i] for i in indices], device=found.item.device)
        return -found.sums[gold].sum()
    theirs = [base.sums[i][0] - base.sums[i][1] for i in indices]
    margins = found.sums[0::2] - found.sums[1::2]
    return softplus(-beta * (margins - torch.tensor(theirs, device=margins.device))).sum()
