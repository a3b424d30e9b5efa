"""What adapters are and how they meet, before they are fused: norms, energy, cosines, principal angles, signs.

Every figure is of ΔW and not of its factors, so (B M, M⁻¹ A) gives the same. With ΔW = U S Vᵀ for each member, from
its factors alone, everything about a pair follows from the small matrices UᵢᵀUⱼ and VᵢᵀVⱼ ``[rᵢ, rⱼ]``:
⟨ΔWᵢ, ΔWⱼ⟩ = Σ SᵢSⱼᵀ ∘ UᵢᵀUⱼ ∘ VᵢᵀVⱼ, and their singular values are the cosines of the principal angles (Björck and
Golub 1973). Modules of one shape go through at once; no m×n matrix is formed but in tiles, for the signs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.fusion.groups import layer_of
from lorchestra.fusion.methods import common_base
from lorchestra.fusion.signs import Signs, Tiles, sign_conflict

# Singular values below this share of the largest are the rounding of float32 factors and span no direction.
ROUNDING = 1e-6
# float64 numbers held at once by the bases of one batch of modules.
BATCH = 1 << 24


@dataclass(frozen=True)
class Spectrum:
    """One module of one adapter: the singular values of ΔW, descending, without those that are rounding."""

    values: tuple[float, ...]
    rank: int
    shape: tuple[int, int]

    @property
    def square(self) -> float:
        """‖ΔW‖²."""
        return math.fsum(value * value for value in self.values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007); 0 for ΔW = 0."""
        total = math.fsum(self.values)
        return math.exp(-math.fsum(s / total * math.log(s / total) for s in self.values)) if total > 0 else 0.0

    def kept(self, rank: int) -> float:
        """‖·‖² of the best approximation of that rank."""
        return math.fsum(value * value for value in self.values[:rank])


@dataclass(frozen=True)
class Meeting:
    """Two adapters in one module, or in several: sums, so that meetings add up.

    Args:
        inner: ⟨ΔWₐ, ΔW_b⟩.
        squares: (‖ΔWₐ‖², ‖ΔW_b‖²); of modules that only one changes too.
        dimensions: Σ min(rₐ, r_b), principal angles there are.
        rows, columns: Σ cos² of the angles between the row spaces (what is read), column spaces (what is written).
        rows_by_chance, columns_by_chance: what two random spaces of these dimensions have on average.
        row_angles, column_angles: in degrees, ascending within a module.
        signs: see :class:`Signs`; ``None`` where not both change something.
    """

    inner: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    dimensions: int = 0
    rows: float = 0.0
    columns: float = 0.0
    rows_by_chance: float = 0.0
    columns_by_chance: float = 0.0
    row_angles: tuple[float, ...] = ()
    column_angles: tuple[float, ...] = ()
    signs: Signs | None = None

    def __add__(self, other: Meeting) -> Meeting:
        signs = [part.signs for part in (self, other) if part.signs is not None]
        return Meeting(
            self.inner + other.inner,
            (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]),
            self.dimensions + other.dimensions,
            self.rows + other.rows,
            self.columns + other.columns,
            self.rows_by_chance + other.rows_by_chance,
            self.columns_by_chance + other.columns_by_chance,
            self.row_angles + other.row_angles,
            self.column_angles + other.column_angles,
            signs[0] + signs[1] if len(signs) == 2 else signs[0] if signs else None,
        )

    @property
    def cosine(self) -> float | None:
        """⟨ΔWₐ, ΔW_b⟩ / (‖ΔWₐ‖·‖ΔW_b‖); ``None`` where one of them is zero."""
        size = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return max(-1.0, min(1.0, self.inner / size)) if size > 0 else None

    @property
    def row_overlap(self) -> float | None:
        """‖VₐᵀV_b‖² / min(rₐ, r_b): 1 if the smaller row space lies in the larger, 0 if they are orthogonal."""
        return self.rows / self.dimensions if self.dimensions else None

    @property
    def column_overlap(self) -> float | None:
        """‖UₐᵀU_b‖² / min(rₐ, r_b)."""
        return self.columns / self.dimensions if self.dimensions else None

    @property
    def row_chance(self) -> float | None:
        """The overlap of random row spaces: max(rₐ, r_b) / n."""
        return self.rows_by_chance / self.dimensions if self.dimensions else None

    @property
    def column_chance(self) -> float | None:
        """The overlap of random column spaces: max(rₐ, r_b) / m."""
        return self.columns_by_chance / self.dimensions if self.dimensions else None


@dataclass(frozen=True)
class Pair:
    """Two adapters, by name, and how they meet in every module that either changes."""

    a: str
    b: str
    modules: Mapping[str, Meeting]

    def whole(self, paths: Iterable[str] | None = None) -> Meeting:
        """In all modules, or in those of ``paths``."""
        return sum((self.modules[p] for p in (self.modules if paths is None else paths)), Meeting())

    @property
    def shared(self) -> tuple[str, ...]:
        """Modules where both change something."""
        return tuple(path for path, met in self.modules.items() if met.dimensions)


