"""The methods of fusion: what each is, where it comes from, and the laws that it obeys (and is tested for)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lorchestra.errors import UserError

LAWS = {
    "gauge": "another gauge of a member, (B M, M⁻¹ A), is the same member",
    "order": "the order of the members does not matter",
    "identity": "one member at λ = 1 (at density 1 and full rank, where there are such) is itself",
    "zero": "a member at λ = 0 might as well be absent",
    "negation": "−λ gives −ΔW",
    "linear": "ΔW is linear in λ",
    "unbiased": "over seeds, ΔW is Σλᵢ·ΔWᵢ on average",
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        name: as in ``--method``; also the name of its function.
        summary: one line for people.
        paper: authors, year and address.
        laws: keys of :data:`LAWS`.
        home: the module of its function.
        density: default share of entries that are kept, for a method that thins ΔW out.
        seeded: whether chance is in it.
        parts: whether members may be cut, so that modules have λ of their own.
    """

    name: str
    summary: str
    paper: str
    laws: frozenset[str]
    home: str
    density: float | None = None
    seeded: bool = False
    parts: bool = True

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself, imported when it is asked for."""
        found: Callable[..., Any] = getattr(import_module(f"lorchestra.fusion.methods.{self.home}"), self.name)
        return found


_ALWAYS = frozenset({"gauge", "order", "identity", "zero"})

METHODS = {
    row.name: row
    for row in (
        Method(
            "linear",
            "Σ λ·ΔW, exact",
            "Ilharco et al. 2022, Editing Models with Task Arithmetic, arxiv.org/abs/2212.04089",
            _ALWAYS | {"negation", "linear", "unbiased"},
            "exact",
        ),
        Method(
            "average",
            "Σ λ·ΔW / Σ λ, exact: weights as shares",
            "Wortsman et al. 2022, Model Soups, arxiv.org/abs/2203.05482",
            _ALWAYS,
            "exact",
            parts=False,
        ),
        Method(
            "subtract",
            "the first adapter minus the others, exact: unlearning",
            "Ilharco et al. 2022, Editing Models with Task Arithmetic, arxiv.org/abs/2212.04089",
            frozenset({"gauge", "negation", "linear", "zero"}),
            "exact",
            parts=False,
        ),
        Method(
            "svd",
            "the best approximation of Σ λ·ΔW within --rank, --energy or --budget",
            "Eckart and Young 1936, Approximation by a Matrix of Lower Rank, doi.org/10.1007/BF02288367",
            _ALWAYS | {"negation"},
            "low_rank",
        ),
        Method(
            "ties",
            "trim small entries, elect a sign for each, average those that agree",
            "Yadav et al. 2023, TIES-Merging, arxiv.org/abs/2306.01708",
            _ALWAYS | {"negation"},
            "elementwise",
            density=0.2,
        ),
        Method(
            "dare",
            "drop entries at random, rescale the rest, then sum",
            "Yu et al. 2023, Language Models are Super Mario, arxiv.org/abs/2311.03099",
            _ALWAYS | {"negation", "linear", "unbiased"},
            "elementwise",
            density=0.5,
            seeded=True,
        ),
        Method(
            "dare_ties",
            "drop at random and rescale, then elect signs as ties does",
            "Yu et al. 2023, Language Models are Super Mario, arxiv.org/abs/2311.03099",
            _ALWAYS | {"negation"},
            "elementwise",
            density=0.5,
            seeded=True,
        ),
        Method(
            "magnitude",
            "keep each adapter's largest entries, then sum",
            "Han et al. 2015, Learning both Weights and Connections, arxiv.org/abs/1506.02626",
            _ALWAYS | {"negation", "linear"},
            "elementwise",
            density=0.5,
        ),
        Method(
            "knots",
            "ties in the basis of a joint SVD, from the factors alone",
            "Stoica et al. 2024, Model Merging with SVD to Tie the KnOTS, arxiv.org/abs/2410.19735",
            _ALWAYS | {"negation"},
            "low_rank",
            density=1.0,
        ),
    )
}


def method_named(name: str) -> Method:
    """The row of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"fusion method {name!r} is unknown; there are {', '.join(METHODS)}{hint}")
    return METHODS[name]
