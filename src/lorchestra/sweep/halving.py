"""Cells that are hopeless end early: successive halving, decided by optuna."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorchestra.sweep.cells import Cell, condition, setting_key
from lorchestra.sweep.executors import Executor
from lorchestra.sweep.outcome import Outcome
from lorchestra.sweep.spec import Halving

if TYPE_CHECKING:
    import optuna

    from lorchestra.sweep.worker import Work


def halved(
    work: Sequence[Work], halving: Halving | None, executor: Executor[Work, Outcome], apart: Sequence[str] = ()
) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes of the cells in ``work`` as they come in; with ``halving`` those of hopeless ones are ``stopped``.

    Cells are compared that differ in how they are trained alone: noisier or fewer examples are no reason to stop, nor
    is another seed or fold. What ended before a rung, diverged or done, is not compared there. Decisions are made in
    one shuffled order, whatever the order in which the outcomes come, and on losses of the rung alone, however far a
    cell was trained before: a sweep that was stopped decides as if it had not been.

    Args:
        work: of different cells, without pauses.
        halving: rungs and rate; without it all are trained to the end.
        executor: trains.
        apart: keys of settings on which cells are not compared either.
    """
    if halving is None:
        for piece, outcome in executor.run(work):
            yield piece.cell, outcome
        return
    going = list(work)
    random.Random(0).shuffle(going)
    studies: dict[str, optuna.Study] = {}
    trials: dict[int, optuna.Trial] = {}
    for rung, share in enumerate(halving.rungs):
        passed: list[Work] = []
        for piece, outcome in _in_order([replace(piece, pause=share) for piece in going], executor):
            cell, place = piece.cell, _at(outcome, share)
            if place is None:
                yield cell, outcome
                continue
            if id(cell) not in trials:
                common = {**condition(cell.settings), **{key: cell.settings[key] for key in apart}}
                key = f"{setting_key(common)} {cell.seed} {cell.fold}"
                if key not in studies:
                    studies[key] = _study(halving)
                trials[id(cell)] = studies[key].ask()
            trials[id(cell)].report(place[1], step=halving.reduction**rung)
            if trials[id(cell)].should_prune():
                yield cell, _stopped(outcome, place)
            else:
                passed.append(replace(piece, pause=None))
        going = passed
    for piece, outcome in executor.run(going):
        yield piece.cell, outcome


def _in_order(work: Sequence[Work], executor: Executor[Work, Outcome]) -> Iterator[tuple[Work, Outcome]]:
    """What comes in, in the order of ``work``, each piece as soon as all before it are there."""
    waiting: dict[int, Outcome] = {}
    following = 0
    for piece, outcome in executor.run(work):
        waiting[id(piece)] = outcome
        while following < len(work) and id(work[following]) in waiting:
            yield work[following], waiting.pop(id(work[following]))
            following += 1


def _at(outcome: Outcome, share: float) -> tuple[int, float] | None:
    """Step and loss of the validation at which a training pauses for ``share``; ``None`` if it ended before that."""
    last = outcome.step if outcome.state == "stopped" else outcome.step - 1  # after its last step nothing pauses
    rows = (row for row in outcome.validation if row[0] and row[0] >= share * outcome.steps and row[0] <= last)
    return next(rows, None)


def _stopped(outcome: Outcome, place: tuple[int, float]) -> Outcome:
    """As if it had not been trained beyond ``place``."""
    return replace(
        outcome, state="stopped", step=place[0], validation=(place,), history=(), best_step=None, seconds=0.0,
        tokens=0, test=None, adapter="", steps_per_epoch=0,
    )  # fmt: skip


def _study(halving: Halving) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=halving.reduction)
    )
