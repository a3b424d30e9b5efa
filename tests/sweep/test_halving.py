"""Successive halving on trainings that are known in advance, and on real ones."""

from __future__ import annotations

import random

import pytest

from lorchestra.sweep.cells import Cell, cells
from lorchestra.sweep.executors import Here
from lorchestra.sweep.halving import halved
from lorchestra.sweep.outcome import Outcome
from lorchestra.sweep.spec import Halving
from lorchestra.sweep.worker import Work, Worker

HALVING = Halving(first=0.25, reduction=3)  # looks after 3 and 9 of 12 steps


class Known:
    """Trains nothing: a cell's loss at every step is given. Counts the steps that it would have trained.

    Args:
        losses: cell → validation loss at step 3, 6, 9, 12; ``None`` from where it diverged.
        seed: of the order in which outcomes come in.
    """

    def __init__(self, losses, seed=None):
        self.losses, self.seed = losses, seed
        self.reached = {}

    def run(self, pieces):
        pieces = list(pieces)
        if self.seed is not None:
            random.Random(self.seed).shuffle(pieces)
        for piece in pieces:
            yield piece, self.outcome(piece)

    def outcome(self, piece):
        rows = [(0, 9.0)]
        for step, loss in zip((3, 6, 9, 12), self.losses(piece.cell), strict=True):
            self.reached[piece.cell] = max(step, self.reached.get(piece.cell, 0))
            if loss is None:
                return self.made(piece.cell, "diverged", step, rows)
            rows.append((step, loss))
            if piece.pause is not None and step >= piece.pause * 12 and step < 12:
                return self.made(piece.cell, "stopped", step, rows[-1:])
        return self.made(piece.cell, "done", 12, rows)

    def made(self, cell, state, step, rows):
        return Outcome(cell.settings, cell.seed, cell.fold, state, step, 12, validation=tuple(rows))


def grid(ranks=range(1, 10), seeds=(0,), **others):
    return [
        Cell({"lora.rank": rank, **dict(zip(others, values, strict=True))}, seed)
        for seed in seeds
        for rank in ranks
        for values in (zip(*others.values(), strict=True) if others else [()])
    ]


def steady(cell):
    """The higher the rank, the higher the loss, at all steps."""
    return [cell.settings["lora.rank"] - step / 100 for step in range(4)]


def states(found):
    return {cell.name: (outcome.state, outcome.step) for cell, outcome in found}


def work(cells):
    return [Work(cell) for cell in cells]


def test_without_halving_all_go_to_the_end():
    found = list(halved(work(grid()), None, Known(steady)))
    assert {outcome.state for _, outcome in found} == {"done"}
    assert len(found) == 9


def test_every_cell_is_told_once_and_the_best_goes_on():
    known = Known(steady)
    found = states(halved(work(grid()), HALVING, known))
    assert len(found) == 9
    assert found["rank 1 · seed 0"] == ("done", 12)
    stopped = [name for name, (state, _) in found.items() if state == "stopped"]
    assert len(stopped) >= 4
    spent = sum(known.reached.values())
    assert spent < 9 * 12 * 0.75


@pytest.mark.parametrize("seed", range(5))
def test_one_that_leads_at_every_rung_is_never_stopped(seed):
    chance = random.Random(seed)
    losses = {rank: [chance.uniform(1, 2) for _ in range(4)] for rank in range(1, 12)}
    losses[7] = [0.9, 0.9, 0.9, 0.9]
    cells = grid(range(1, 12))
    found = states(halved(work(cells), HALVING, Known(lambda cell: losses[cell.settings["lora.rank"]])))
    assert found["rank 7 · seed 0"] == ("done", 12)


@pytest.mark.parametrize("seed", range(3))
def test_decisions_do_not_hang_on_the_order_in_which_outcomes_come(seed):
    cells = grid(range(1, 15))
    assert states(halved(work(cells), HALVING, Known(steady, seed))) == states(
        halved(work(cells), HALVING, Known(steady))
    )


def test_nor_on_how_far_cells_were_trained_before():
    """Some are done already (cached), some are known to diverge later on: the same outcomes as from the start."""

    def losses(cell):
        rank = cell.settings["lora.rank"]
        return [5.0, None, None, None] if rank == 3 else steady(cell)

    cells = grid(range(1, 15))
    fresh = dict(halved(work(cells), HALVING, Known(losses)))

    class Trained(Known):
        def outcome(self, piece):
            whole = piece.cell.settings["lora.rank"] % 2
            return super().outcome(Work(piece.cell) if whole else piece)

    again = dict(halved(work(cells), HALVING, Trained(losses)))
    assert {cell: outcome.as_dict() for cell, outcome in again.items()} == {
        cell: outcome.as_dict() for cell, outcome in fresh.items()
    }


def test_one_condition_of_the_data_never_stops_another():
    """Noise costs: all noisy cells lose more than the worst clean one, and as many of them go on."""

    def losses(cell):
        return [loss + 100 * cell.settings["data.noise"] for loss in steady(cell)]

    cells = [Cell({"lora.rank": rank, "data.noise": noise}, 0) for rank in range(1, 10) for noise in (0.0, 0.4)]
    done = [cell for cell, outcome in halved(work(cells), HALVING, Known(losses)) if outcome.state == "done"]
    assert {cell.settings["data.noise"] for cell in done if cell.settings["lora.rank"] == 1} == {0.0, 0.4}


@pytest.mark.parametrize("other", [{"seed": 1}, {"fold": 1}])
def test_nor_does_another_seed_or_fold(other):
    plain = {"seed": 0, "fold": 0}
    cells = [Cell({"lora.rank": 1}, **plain), Cell({"lora.rank": 2}, **{**plain, **other})]
    assert {outcome.state for _, outcome in halved(work(cells), HALVING, Known(steady))} == {"done"}


def test_nor_what_is_kept_apart():
    cells = grid(range(1, 6))
    found = halved(work(cells), HALVING, Known(steady), apart=["lora.rank"])
    assert {outcome.state for _, outcome in found} == {"done"}


def test_what_diverged_is_told_and_stops_nobody():
    found = dict(halved(work(grid(range(1, 4))), HALVING, Known(lambda cell: [None] * 4)))
    assert {outcome.state for outcome in found.values()} == {"diverged"}


def test_losses_that_are_no_numbers_end_there():
    found = states(halved(work(grid(range(1, 4))), HALVING, Known(lambda cell: [float("nan")] * 4)))
    assert {state for state, _ in found.values()} == {"stopped"}


@pytest.mark.slow
def test_what_went_on_after_a_pause_is_what_went_through(make_spec, tmp_path, monkeypatch):
    spec = make_spec(axes={"lora.rank": [1, 2, 3], "train.learning_rate": [1e-4, 1e-2]}, halving={"first": 0.5})
    paused = dict(halved(work(cells(spec)), spec.halving, Here(Worker(spec))))
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "elsewhere"))
    whole = dict(halved(work(cells(spec)), None, Here(Worker(spec))))
    assert {outcome.state for outcome in paused.values()} == {"done", "stopped"}
    for cell, outcome in paused.items():
        if outcome.state == "done":
            assert (outcome.adapter, outcome.test, outcome.validation) == (
                whole[cell].adapter, whole[cell].test, whole[cell].validation,
            )  # fmt: skip
        else:
            assert outcome.validation[0] in whole[cell].validation
