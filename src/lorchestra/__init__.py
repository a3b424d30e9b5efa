"""From a few hundred examples to your own language model: staged LoRA, exact fusion, honest verdicts.

What is named here is imported when it is first used, so that ``import lorchestra`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.lowrank import LowRank
    from lorchestra.bank import Bank
    from lorchestra.fusion.methods import compress, fuse
    from lorchestra.fusion.stream import merge
    from lorchestra.gate import Gate
    from lorchestra.pipeline.execute import run
    from lorchestra.recipe.recipe import Recipe
    from lorchestra.train.peft_model import LoraConfig, get_peft_model

    __version__: str

__all__ = [
    "Adapter",
    "Bank",
    "Gate",
    "LoraConfig",
    "LowRank",
    "Recipe",
    "__version__",
    "compress",
    "fuse",
    "get_peft_model",
    "merge",
    "run",
]

_HOMES = {
    "Adapter": "lorchestra.adapter.adapter",
    "Bank": "lorchestra.bank",
    "Gate": "lorchestra.gate",
    "LoraConfig": "lorchestra.train.peft_model",
    "LowRank": "lorchestra.adapter.lowrank",
    "Recipe": "lorchestra.recipe.recipe",
    "compress": "lorchestra.fusion.methods",
    "fuse": "lorchestra.fusion.methods",
    "get_peft_model": "lorchestra.train.peft_model",
    "merge": "lorchestra.fusion.stream",
    "run": "lorchestra.pipeline.execute",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lorchestra")
    if name not in _HOMES:
        raise AttributeError(f"module 'lorchestra' has no attribute {name!r}; it has {', '.join(__all__)}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
