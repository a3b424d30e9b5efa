"""``Adapter``: the updates of one model's modules, with where they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch

from lorchestra.adapter.digest import adapter_digest
from lorchestra.adapter.lineage import BaseId, Lineage
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, counted


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Module path → :class:`LowRank`, frozen.

    Args:
        modules: full module path in the base (``model.layers.0.self_attn.q_proj``) → its update, float32.
        base: which base it was trained on; empty digests mean unverified.
        lineage: how it was made.
        transposed: paths of modules whose weight is stored ``[in, out]`` (``Conv1D``, embeddings). ΔW here is
            ``[out, in]`` all the same; only what writes weights into a base looks at this.
        embeddings: those of them that look rows up by token: ΔW is ``[width, tokens]``.

    Raises:
        AdapterError: no modules, or NaN or infinity in a factor.
    """

    modules: Mapping[str, LowRank]
    base: BaseId = BaseId()
    lineage: Lineage = Lineage()
    transposed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.modules:
            raise AdapterError("an adapter needs at least one module; this one has none")
        for path, module in self.modules.items():
            if not (_is_finite(module.B) and _is_finite(module.A)):
                raise AdapterError(
                    f"adapter module {path!r} holds NaN or infinity; it was damaged or its training diverged"
                )
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))
        object.__setattr__(self, "embeddings", self.embeddings & self.modules.keys())
        object.__setattr__(self, "transposed", (self.transposed | self.embeddings) & self.modules.keys())

    def __repr__(self) -> str:
        made = self.lineage.name or self.lineage.made_by
        ranks = sorted({module.rank for module in self.modules.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        return (
            f"<Adapter {made}: {counted(len(self.modules), 'module')}, rank {rank}, base {self.base.name or 'unnamed'}>"
        )

    @cached_property
    def digest(self) -> str:
        """``sha256:…`` of the folded factors (module path, shape, dtype, bytes)."""
        return adapter_digest(self.modules)

    @property
    def parameters(self) -> int:
        """Numbers held in all factors."""
        return sum(m.parameters for m in self.modules.values())

    def norm(self) -> float:
        """‖ΔW‖ over all modules together (Frobenius)."""
        return math.sqrt(sum(m.norm() ** 2 for m in self.modules.values()))

    def __mul__(self, weight: float) -> Adapter:
        """The adapter at coefficient ``weight``; the lineage goes with the caller."""
        return replace(self, modules={p: m * weight for p, m in self.modules.items()}, lineage=Lineage())

    __rmul__ = __mul__

    @classmethod
    def load(cls, directory: str | Path) -> Adapter:
        """Read a PEFT directory (ours or any tool's); see :func:`lorchestra.adapter.peft_format.read_peft`."""
        from lorchestra.adapter.peft_format import read_peft

        return read_peft(Path(directory))

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write a PEFT directory, whole or not at all; see :func:`lorchestra.adapter.peft_format.write_peft`."""
        from lorchestra.adapter.peft_format import write_peft

        return write_peft(self, Path(directory), dtype=dtype)


def _is_finite(factor: torch.Tensor) -> bool:
    # A sum is finite only where all its terms are, and takes a tenth of the time; large terms may still overflow it.
    return math.isfinite(factor.sum().item()) or bool(torch.isfinite(factor).all())
