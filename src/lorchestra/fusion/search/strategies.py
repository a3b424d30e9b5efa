"""The strategies, one row each: what it is called, what it does, what it needs, and whose idea it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorchestra.errors import UserError
from lorchestra.fusion.search.designs import grid, heuristics, sobol
from lorchestra.fusion.search.gradient import gradient
from lorchestra.fusion.search.problem import Problem
from lorchestra.fusion.search.sequential import cmaes, tpe
from lorchestra.fusion.search.surrogate import surrogate

DEFAULT = "gradient"
BEYOND = 12  # forward passes over λ-validation beyond the fixed points, where nothing else is said


@dataclass(frozen=True)
class Strategy:
    """One way to spend the budget after the fixed points.

    Args:
        name: as written in recipes and on the command line.
        run: proposes and scores points until it is done or :class:`Spent`.
        needs: ``scores`` (forward passes) or ``slopes`` (a backward pass too).
        about: in a few words.
        source: whose idea.
        least: members it needs.
    """

    name: str
    run: Callable[[Problem], None]
    needs: Literal["scores", "slopes"]
    about: str
    source: str
    least: int = 1


_ROWS = (
    Strategy(
        "gradient", gradient, "slopes", "quasi-Newton through the bank", "Conn et al. 1991, doi 10.1007/BF01594934"
    ),
    Strategy("surrogate", surrogate, "scores", "quadratic response surface", "Box and Wilson 1951"),
    Strategy("tpe", tpe, "scores", "Parzen estimators (optuna)", "Bergstra et al. 2011, NeurIPS 24"),
    Strategy("cmaes", cmaes, "scores", "covariance adaptation (cmaes)", "Hansen 2016, arXiv 1604.00772", least=2),
    Strategy("sobol", sobol, "scores", "spread over total scale × simplex", "Sobol 1967; Owen 1998"),
    Strategy("grid", grid, "scores", "every point of the simplex grid", "Scheffé 1958 (simplex lattice)"),
    Strategy("heuristics", heuristics, "scores", "rules of thumb", "the article that asked for this system"),
)
STRATEGIES = {row.name: row for row in _ROWS}


def strategy_named(name: str) -> Strategy:
    """The row called ``name``.

    Raises:
        UserError: there is none; names the nearest.
    """
    import difflib

    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown search strategy {name!r}; there are {', '.join(STRATEGIES)}{hint}")
    return STRATEGIES[name]
