"""What several domains are to become together: one number to search by, a limit that no domain may cross, and the
candidates that no other beats everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ratios = Mapping[str, float]  # domain → its loss over the base's: 1 at the base, lower is better


@dataclass(frozen=True)
class Goal:
    """How the domains' losses make one number; every kind is a weighted sum with the weights of :meth:`shares`.

    Args:
        kind: ``mean`` over the domains, ``weighted`` mean, or the ``worst`` of them.
        weights: of ``weighted``: domain → how much it counts (not negative); a domain that is not named does not.
        tolerance: no domain may fall more than this below the best single adapter there (0.02: two per cent of the
            base's loss); ``None`` for no limit.

    Raises:
        ValueError: weights that are negative, not finite, all zero, or given to another kind; a negative tolerance.
    """

    kind: Literal["mean", "weighted", "worst"] = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if (self.kind == "weighted") != bool(self.weights):
            raise ValueError(f"weights belong to a weighted goal, and it needs them; got {self.kind}, {self.weights}")
        if any(not math.isfinite(weight) or weight < 0 for weight in self.weights.values()):
            raise ValueError(f"a domain counts 0 or more in a goal; got {dict(self.weights)}")
        if self.weights and not any(self.weights.values()):
            raise ValueError(f"one domain at least must count in a goal; got {dict(self.weights)}")
        if self.tolerance is not None and not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"a tolerance is 0 or more; got {self.tolerance}")

    def value(self, ratios: Ratios) -> float:
        """The number to make small; 1 at the base."""
        return float(self.combined({name: np.asarray(ratio, dtype=np.float64) for name, ratio in ratios.items()}))

    def combined(self, ratios: Mapping[str, Array]) -> Array:
        """:meth:`value` of arrays, element by element (candidates, resamples …).

        Raises:
            ValueError: no domain that counts.
        """
        if not ratios:
            raise ValueError("a goal needs at least one domain")
        stacked = np.stack(list(ratios.values()))
        if self.kind == "worst":
            return np.asarray(stacked.max(axis=0))
        return np.asarray(np.tensordot(self._counts(list(ratios)), stacked, axes=1))

    def shares(self, ratios: Ratios) -> dict[str, float]:
        """domain → ∂value/∂ratio; Σ share·ratio is the value itself. Of ``worst`` a subgradient: the (first) worst
        domain has it all."""
        found = self.slopes({name: np.asarray(ratio, dtype=np.float64) for name, ratio in ratios.items()})
        return {name: float(share) for name, share in found.items()}

    def slopes(self, ratios: Mapping[str, Array]) -> dict[str, Array]:
        """:meth:`shares` of arrays, element by element."""
        stacked = np.stack(list(ratios.values()))
        if self.kind == "worst":
            worst = stacked.argmax(axis=0)
            return {name: (worst == d).astype(np.float64) for d, name in enumerate(ratios)}
        counts = self._counts(list(ratios))
        return {name: np.full(stacked.shape[1:], count) for name, count in zip(ratios, counts, strict=True)}

    def counts_in(self, domains: Iterable[str]) -> bool:
        """Whether one of ``domains`` counts at all."""
        return self.kind != "weighted" or any(self.weights.get(name, 0.0) > 0 for name in domains)

    def excess(self, ratios: Ratios, singles: Sequence[Ratios]) -> float:
        """By how much the domain that is worst off crosses the limit; 0 where all keep it.

        Args:
            ratios: of a candidate.
            singles: of every single adapter; the best of them in each domain is what is measured against.
        """
        if self.tolerance is None or not singles:
            return 0.0
        over = (ratio - min(single[name] for single in singles) for name, ratio in ratios.items())
        return max(0.0, max(over) - self.tolerance)

    def __str__(self) -> str:
        if self.kind == "weighted":
            shares = ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items())
            said = f"the weighted mean over domains ({shares})"
        else:
            said = {"mean": "the mean over domains", "worst": "the worst domain"}[self.kind]
        limit = f", no domain more than {self.tolerance:g} above the best single adapter" if self.tolerance else ""
        if self.tolerance == 0:
            limit = ", no domain above the best single adapter"
        return f"{said} of loss / base loss{limit}"

    def _counts(self, names: Sequence[str]) -> Array:
        counts = np.array([self.weights.get(name, 0.0) if self.weights else 1.0 for name in names])
        if not counts.sum() > 0:
            raise ValueError(
                f"none of the domains {', '.join(names)} counts in the goal ({', '.join(self.weights)}); "
                "give one of them a weight"
            )
        return np.asarray(counts / counts.sum())


def undominated(rows: Sequence[Ratios]) -> list[bool]:
    """Which of the candidates no other one beats: at least as good in every domain, and better in one (Pareto)."""
    if not rows:
        return []
    table = np.array([[row[name] for name in rows[0]] for row in rows])  # [candidates, domains]
    no_worse = (table[:, None] <= table[None]).all(axis=2)  # [i, j]: i is no worse than j anywhere
    better = (table[:, None] < table[None]).any(axis=2)
    beaten: list[bool] = np.any(no_worse & better, axis=0).tolist()
    return [not lost for lost in beaten]
