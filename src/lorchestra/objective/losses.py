"""What a stage minimises, from the log-probabilities of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorchestra.objective.logprobs import BranchScores


def sft_loss(scores: BranchScores, total_tokens: int) -> Tensor:
    """Negative log-likelihood in nats, summed over this batch and divided by ``total_tokens``.

    ``total_tokens`` counts the supervised tokens of the whole optimiser step, so that a token weighs the same
    whichever micro-batch it falls in. Returns a scalar float32.
    """
    return -scores.sums.sum() / total_tokens


@dataclass(frozen=True)
class PreferenceTerms:
    """Per pair: ``loss`` ``[p]``, ``margin`` ``[p]`` (β × (policy − reference margin)), ``preferred`` ``[p]`` bool."""

    loss: Tensor
    margin: Tensor
    preferred: Tensor


def preference_terms(
    policy: BranchScores,
    reference: Tensor,
    *,
    loss: Literal["sigmoid", "ipo"],
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceTerms:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290) or IPO (Azar et al. 2023, arXiv 2310.12036) per pair.

    Args:
        policy: scores of 2p branches, chosen and rejected in turn.
        reference: ``[2p]`` float32, the reference's ``sums`` of the same branches.
        loss: ``sigmoid`` is −(1−ε) log σ(βh) − ε log σ(−βh) on summed log-ratios; ``ipo`` is (h − 1/(2β))² on
            log-ratios averaged over tokens. With policy = reference they are ln 2 and 1/(4β²).
        beta: strength of the pull to the reference, 1/nat.
        label_smoothing: ε, the assumed share of swapped labels (sigmoid only).
    """
    ratio = policy.sums - reference
    if loss == "ipo":
        ratio = ratio / policy.tokens.clamp(min=1)
    h = ratio[0::2] - ratio[1::2]
    preferred = policy.sums[0::2] > policy.sums[1::2]
    if loss == "ipo":
        return PreferenceTerms((h - 1 / (2 * beta)) ** 2, beta * h, preferred)
    log_sigmoid = torch.nn.functional.logsigmoid
    terms = -(1 - label_smoothing) * log_sigmoid(beta * h) - label_smoothing * log_sigmoid(-beta * h)
    return PreferenceTerms(terms, beta * h, preferred)


def preference_at_zero(loss: Literal["sigmoid", "ipo"], beta: float) -> float:
    """The loss of a pair when policy and reference agree: ln 2 (any smoothing), or 1/(4β²)."""
    return 1 / (4 * beta**2) if loss == "ipo" else float(torch.log(torch.tensor(2.0, dtype=torch.float64)))
