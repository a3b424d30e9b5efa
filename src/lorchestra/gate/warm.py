"""A gate's first weights, without the base: from how each adapter alone fares on each example.

A member's soft target on an example is exp(−loss/τ) over the sum of all, with the loss per token and τ a third of its
usual spread between members: near 1 for the one that is clearly best, alike where they are alike. Fitting the network
to the targets is a convex problem where it is linear; how strongly its weights are held small is chosen on validation
examples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lorchestra.gate.network import Gate

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
ROUNDS = 100  # of L-BFGS at most
SHARPNESS = 3.0  # spreads of the losses over τ


def soft_targets(losses: Tensor) -> Tensor:
    """``[n, M]`` targets that add up to 1 for every example, from ``[n, M]`` losses per token."""
    tau = (losses.std(dim=1, unbiased=False).mean() / SHARPNESS).clamp(min=1e-6)
    return torch.softmax(-losses / tau, dim=1)


def importance(losses: Tensor) -> Tensor:
    """``[n]`` how much an example counts, 1 on average: by what the choice among the members matters for it."""
    spread = losses.max(dim=1).values - losses.min(dim=1).values
    return (spread / spread.mean().clamp(min=1e-12)).clamp(min=1e-3)


def warm_start(make: Gate, x: Tensor, losses: Tensor, held_x: Tensor, held_losses: Tensor) -> Gate:
    """Fit ``make`` in place, and return it.

    Args:
        make: a new gate.
        x: ``[n, features]`` of training examples.
        losses: ``[n, K + 1]`` per token, of the base and of each member.
        held_x: as ``x``, of validation examples.
        held_losses: as ``losses``.
    """
    start = {name: value.clone() for name, value in make.state_dict().items()}
    best: tuple[float, dict[str, Tensor]] | None = None
    for ridge in RIDGES:
        make.load_state_dict(start)
        _fit(make, x, losses, ridge)
        with torch.no_grad():
            found = float(_misfit(make, held_x, held_losses))
        if best is None or found < best[0]:
            best = found, {name: value.clone() for name, value in make.state_dict().items()}
    assert best is not None
    make.load_state_dict(best[1])
    return make


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
    # The network has the base last; without `none` a softmax shares among the members alone.
    told = torch.cat([losses[:, 1:], losses[:, :1]], dim=1)
    if spec.activation == "softmax" and not spec.none:
        told = told[:, :-1]
    targets = soft_targets(told).float()[:, None, : found.shape[-1]].expand_as(found)
    if spec.activation == "softmax":
        each = cross_entropy(found.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(found.shape[:2])
    elif spec.activation == "sigmoid":
        each = binary_cross_entropy_with_logits(found, targets, reduction="none").mean(dim=-1)
    else:
        each = mse_loss(found, targets, reduction="none").mean(dim=-1)
    return (each.mean(dim=1) * importance(told).float()).mean()


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
