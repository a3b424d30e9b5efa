"""Whether a gate routes at all: what it gives to whom, and collapse in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorchestra.gate.network import GateSpec

BASE = "base"
COLLAPSED = 0.95  # of the weight, everywhere
STEADY = 0.05  # the most that a coefficient differs between domains where prompts do not matter


@dataclass(frozen=True)
class Loads:
    """Mean coefficients of a gate on examples of several domains.

    Args:
        coefficients: domain → member → mean coefficient.
        shares: domain → member → mean share of the weight, Σ = 1; ``base`` has what no member has.
        entropy: of the mean share over all domains, over its maximum: 1 where all are asked alike, 0 where one is.
        best: domain → the single adapter (or the base) with the lowest loss there.
        kind: ``collapsed`` (one has nearly all of the weight in every domain), ``static`` (the coefficients hardly
            depend on the domain), or ``routes``; with one domain always ``routes``: nothing else can be seen.
        sentence: for people.
    """

    coefficients: Mapping[str, Mapping[str, float]]
    shares: Mapping[str, Mapping[str, float]]
    entropy: float
    best: Mapping[str, str]
    kind: Literal["routes", "collapsed", "static"]
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def loads(spec: GateSpec, domains: Sequence[str], coefficients: Tensor, best: Mapping[str, str]) -> Loads:
    """Look at the coefficients that a gate gives.

    Args:
        spec: of the gate, with K members.
        domains: of n examples.
        coefficients: ``[n, K]``, or ``[n, G, K]``.
        best: domain → the single adapter (or ``base``) with the lowest loss there.
    """
    found = coefficients.detach().double()
    found = found.mean(dim=1) if found.ndim == 3 else found
    sizes = found.abs().sum(dim=-1, keepdim=True)
    # With `none` the base has what is missing to 1; otherwise it acts alone where next to nothing else does.
    base = (1 - sizes).clamp(min=0) if spec.none else (STEADY - sizes).clamp(min=0)
    shares = torch.cat([found.abs(), base], dim=-1) / (sizes + base)
    names = (*spec.members, BASE)
    rows = {domain: [i for i, d in enumerate(domains) if d == domain] for domain in dict.fromkeys(domains)}
    by_domain = {domain: found[index].mean(dim=0) for domain, index in rows.items()}
    share_of = {domain: shares[index].mean(dim=0) for domain, index in rows.items()}
    mean = torch.stack(list(share_of.values())).mean(dim=0)
    entropy = -(mean * mean.clamp(min=1e-12).log()).sum() / math.log(max(2, len(spec.members) + spec.none))
    kind, sentence = _judged(names, by_domain, share_of, best)
    return Loads(
        {domain: dict(zip(spec.members, values.tolist(), strict=True)) for domain, values in by_domain.items()},
        {domain: dict(zip(names, values.tolist(), strict=True)) for domain, values in share_of.items()},
        min(1.0, max(0.0, float(entropy))),
        dict(best),
        kind,
        sentence,
    )


def _judged(
    names: Sequence[str], coefficients: Mapping[str, Tensor], shares: Mapping[str, Tensor], best: Mapping[str, str]
) -> tuple[Literal["routes", "collapsed", "static"], str]:
    if len(shares) < 2:
        return "routes", "With one domain it cannot be seen whether the gate tells prompts apart."
    stacked = torch.stack(list(shares.values()))  # [domains, K + 1]
    least = stacked.min(dim=0).values
    if float(least.max()) > COLLAPSED:
        one = names[int(least.argmax())]
        said = f"The gate has collapsed: {one!r} has {float(least.max()):.0%} or more of the weight in every domain."
        if set(best.values()) == {one}:
            return "collapsed", (
                f"{said} It is also the best single choice in every domain: use it alone, a gate is not needed."
            )
        others = "; ".join(f"{domain!r}: {name!r}" for domain, name in best.items())
        return "collapsed", (
            f"{said} The best single choices differ ({others}): raise the balance term, read deeper features (layers), "
            "or give more examples of the domains that lose."
        )
    spread = torch.stack(list(coefficients.values()))
    if float((spread.max(dim=0).values - spread.min(dim=0).values).max()) < STEADY:
        return "static", (
            f"The gate does not tell the domains apart: no mean coefficient differs by {STEADY:g} between them. A "
            "static mixture would do the same; read deeper features (layers), train longer, or keep the static weights."
        )
    told = "; ".join(
        f"{domain!r}: {names[int(share.argmax())]!r} {float(share.max()):.0%}" for domain, share in shares.items()
    )
    return "routes", f"The gate routes; who has most of the weight on the validation examples: {told}."
