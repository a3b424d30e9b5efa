"""``Router``: which of many adapters a prompt is for, or none, without any training of its own.

Linear discriminant analysis (Fisher 1936) on the features of prompts: every adapter is a class whose mean is that of
its training prompts (the nearest of its centroids), all have one covariance Σ, and the nearest in Σ's metric is meant.
Plain prompts are one more class, which is nobody's. Σ is pooled over the adapters' own scatters and shrunk towards its
diagonal (Friedman 1989), and is held as a diagonal and a few axes: no n×n matrix exists.

Adapters of which only the weights are known come second: ‖ΔW x‖², by the leading singular directions, is compared with
what plain prompts have there.

Axis letters: n features, C centroids of all adapters, K adapters, R axes of Σ, d directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.errors import UserError
from lorchestra.gate.background import Background
from lorchestra.gate.prototypes import Prototype, scattered

SHRINKAGE = 0.3  # of Σ towards its diagonal
AXES = 256  # R, at most
POOLED = 32  # adapters whose scatter makes Σ, at most: evenly among all
FARTHEST = 2.5  # mean squared distances of an adapter's own prompts, beyond which a prompt is not its own
UNLIKELY = 4.0  # standard deviations of plain prompts, from which directions speak for an adapter
TEMPERATURE = 4.0  # of coefficients, where several adapters share an answer
PRIOR = 10  # prompts that an adapter's own mean squared distance counts as much as what is usual
LEAST = 0.05  # a coefficient below this is not worth its adapter's products
Routed = tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Metric:
    """Whitens: distances after it are those of Σ⁻¹, Σ = diag(1/scale²)·(I + Vᵀ diag(s²) V) in both scales.

    Args:
        scale: ``[n]``.
        axes: V, ``[R, n]``, orthonormal.
        shrink: ``[R]``, 1 − 1/√(1 + s²).
    """

    scale: Tensor
    axes: Tensor
    shrink: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """``[…, n]`` to the same."""
        y = x * self.scale
        return y - (y @ self.axes.T * self.shrink) @ self.axes

    @classmethod
    def of(cls, axes: list[Tensor], variances: list[Tensor]) -> Metric:
        """Pooled over classes: of each the axes of its scatter ``[q, n]`` and its variance ``[n]``."""
        pooled = torch.cat(axes).double() * ((1 - SHRINKAGE) / len(axes)) ** 0.5
        total = torch.stack(variances).double().mean(dim=0)
        diagonal = total - pooled.square().sum(dim=0)
        scale = diagonal.clamp_min(float(total.mean()) * 1e-3).rsqrt()  # what never varies would divide by nothing
        _, s, V = torch.linalg.svd(pooled * scale, full_matrices=False)
        shrink = 1 - 1 / (1 + s[:AXES].square()).sqrt()
        return cls(scale.float(), V[:AXES].float(), shrink.float())


class Router:
    """Routes prompts among a set of adapters; what is not in the set has no influence on anything.

    Args:
        prototypes: name → prototype, all of the background's features.
        background: of the base.
        farthest: see :data:`FARTHEST`.
        temperature: see :data:`TEMPERATURE`.

    Raises:
        UserError: a prototype of another width than the background's.
    """

    def __init__(
        self,
        prototypes: Mapping[str, Prototype],
        background: Background,
        farthest: float = FARTHEST,
        temperature: float = TEMPERATURE,
    ) -> None:
        n = background.x.shape[1]
        for name, one in prototypes.items():
            for tensor in (one.directions, one.centroids):
                if len(tensor) and tensor.shape[1] != n:
                    raise UserError(f"the prototype of {name!r} has {tensor.shape[1]} features; this base has {n}")
        self.background, self.farthest, self.temperature = background, farthest, temperature
        self._centre = background.x.mean(dim=0)
        known = {name: one for name, one in sorted(prototypes.items()) if one.prompts}
        weights = {name: one for name, one in sorted(prototypes.items()) if not one.prompts and len(one.directions)}
        self._known, self._weights = tuple(known), tuple(weights)
        if known:
            self._take_prompts(list(known.values()))
        if weights:
            self._take_directions(list(weights.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that may be chosen."""
        return (*self._known, *self._weights)

    def route(self, x: Tensor, k: int = 1) -> Routed:
        """The adapters that a prompt is for, with coefficients that sum to 1, greatest first; empty: none.

        Args:
            x: ``[n]``, features of the prompt.
            k: adapters at most.

        Raises:
            UserError: NaN or infinity in a feature, or another number of them.
        """
        if x.shape != self.background.x.shape[1:] or not bool(torch.isfinite(x).all()):
            raise UserError(
                f"features are {tuple(x.shape)}, expected {self.background.x.shape[1]} finite numbers; the base that "
                "made them is another one, or damaged"
            )
        return self._by_prompts(x.float(), k) or self._by_directions(x.float())

    def scores(self, x: Tensor) -> Mapping[str, float]:
        """Name → squared distance to the nearest centroid, in units of what the adapter's own prompts have on average;
        of those that have prompts.
        """
        if not self._known:
            return {}
        found = (self._distances(self._whitened(x.float())) / self._own).tolist()
        return dict(zip(self._known, found, strict=True))

    def _take_prompts(self, known: list[Prototype]) -> None:
        plain = scattered(self.background.x - self._centre)
        step = max(1.0, len(known) / POOLED)
        pooled = [known[int(i * step)] for i in range(min(len(known), POOLED))]
        # Plain prompts are a class as the others are: with them there is a scatter, however few prompts adapters have.
        self._metric = Metric.of(
            [plain, *(one.axes for one in pooled)],
            [self.background.x.var(dim=0, correction=0), *(one.variance for one in pooled)],
        )
        self._centroids = self._whitened(torch.cat([one.centroids for one in known]))  # [C, n]
        self._squares = self._centroids.square().sum(dim=1)
        counts = torch.tensor([len(one.centroids) for one in known])
        self._owner = torch.repeat_interleave(counts)
        prompts = torch.tensor([one.prompts for one in known])
        spreads = torch.tensor([self._spread(one) for one in known])
        usual = float(len(self._centre))  # tr(Σ⁻¹ Σ)
        self._own = (prompts * spreads + PRIOR * usual) / ((prompts - counts).clamp_min(0) + PRIOR)

    def _whitened(self, x: Tensor) -> Tensor:
        """``[…, n]`` to the same; plain prompts are about 0, so that distances are no differences of large numbers."""
        return self._metric(x - self._centre)

    def _spread(self, one: Prototype) -> float:
        """Mean squared distance of an adapter's prompts from their nearest centroid: tr(Σ⁻¹ Σ_own)."""
        metric = self._metric
        rest = (one.variance - one.axes.square().sum(dim=0)).clamp_min(0) * metric.scale.square()
        lost = (2 * metric.shrink - metric.shrink.square())[:, None] * metric.axes.square()
        return float(metric(one.axes).square().sum()) + float((rest * (1 - lost.sum(dim=0))).sum())

    def _take_directions(self, weights: list[Prototype]) -> None:
        self._directions = torch.cat([one.directions for one in weights]) * self.background.norm  # [Σd, n]
        self._reader = torch.repeat_interleave(torch.tensor([len(one.directions) for one in weights]))
        plain = torch.stack([self._responses(x) for x in self.background.x])
        self._usual, self._spreads = plain.mean(dim=0), plain.std(dim=0).clamp_min(1e-6)

    def _distances(self, y: Tensor) -> Tensor:
        """``[K]``, squared, from whitened features."""
        every = (self._squares - 2 * (self._centroids @ y) + y.square().sum()).clamp_min(0)
        found = torch.full((len(self._known),), math.inf)
        return found.scatter_reduce(0, self._owner, every, "amin")

    def _by_prompts(self, x: Tensor, k: int) -> Routed:
        if not self._known:
            return ()
        y = self._whitened(x)
        distances = self._distances(y)
        order = distances.topk(min(k, len(distances)), largest=False)
        nearest = [
            (i, d)
            for d, i in zip(order.values.tolist(), order.indices.tolist(), strict=True)
            if d <= self.farthest * float(self._own[i])
        ]
        if not nearest or float(y.square().sum()) < nearest[0][1]:
            return ()
        shares = [math.exp((nearest[0][1] - d) / (2 * self.temperature)) for _, d in nearest]
        kept = [(i, share) for (i, _), share in zip(nearest, shares, strict=True) if share / sum(shares) >= LEAST]
        whole = sum(share for _, share in kept)
        return tuple((self._known[i], share / whole) for i, share in kept)

    def _responses(self, x: Tensor) -> Tensor:
        """``[K']``: log ‖ΔW x‖² by the leading directions, of x at norm 1."""
        seen = (self._directions @ torch.nn.functional.normalize(x, dim=0)).square()
        found = torch.zeros(len(self._weights)).index_add(0, self._reader, seen)
        return found.clamp_min(1e-30).log()

    def _by_directions(self, x: Tensor) -> Routed:
        if not self._weights:
            return ()
        unlikely = (self._responses(x) - self._usual) / self._spreads
        best = int(unlikely.argmax())
        return ((self._weights[best], 1.0),) if float(unlikely[best]) >= UNLIKELY else ()
