"""A gate's first weights, without the base: from how each adapter alone fares on each example.

A member's soft target on an example is exp(−loss/τ) over the sum of all, with the loss per token and τ a third of the
losses' spread between members there: near 1 for the one that is clearly best. What one answer says is noisy, and what
its domain says in the mean is not: losses may be drawn half-way to their domain's means, and further prompts of a
domain, which nobody scored, can have its means for losses. Fitting the network to the targets is a convex problem where
it is linear; which of these it is, and how strongly its weights are held small, is chosen on validation examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lorchestra.gate.network import Gate

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
SHRINKAGE = 0.5  # of an example's losses towards its domain's means, where that is tried
ROUNDS = 100  # of L-BFGS at most
SHARPNESS = 3.0  # spreads of the losses over τ


@dataclass(frozen=True, eq=False)
class Scored:
    """Examples on which base and members were scored.

    Args:
        x: ``[n, F]`` their features.
        losses: ``[n, K + 1]`` per token, of the base and of each member.
        domains: of each.
        weights: ``[n]``, by which losses per token become the mean over domains of loss / base loss.
    """

    x: Tensor
    losses: Tensor
    domains: Sequence[str]
    weights: Tensor


def soft_targets(losses: Tensor) -> Tensor:
    """``[n, M]`` targets that add up to 1 for every example, from ``[n, M]`` losses per token."""
    tau = (losses.std(dim=1, keepdim=True, unbiased=False) / SHARPNESS).clamp(min=1e-6)
    return torch.softmax(-losses / tau, dim=1)


def importance(losses: Tensor) -> Tensor:
    """``[n]`` how much an example counts, 1 on average: by what the choice among the members matters for it."""
    spread = losses.max(dim=1).values - losses.min(dim=1).values
    return (spread / spread.mean().clamp(min=1e-12)).clamp(min=1e-3)


def warm_start(
    make: Gate, learn: Scored, held: Scored, more: Tensor | None = None, more_domains: Sequence[str] = ()
) -> Gate:
    """Fit ``make`` in place, and return it.

    Args:
        make: a new gate.
        learn: training examples.
        held: validation examples.
        more: ``[N, F]`` features of further training prompts, which nobody scored.
        more_domains: of each of these; all of them are domains of ``learn``.
    """
    start = {name: value.clone() for name, value in make.state_dict().items()}
    best: tuple[float, dict[str, Tensor]] | None = None
    for x, losses in _views(learn, more, more_domains):
        for ridge in RIDGES:
            make.load_state_dict(start)
            _fit(make, x, losses, ridge)
            found = _regret(make, held)
            if best is None or found < best[0]:
                best = found, {name: value.clone() for name, value in make.state_dict().items()}
    assert best is not None
    make.load_state_dict(best[1])
    return make


def _views(learn: Scored, more: Tensor | None, more_domains: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Features and losses to fit: as scored; drawn to the domains' means; and with the prompts that nobody scored."""
    names = list(dict.fromkeys(learn.domains))
    place = torch.tensor([names.index(domain) for domain in learn.domains])
    means = torch.stack([learn.losses[place == i].mean(dim=0) for i in range(len(names))])
    drawn = torch.lerp(learn.losses, means[place], SHRINKAGE)
    views = [(learn.x, learn.losses), (learn.x, drawn)]
    if more is not None and len(more):
        theirs = means[torch.tensor([names.index(domain) for domain in more_domains])]
        views.append((torch.cat([learn.x, more]), torch.cat([drawn, theirs])))
    return views


@torch.no_grad()
def _regret(gate: Gate, held: Scored) -> float:
    """What is chosen by: of a softmax the loss if a prompt went to one member, drawn by its coefficients, over the
    base's; of the others the misfit.
    """
    if gate.spec.activation != "softmax":
        return float(_misfit(gate, held.x, held.losses))
    shares = torch.softmax(gate(held.x) / gate.spec.temperature, dim=-1).mean(dim=1).double()
    told = _told(gate, held.losses)
    return float(((shares * told).sum(dim=1) * held.weights).sum())


def _fit(gate: Gate, x: Tensor, losses: Tensor, ridge: float) -> None:
    weights = [parameter for name, parameter in gate.named_parameters() if name.endswith("weight")]
    optimiser = torch.optim.LBFGS(
        gate.parameters(), max_iter=ROUNDS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = _misfit(gate, x, losses) + ridge * sum((w**2).sum() for w in weights)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]


def _misfit(gate: Gate, x: Tensor, losses: Tensor) -> Tensor:
    """How far the network is from the targets, in the measure that belongs to its activation."""
    spec = gate.spec
    found = gate(x) / spec.temperature  # [n, G, K or K + 1]
    told = _told(gate, losses)
    targets = soft_targets(told).float()[:, None, : found.shape[-1]].expand_as(found)
    if spec.activation == "softmax":
        each = cross_entropy(found.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(found.shape[:2])
    elif spec.activation == "sigmoid":
        each = binary_cross_entropy_with_logits(found, targets, reduction="none").mean(dim=-1)
    else:
        each = mse_loss(found, targets, reduction="none").mean(dim=-1)
    return (each.mean(dim=1) * importance(told).float()).mean()


def _told(gate: Gate, losses: Tensor) -> Tensor:
    """Losses in the network's order: the base last; without ``none`` a softmax shares among the members alone."""
    told = torch.cat([losses[:, 1:], losses[:, :1]], dim=1)
    return told[:, :-1] if gate.spec.activation == "softmax" and not gate.spec.none else told


def set_static(gate: Gate, weights: Tensor) -> Gate:
    """Make ``gate`` give the same coefficients to every prompt, as near ``weights`` ``[K]`` as its activation can.

    A softmax takes their shares (with ``none`` the base has what they leave of 1); a sigmoid bends them into 0 … 1.
    """
    spec = gate.spec
    values = weights.double()
    if spec.activation == "softmax":
        values = values.clamp(min=0.01)
        if spec.none:
            rest = (1 - values.sum()).clamp(min=0.01)
            values = torch.cat([values, rest[None]])
        bias = (values / values.sum()).log() * spec.temperature
    elif spec.activation == "sigmoid":
        bias = torch.logit(values.clamp(0.02, 0.98)) * spec.temperature
    else:
        bias = values
    with torch.no_grad():
        nn.init.zeros_(gate.last.weight)
        gate.last.bias.copy_(bias.float().repeat(max(1, len(spec.groups))))
    return gate
