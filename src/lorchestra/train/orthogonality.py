"""Keeping directions apart: within the adapter, and away from the context's (O-LoRA).

For a factor with rows aᵢ (the rows of A; the columns of B), Â has them at length one. The penalty is the mean
squared cosine of different rows, Σ_{i≠j}⟨âᵢ, âⱼ⟩² / r(r−1): in [0, 1] for any size, rank and scale of the
factor. Against a context with orthonormal row basis Q it is ‖ÂQᵀ‖²/r, the share of Â's energy inside the
context's row space (Wang et al. 2023, arXiv 2310.14152, normalised).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorchestra.bank import TrainableMember
from lorchestra.errors import UserError


def penalty(member: TrainableMember, context: Mapping[str, Tensor]) -> Tensor:
    """Mean over modules and factors, a scalar in [0, 2]; differentiable.

    Args:
        member: the adapter in training.
        context: module path → orthonormal rows Q ``[q, n]`` of the context's row space; may be empty.
    """
    terms = []
    for path, A, B in zip(member.paths, member.A, member.B, strict=True):
        rows = _unit(A)
        term = (_coherence(rows) + _coherence(_unit(B.T))) / 2
        if path in context:
            term = term + (rows @ context[path].T).square().sum() / rows.shape[0]
        terms.append(term)
    return torch.stack(terms).mean()


@torch.no_grad()
def project_gradients(member: TrainableMember, context: Mapping[str, Tensor]) -> None:
    """Remove from the gradients what turns rows towards each other or into the context, in place.

    With unit rows Â and gradient G: S is the symmetric part of GÂᵀ without its diagonal, and G ← G − SÂ
    (the tangent space of orthonormal frames, lengths left free); then G ← G − (GQᵀ)Q for the context.
    It acts on the gradient that the optimiser receives; Adam's rescaling keeps this only approximately.
    """
    for path, A, B in zip(member.paths, member.A, member.B, strict=True):
        if A.grad is not None:
            A.grad.copy_(_tangent(A.grad, A))
            if path in context:
                Q = context[path]
                A.grad.sub_((A.grad @ Q.T) @ Q)
        if B.grad is not None:
            B.grad.copy_(_tangent(B.grad.T, B.T).T)


@torch.no_grad()
def leave_context(member: TrainableMember, context: Mapping[str, Tensor]) -> None:
    """Remove from A what lies in the context's row space, in place: where a projection of gradients starts from.

    Raises:
        UserError: nothing is left: the context's rows span all inputs, and the adapter could learn nothing there.
    """
    for path, A in zip(member.paths, member.A, strict=True):
        if path in context:
            before = A.norm()
            A.sub_((A @ context[path].T) @ context[path])
            if A.norm() <= 1e-5 * before:
                raise UserError(
                    f"orthogonality.against_context: at {path} the context's adapters span all {A.shape[1]} inputs, so "
                    "no direction is left for a new one. Take adapters out of the context, train them at a lower rank, "
                    "or set orthogonality.mode to penalty"
                )


def row_bases(context: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Module path → orthonormal rows ``[q, n]`` spanning the rows of all given A ``[rᵢ, n]``."""
    bases = {}
    for path, factors in context.items():
        stacked = torch.cat(factors).double()
        _, values, V = torch.linalg.svd(stacked, full_matrices=False)
        bases[path] = V[values > values[0] * 1e-6].float().contiguous()
    return bases


def _unit(rows: Tensor) -> Tensor:
    """Rows at length one; rows much shorter than 1e-3 (B at the start) count as absent, not as directions."""
    return rows / (rows.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()


def _coherence(rows: Tensor) -> Tensor:
    r = rows.shape[0]
    gram = rows @ rows.T
    return (gram.square().sum() - torch.diagonal(gram).square().sum()) / max(r * (r - 1), 1)


def _tangent(gradient: Tensor, factor: Tensor) -> Tensor:
    rows = _unit(factor)
    S = gradient @ rows.T
    S = (S + S.T) / 2
    S.fill_diagonal_(0)
    return gradient - S @ rows
