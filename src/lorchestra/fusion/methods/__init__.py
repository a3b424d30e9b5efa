"""Several adapters into one: every method a pure function, listed in :mod:`lorchestra.fusion.methods.table`.

The names here are imported when they are first used: the table alone costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorchestra.fusion.methods.apply import apply
    from lorchestra.fusion.methods.elementwise import dare, dare_ties, magnitude, ties
    from lorchestra.fusion.methods.exact import average, common_base, fuse, linear, subtract
    from lorchestra.fusion.methods.low_rank import Fused, compress, knots, svd
    from lorchestra.fusion.methods.table import METHODS

__all__ = [
    "METHODS",
    "Fused",
    "apply",
    "average",
    "common_base",
    "compress",
    "dare",
    "dare_ties",
    "fuse",
    "knots",
    "linear",
    "magnitude",
    "subtract",
    "svd",
    "ties",
]

_HOMES = {
    "apply": ("apply",),
    "elementwise": ("dare", "dare_ties", "magnitude", "ties"),
    "exact": ("average", "common_base", "fuse", "linear", "subtract"),
    "low_rank": ("Fused", "compress", "knots", "svd"),
    "table": ("METHODS",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
