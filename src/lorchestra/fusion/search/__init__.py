"""Choosing coefficients on λ-validation: a search that only calls back, and never loads a model."""

from lorchestra.fusion.search.candidates import (
    HEURISTICS,
    Candidate,
    Weights,
    candidates,
    context_warnings,
    fixed_points,
    heuristic,
    stack_of,
    weights_key,
)
from lorchestra.fusion.search.driver import SearchResult, passes_of, search
from lorchestra.fusion.search.problem import Objective, Space
from lorchestra.fusion.search.strategies import DEFAULT, STRATEGIES, Strategy

__all__ = [
    "DEFAULT",
    "HEURISTICS",
    "STRATEGIES",
    "Candidate",
    "Objective",
    "SearchResult",
    "Space",
    "Strategy",
    "Weights",
    "candidates",
    "context_warnings",
    "fixed_points",
    "heuristic",
    "passes_of",
    "search",
    "stack_of",
    "weights_key",
]