@dataclass(frozen=True)
class Diagnosis:
    """All that was measured.

    Args:
        spectra: adapter → module path → its spectrum.
        pairs: every two adapters, in the order they were given.
        tiles: module path → which part of ΔW the signs were counted on.
        weights: module path → ‖W‖ of the base; empty without a base.
        activation: adapter i → module path → adapter j → √ of the mean over tokens of ‖ΔWⱼ xᵢ‖², where xᵢ are the
            module's inputs on i's data; empty without data.
        tokens: adapter i → supervised tokens that this mean is over.
    """

    spectra: Mapping[str, Mapping[str, Spectrum]]
    pairs: tuple[Pair, ...]
    tiles: Mapping[str, Tiles] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    activation: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters."""
        return tuple(self.spectra)

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that any of them changes, as the model counts them (layer 2 before layer 10)."""
        return tuple(sorted({path for found in self.spectra.values() for path in found}, key=natural))

    def norm(self, name: str, paths: Iterable[str] | None = None) -> float:
        """‖ΔW‖ of an adapter, over all of its modules or those of ``paths``."""
        found = self.spectra[name]
        return math.sqrt(math.fsum(found[p].square for p in (found if paths is None else paths) if p in found))

    def relative(self, name: str, paths: Iterable[str] | None = None) -> float | None:
        """‖ΔW‖ / ‖W‖ over the modules that it changes; ``None`` without a base."""
        mine = [p for p in (self.spectra[name] if paths is None else paths) if p in self.spectra[name]]
        size = math.sqrt(math.fsum(self.weights[p] ** 2 for p in mine if p in self.weights))
        return self.norm(name, mine) / size if size > 0 else None

    def kept(self, name: str, rank: int) -> float:
        """Share of ‖ΔW‖² that rank ``rank`` in every module keeps; 1 for ΔW = 0."""
        whole = self.norm(name) ** 2
        return math.fsum(found.kept(rank) for found in self.spectra[name].values()) / whole if whole > 0 else 1.0

    def rank_keeping(self, name: str, share: float) -> int:
        """The lowest rank that keeps ``share`` of ‖ΔW‖² if every module has it; at least 1."""
        most = max(len(found.values) for found in self.spectra[name].values())
        return next((r for r in range(1, most) if self.kept(name, r) >= share * (1 - 1e-12)), max(most, 1))

    def cross(self, data_of: str, name: str, paths: Iterable[str] | None = None) -> float | None:
        """‖ΔWⱼ xᵢ‖ / ‖ΔWᵢ xᵢ‖ for j = ``name`` on the data of i, over modules that either changes."""
        found = self.activation.get(data_of, {})
        chosen = list(found) if paths is None else [p for p in paths if p in found]
        theirs, own = (math.fsum(found[p].get(n, 0.0) ** 2 for p in chosen) for n in (name, data_of))
        return math.sqrt(theirs / own) if own > 0 else None


def diagnose(
    adapters: Mapping[str, Adapter],
    *,
    weights: Mapping[str, float] | None = None,
    activation: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    tokens: Mapping[str, int] | None = None,
    entries: int | None = None,
    reporter: Reporter = SILENT,
) -> Diagnosis:
    """Measure every adapter and every pair.

    Args:
        adapters: name → adapter; one is enough.
        weights: ‖W‖ of the base per module, see :func:`lorchestra.fusion.base_norms.weight_norms`.
        activation: see :class:`Diagnosis` and :func:`lorchestra.evaluate.activation.activation_norms`.
        tokens: that ``activation`` is over.
        entries: of ΔW, in all modules together, on which signs are counted; see :func:`sign_conflict`.
        reporter: progress.

    Raises:
        UserError: no adapters.
        AdapterError: they belong to different bases, or a module has different shapes in two of them.
    """
    if not adapters:
        raise UserError("a diagnosis needs at least one adapter")
    common_base(adapters)
    names = list(adapters)
    shapes = _shapes(adapters)
    spectra: dict[str, dict[str, Spectrum]] = {name: {} for name in names}
    met: dict[tuple[str, str], dict[str, Meeting]] = {pair: {} for pair in combinations(names, 2)}
    with reporter.task("compare", len(shapes), "module") as task:
        for paths in _batches(adapters, shapes):
            present = [name for name in names if paths[0] in adapters[name].modules]
            frames = {name: _frame([adapters[name].modules[p] for p in paths]) for name in present}
            for name, frame in frames.items():
                for k, path in enumerate(paths):
                    update = adapters[name].modules[path]
                    spectra[name][path] = Spectrum(frame.values_of(k), update.rank, update.shape)
            for (a, b), found in met.items():
                if a in frames and b in frames:
                    found |= zip(paths, _meet(frames[a], frames[b]), strict=True)
                else:
                    for path in paths:
                        squares = [spectra[n][path].square if n in frames else 0.0 for n in (a, b)]
                        found[path] = Meeting(squares=(squares[0], squares[1]))
            task.advance(len(paths))
    signs, tiles = sign_conflict(adapters, entries, reporter)
    for pair, of_module in signs.items():
        for path, counted in of_module.items():
            met[pair][path] += Meeting(signs=counted)
    order = sorted(shapes, key=natural)
    return Diagnosis(
        {name: {p: found[p] for p in order if p in found} for name, found in spectra.items()},
        tuple(
            Pair(a, b, {p: found[p] for p in order if p in spectra[a] or p in spectra[b]})
            for (a, b), found in met.items()
        ),
        {path: tiles[path] for path in order if path in tiles},
        dict(weights or {}),
        dict(activation or {}),
        dict(tokens or {}),
    )


