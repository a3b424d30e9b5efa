"""A new adapter: which modules it changes, how it starts, how it is scaled.

Scaling (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732) and initialisation are independent choices; B is always
zero at the start, so every choice starts at the same function.
"""

from __future__ import annotations

import difflib
import hashlib
import math

import torch
from torch import Tensor, nn

from lorchestra.bank import TrainableMember, linear_shape
from lorchestra.errors import UserError
from lorchestra.train.settings import LoraSettings


def target_paths(model: nn.Module, wanted: str | tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Module path → ``(m, n)`` of the linear modules to change.

    ``all-linear`` is every linear module but the output embedding; a name matches the end of a path
    (``q_proj`` matches ``model.layers.0.self_attn.q_proj``).

    Raises:
        UserError: a name matches nothing; the nearest names are given.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {p: s for p, m in model.named_modules() if m is not head and (s := linear_shape(m))}
    if wanted == "all-linear":
        if not linears:
            raise UserError(f"{type(model).__name__} has no linear modules to adapt")
        return linears
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: dict[str, tuple[int, int]] = {}
    for name in names:
        hits = {p: s for p, s in linears.items() if p == name or p.endswith("." + name)}
        if not hits:
            ends = sorted({p.rsplit(".", 1)[-1] for p in linears})
            near = difflib.get_close_matches(name, ends, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"target_modules: {name!r} matches no linear module; there are {', '.join(ends)}{hint}")
        chosen |= hits
    return chosen


def initial_A(settings: LoraSettings, n: int, generator: torch.Generator) -> Tensor:
    """A at the start, ``[r, n]`` float32.

    ``kaiming``: U(±1/√n), PEFT's default (He et al. 2015 with a = √5). ``gaussian``: N(0, 1/r²), PEFT's.
    ``rescaled``: N(0, σ²/r), the article's; its std reads σ/√r. ``orthogonal``: orthonormal rows (columns if
    r > n), by QR of a Gaussian.
    """
    r = settings.rank
    if settings.init == "kaiming":
        return (torch.rand(r, n, generator=generator) * 2 - 1) / math.sqrt(n)
    noise = torch.randn(r, n, generator=generator)
    if settings.init == "gaussian":
        return noise / r
    if settings.init == "rescaled":
        return noise * (settings.sigma / math.sqrt(r))
    Q: Tensor
    Q, R = torch.linalg.qr(noise.T if r <= n else noise)
    Q = Q * torch.sign(torch.diagonal(R))
    return Q.T.contiguous() if r <= n else Q.contiguous()


def expected_std(settings: LoraSettings, n: int) -> float:
    """Standard deviation of the entries of A at the start, for n in_features."""
    r = settings.rank
    return {
        "kaiming": 1 / math.sqrt(3 * n),
        "gaussian": 1 / r,
        "rescaled": settings.sigma / math.sqrt(r),
        "orthogonal": 1 / math.sqrt(max(n, r)),
    }[settings.init]


def new_member(model: nn.Module, settings: LoraSettings, seed: int, name: str = "") -> TrainableMember:
    """A fresh adapter for ``model``; each module draws from its own generator, seeded by (seed, name, path).

    So a module starts the same whichever other modules are adapted, on any device, and stages of one recipe
    (``name`` tells them apart: a recipe's are told by what they train on) start in different directions.
    """
    factors = {}
    for path, (m, n) in target_paths(model, settings.target_modules).items():
        digest = hashlib.sha256(f"{seed}\0{name}\0{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        factors[path] = (torch.zeros(m, settings.rank), initial_A(settings, n, generator))
    return TrainableMember(factors, settings.scale, settings.dropout)
