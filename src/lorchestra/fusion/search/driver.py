"""The search: fixed points first, then a strategy, within a budget."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

from lorchestra.errors import UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.fusion.search.candidates import Candidate
from lorchestra.fusion.search.designs import grid_size
from lorchestra.fusion.search.gradient import refine
from lorchestra.fusion.search.problem import SLOPE, Objective, Problem, Run, Space, Spent
from lorchestra.fusion.search.strategies import BEYOND, DEFAULT, strategy_named

GROUPS_SHARE = 0.4  # of what the fixed points leave, kept for the layer groups


@dataclass(frozen=True)
class SearchResult:
    """All candidates with their scores, in the order tried; the best of them; and how many slopes were taken."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    slopes: int = 0


def budget_of(space: Space, strategy: str, budget: int | None) -> int:
    """Forward passes that a search may take: as asked, or (for the grid) as many as it has points.

    Raises:
        UserError: an unknown strategy, or one that needs more members; a grid larger than the budget.
    """
    row = strategy_named(strategy)
    if len(space.members) < row.least:
        raise UserError(f"{row.name} needs {row.least} members at least; with one, take gradient or surrogate")
    groups = SLOPE * 4 + 1 if space.divided else 0
    return passes_of(row.name, len(space.members), len(space.fixed()), budget, space.step, len(space.totals), groups)


def passes_of(
    strategy: str, members: int, fixed: int, budget: int | None, step: float = 0.1, totals: int = 1, groups: int = 0
) -> int:
    """:func:`budget_of` by numbers alone, as they are known before any adapter is.

    Args:
        strategy: its name.
        members: K.
        fixed: points that are tried whatever the strategy.
        budget: as asked; ``None`` if nothing was.
        step: of the grid.
        totals: Σλ values of the grid.
        groups: passes for layer groups, on top of a grid.
    """
    if strategy != "grid":
        return fixed + BEYOND if budget is None else max(budget, fixed)
    size = grid_size(members, step, totals)
    if budget is not None and budget < size + fixed:
        raise UserError(
            f"the grid has {size} points (and there are {fixed} fixed ones), more than the budget of {budget}; "
            "give a larger budget or step, or another strategy"
        )
    return size + fixed + groups


def search(
    space: Space,
    objective: Objective,
    *,
    strategy: str = DEFAULT,
    budget: int | None = None,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> SearchResult:
    """Try the fixed points, then what ``strategy`` proposes, then (with layer groups) each group's own λ.

    Everything is determined by the seed and the scores: an objective that remembers its answers makes a search
    resumable.

    Args:
        space: members, and the box to search in.
        objective: lower is better.
        strategy: a name of :data:`STRATEGIES`.
        budget: forward passes over λ-validation, a slope counted as :data:`SLOPE`; the fixed points are tried even if
            they are more. ``None``: :data:`BEYOND` more, or the whole grid.
        seed: of what is drawn.
        reporter: progress, with the best score so far.

    Raises:
        UserError: an unknown strategy, a grid beyond the budget, or no finite score anywhere.
    """
    row = strategy_named(strategy)
    passes = budget_of(space, strategy, budget)
    fixed = space.fixed()
    with reporter.task("search weights", passes, "pass") as task:
        run = Run(objective, passes, task, reporter)
        run.scores(fixed)
        if not math.isfinite(run.best.score if run.best.score is not None else math.inf):
            raise UserError("no candidate has a finite score; the adapters or the validation data are damaged")
        kept = round(GROUPS_SHARE * run.left) if space.divided and row.name != "grid" else 0
        run.left -= kept
        with suppress(Spent):  # the usual end
            row.run(Problem(space, run, seed))
        run.left += kept
        if space.divided:
            with suppress(Spent):
                refine(space, run, seed)
        if run.left >= SLOPE:
            reporter.say(f"search weights: {row.name} came to its end; {run.left} of {passes} passes were not needed")
    return SearchResult(tuple(run.tried.values()), run.best, run.slopes)
