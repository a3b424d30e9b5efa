"""Cells that are hopeless end early: successive halving, decided by optuna."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorchestra.events import Reporter
from lorchestra.sweep.cells import Cell
from lorchestra.sweep.executors import Executor
from lorchestra.sweep.outcome import Outcome
from lorchestra.sweep.spec import DATA_KEYS, Halving

if TYPE_CHECKING:
    import optuna

    from lorchestra.sweep.worker import Work

TRAINED = ("lora.", "train.")  # settings whose validation losses can be compared: the data are the same


def halved(
    cells: Sequence[Cell], halving: Halving | None, executor: Executor[Work, Outcome], reporter: Reporter
) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes of ``cells`` as they come in; with ``halving`` those of hopeless ones are ``stopped``.

    Cells are compared that differ in how they are trained alone: noisier or fewer examples are no reason to stop. What
    diverged is not compared at all. The order in which cells meet a rung is shuffled, always in the same way.
    """
    if halving is None:
        for (cell, _), outcome in executor.run([(cell, None) for cell in cells]):
            yield cell, outcome
        return
    studies: dict[str, optuna.Study] = {}
    trials: dict[int, optuna.Trial] = {}
    order = list(range(len(cells)))
    random.Random(0).shuffle(order)
    numbers = {id(cells[k]): k for k in order}
    going = [cells[k] for k in order]
    for rung, share in enumerate(halving.rungs, start=1):
        passed: list[Cell] = []
        for (cell, _), outcome in executor.run([(cell, share) for cell in going]):
            if outcome.state != "stopped":  # done already, or diverged
                yield cell, outcome
                continue
            study = studies.setdefault(_condition(cell), _study(halving))
            trial = trials.setdefault(numbers[id(cell)], study.ask())
            if outcome.validation_loss is None:
                passed.append(cell)  # nothing to compare
                continue
            trial.report(outcome.validation_loss, step=halving.reduction ** (rung - 1))
            if trial.should_prune():
                reporter.say(f"{cell.name}: stopped after {outcome.step} of {outcome.steps} steps")
                yield cell, replace(outcome, state="stopped")
            else:
                passed.append(cell)
        going = passed
    for (cell, _), outcome in executor.run([(cell, None) for cell in going]):
        yield cell, outcome


def _study(halving: Halving) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=halving.reduction)
    )


def _condition(cell: Cell) -> str:
    """Everything that cells must have in common to be compared."""
    others = [key for key in cell.settings if key in DATA_KEYS or not key.startswith(TRAINED)]
    return f"{cell.of(sorted(others))} {cell.seed} {cell.fold}"
