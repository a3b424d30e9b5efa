"""A gate: a small network that chooses the coefficients of adapters for each prompt."""

from lorchestra.gate.features import FeatureSpec, feature_size, features
from lorchestra.gate.network import AdapterId, Gate, GateSpec, Known, Memory, Nearest
from lorchestra.gate.store import load, save

__all__ = [
    "AdapterId",
    "FeatureSpec",
    "Gate",
    "GateSpec",
    "Known",
    "Memory",
    "Nearest",
    "feature_size",
    "features",
    "load",
    "save",
]
