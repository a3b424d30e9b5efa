"""Methods that look at the entries of ΔW one by one.

They depend on the basis in which a model's neurons stand (a rotation of it would give another result), so that they
cannot work on factors. One module at a time its ΔW's are formed in tiles of rows, combined into one m×n matrix and
brought back to factors at a stated rank; what that rank keeps is reported. A sum of thinned-out matrices has full rank:
look at the retained energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.fusion.methods.exact import acting_members, fused_adapter
from lorchestra.fusion.methods.low_rank import Fused, check_density
from lorchestra.fusion.methods.randomised import randomised_svd
from lorchestra.fusion.methods.thinning import dropped, elected, magnitude_at, trimmed

# Entries of a tile. Chance is drawn tile by tile, so that another number is another draw for the same seed.
TILE = 1 << 20


def ties(
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    *,
    density: float = 0.2,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "fused",
    reporter: Reporter = SILENT,
) -> Fused:
    """TIES: keep each member's largest entries, elect a sign for every entry, average the values of that sign.

    Yadav et al. 2023, https://arxiv.org/abs/2306.01708. Trimmed module by module; signs are elected on the λ-weighted
    values, and an entry is the mean of those λᵢ·ΔWᵢ that have the sign elected.

    Args:
        members: name → adapter.
        weights: name → λ. Because of the mean, λ = 1 each is the paper's choice before its overall scale.
        density: share of each ΔW's entries that are kept (the paper: 0.2).
        rank: of the result for every module; by default Σrᵢ of the members there.
        dtype: of the arithmetic, float32 or float64.
        name: of the result, for its lineage.
        reporter: progress.

    Raises:
        AdapterError, UserError: as :func:`lorchestra.fusion.methods.linear`; a density outside (0, 1], a rank below 1.
    """
    return _fused("ties", members, weights, _Settings(density, None, rank, dtype, name, reporter), _trim, elected)


def magnitude(
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    *,
    density: float = 0.5,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "fused",
    reporter: Reporter = SILENT,
) -> Fused:
    """Σ λᵢ·trim(ΔWᵢ): each member's largest entries, summed. Arguments and errors as :func:`ties`.

    Magnitude pruning: Han et al. 2015, https://arxiv.org/abs/1506.02626.
    """
    return _fused("magnitude", members, weights, _Settings(density, None, rank, dtype, name, reporter), _trim, _total)


def dare(
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    *,
    density: float = 0.5,
    seed: int = 0,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "fused",
    reporter: Reporter = SILENT,
) -> Fused:
    """DARE: drop entries at random, divide the others by ``density``, sum with λ. Before truncation to ``rank`` the
    result is Σλᵢ·ΔWᵢ on average.

    Yu et al. 2023, https://arxiv.org/abs/2311.03099. Arguments and errors as :func:`ties`; and

    Args:
        density: probability that an entry is kept (1 − the paper's drop rate p).
        seed: of the chance, together with the names of member and module.
    """
    return _fused("dare", members, weights, _Settings(density, seed, rank, dtype, name, reporter), _drop, _total)


def dare_ties(
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    *,
    density: float = 0.5,
    seed: int = 0,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "fused",
    reporter: Reporter = SILENT,
) -> Fused:
    """DARE's random dropping, then the sign election and mean of TIES. Arguments and errors as :func:`dare`.

    Yu et al. 2023, https://arxiv.org/abs/2311.03099.
    """
    return _fused("dare_ties", members, weights, _Settings(density, seed, rank, dtype, name, reporter), _drop, elected)


@dataclass(frozen=True)
class _Settings:
    density: float
    seed: int | None
    rank: int | None
    dtype: torch.dtype
    name: str
    reporter: Reporter


class _Tiles:
    """ΔW of one member at one module, a tile of rows at a time; formed anew each time, equal bit for bit."""

    def __init__(self, update: LowRank, dtype: torch.dtype) -> None:
        self.B, self.A = update.B.to(dtype), update.A.to(dtype)
        self.rows = max(TILE // update.shape[1], 1)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.B[i : i + self.rows] @ self.A for i in range(0, len(self.B), self.rows))


# A member at a module → its entries, thinned out, tile by tile.
Thin = Callable[[_Tiles, _Settings, str, str], Iterator[Tensor]]


def _trim(tiles: _Tiles, settings: _Settings, member: str, path: str) -> Iterator[Tensor]:
    least = magnitude_at(tiles, settings.density)
    return (trimmed(tile, least) for tile in tiles)


def _drop(tiles: _Tiles, settings: _Settings, member: str, path: str) -> Iterator[Tensor]:
    return (dropped(tile, settings.density, settings.seed, member, path, i) for i, tile in enumerate(tiles))


def _total(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _fused(
    task: str,
    members: Mapping[str, Adapter],
    weights: Mapping[str, float],
    settings: _Settings,
    thin: Thin,
    combine: Callable[[Sequence[Tensor]], Tensor],
) -> Fused:
    check_density(settings.density)
    if settings.rank is not None and settings.rank < 1:
        raise UserError(f"a rank of at least 1 is needed; got {settings.rank}")
    acting = acting_members(members, weights)
    modules, shares, kept, whole = {}, {}, 0.0, 0.0
    paths = sorted({path for _, adapter, _ in acting for path in adapter.modules})
    with settings.reporter.task(task, len(paths), "module") as progress:
        for path in paths:
            here = [(key, adapter.modules[path], weight) for key, adapter, weight in acting if path in adapter.modules]
            rank = settings.rank or sum(update.rank for _, update, _ in here)
            matrix = _combined(here, settings, path, thin, combine)
            modules[path], part, size = randomised_svd(matrix, rank, f"{settings.seed or 0}\0{path}")
            kept, whole = kept + part, whole + size
            shares[path] = part / size if size > 0 else 1.0
            progress.advance()
    chance = {} if settings.seed is None else {"seed": settings.seed}
    retained = kept / whole if whole > 0 else 1.0
    told = {"density": settings.density, **chance, "rank": settings.rank, "retained": retained}
    return Fused(fused_adapter(acting, modules, task, settings.name, told), retained, shares)


def _combined(
    here: Sequence[tuple[str, LowRank, float]],
    settings: _Settings,
    path: str,
    thin: Thin,
    combine: Callable[[Sequence[Tensor]], Tensor],
) -> Tensor:
    """What the method makes of one module's members (name, update, λ), ``[m, n]``."""
    matrix = torch.empty(here[0][1].shape, dtype=settings.dtype)
    thinned = [thin(_Tiles(update, settings.dtype), settings, key, path) for key, update, _ in here]
    start = 0
    for tiles in zip(*thinned, strict=True):
        rows = combine([weight * tile for tile, (*_, weight) in zip(tiles, here, strict=True)])
        matrix[start : start + len(rows)] = rows
        start += len(rows)
    return matrix
