"""A gate: a small network that chooses the coefficients of adapters for each prompt."""

from lorchestra.gate.features import FeatureSpec
from lorchestra.gate.measure import GateExample
from lorchestra.gate.network import Gate, GateSpec
from lorchestra.gate.settings import FitSettings
from lorchestra.gate.store import load, save

__all__ = ["FeatureSpec", "FitSettings", "Gate", "GateExample", "GateSpec", "load", "save"]