def place(path: str) -> tuple[int | None, str]:
    """Module path → (layer, kind): ``model.layers.12.mlp.down_proj`` → (12, ``mlp.down_proj``).

    The layer is the first number; further numbers (experts) become ``*``. Without a number the kind is the path.
    """
    layer = layer_of(path)
    if layer is None:
        return None, path
    parts = path.split(".")
    tail = parts[next(i for i, part in enumerate(parts) if layer_of(part) is not None) + 1 :]
    return layer, ".".join(part if layer_of(part) is None else "*" for part in tail)


def by_layer(paths: Iterable[str]) -> dict[int, list[str]]:
    """Layer → its modules; those outside the layers are left out."""
    out: dict[int, list[str]] = {}
    for path in paths:
        layer = place(path)[0]
        if layer is not None:
            out.setdefault(layer, []).append(path)
    return dict(sorted(out.items()))


def by_kind(paths: Iterable[str]) -> dict[str, list[str]]:
    """Kind → its modules, in all layers."""
    out: dict[str, list[str]] = {}
    for path in paths:
        out.setdefault(place(path)[1], []).append(path)
    return out


def natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in a path as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


@dataclass(frozen=True, eq=False)
class _Frame:
    """ΔW = U S Vᵀ of one member in M modules: ``U [M, m, p]``, ``S [M, p]``, ``V [M, n, p]``, float64.

    Where S is rounding, S and the columns of U and V are zero.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def values_of(self, k: int) -> tuple[float, ...]:
        return tuple(s for s in self.S[k].tolist() if s > 0)


def _frame(updates: Sequence[LowRank]) -> _Frame:
    Q_B, R_B = torch.linalg.qr(torch.stack([u.B for u in updates]).double())
    Q_A, R_A = torch.linalg.qr(torch.stack([u.A.T for u in updates]).double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    real = S.gt(ROUNDING * S[:, :1]).double()
    return _Frame((Q_B @ U) * real[:, None], S * real, (Q_A @ Vh.mT) * real[:, None])


def _meet(a: _Frame, b: _Frame) -> Iterator[Meeting]:
    """How two members meet in each of M modules."""
    C_U, C_V = a.U.mT @ b.U, a.V.mT @ b.V
    inner = (a.S[:, :, None] * b.S[:, None, :] * C_U * C_V).sum((1, 2)).tolist()
    squares = zip(a.S.square().sum(1).tolist(), b.S.square().sum(1).tolist(), strict=True)
    cosines_U, cosines_V = (torch.linalg.svdvals(C).clamp(max=1.0) for C in (C_U, C_V))
    ranks = zip((a.S > 0).sum(1).tolist(), (b.S > 0).sum(1).tolist(), strict=True)
    m, n = a.U.shape[1], a.V.shape[1]
    for k, ((square_a, square_b), (p, q)) in enumerate(zip(squares, ranks, strict=True)):
        least = min(p, q)
        columns, rows = cosines_U[k, :least], cosines_V[k, :least]
        yield Meeting(
            inner[k],
            (square_a, square_b),
            least,
            float(rows.square().sum()),
            float(columns.square().sum()),
            p * q / n,
            p * q / m,
            tuple(rows.arccos().rad2deg().tolist()),
            tuple(columns.arccos().rad2deg().tolist()),
        )


def _shapes(adapters: Mapping[str, Adapter]) -> dict[str, tuple[int, int]]:
    """Module path → shape of ΔW, the same in all that change it."""
    found: dict[str, tuple[tuple[int, int], str]] = {}
    for name, adapter in adapters.items():
        for path, update in adapter.modules.items():
            shape, first = found.setdefault(path, (update.shape, name))
            if shape != update.shape:
                raise AdapterError(
                    f"module {path!r} has an update of shape {shape} in {first!r} and {update.shape} in {name!r}; "
                    "these adapters belong to different bases"
                )
    return {path: shape for path, (shape, _) in found.items()}


def _batches(adapters: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]]) -> Iterator[list[str]]:
    """Modules of one shape, changed by the same members at the same ranks; as many as :data:`BATCH` allows."""
    groups: dict[tuple[tuple[int, int], tuple[int, ...]], list[str]] = {}
    for path, shape in sorted(shapes.items()):
        ranks = tuple(a.modules[path].rank if path in a.modules else 0 for a in adapters.values())
        groups.setdefault((shape, ranks), []).append(path)
    for (shape, ranks), paths in groups.items():
        size = max(BATCH // (sum(shape) * sum(ranks)), 1)
        yield from (paths[k : k + size] for k in range(0, len(paths), size))
