"""One cell after the other: the same training as a run's, judged once, settled from its own examples."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.sweep.conftest import write_colours

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import UserError
from lorchestra.evaluate.ledger import Ledger
from lorchestra.pipeline.execute import run
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.suggestions import suggest_learning_rate, suggest_rank
from lorchestra.sweep.cells import Cell, cells, recipe_of
from lorchestra.sweep.spec import SweepSpec
from lorchestra.sweep.worker import Work, Worker


def entries():
    path = Ledger.here().path
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def steps(worker, kind):
    return [path for path in worker.cache.root.glob(f"{kind}-*") if path.is_dir() and path.suffix != ".work"]


@pytest.mark.slow
def test_a_cell_is_the_stage_that_a_run_trains(make_spec, recipe, tmp_path, monkeypatch):
    """With a context, which the sweep trains too."""
    text = (
        recipe.read_text(encoding="utf-8")
        + "    context: {earlier: 1.0}\nfusion: {weights: last}\ndeliver: {merged: false}\n"
    )
    recipe.write_text(text + "evaluate: {test_limit: 2, samples: 0}\n", encoding="utf-8")
    cell = Cell({"lora.rank": 3, "lora.scaling": "constant"}, 0)
    found = Worker(make_spec()).work(Work(cell))
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "elsewhere"))
    loaded = Recipe.load(recipe, ["stages.colours.lora.rank=3", "stages.colours.lora.scaling=constant"])
    ended = run(loaded, directory=tmp_path / "run")
    assert ended.digests["colours"] == found.adapter


def test_the_parameters_are_counted_before_training(make_spec):
    worker = Worker(make_spec())
    whole = worker.work(Work(Cell({"lora.rank": 3}, 0)))
    paused = worker.work(Work(Cell({"lora.rank": 3, "lora.scaling": "lora"}, 0), pause=0.5))
    assert (whole.state, paused.state) == ("done", "stopped")
    assert whole.trainable == paused.trainable
    assert paused.step == 2


def test_seeds_are_seeds_of_the_training_and_not_of_the_split(make_spec):
    worker = Worker(make_spec())
    first, second = (worker.work(Work(Cell({"lora.rank": 2}, seed))) for seed in (0, 1))
    assert first.adapter != second.adapter
    assert first.test.groups == second.test.groups
    assert first.examples == second.examples
    assert (first.examples["validation"], first.examples["test"]) == (6, 6), "eval_limit and test_limit: what is used"


def test_what_is_finished_is_not_done_again_and_its_adapter_is_not_kept(make_spec):
    worker = Worker(make_spec())
    (cell,) = cells(make_spec())
    found = worker.work(Work(cell))
    assert steps(worker, "stage") == []
    assert len(entries()) == 1
    assert Worker(make_spec()).work(Work(cell)) == found
    assert len(entries()) == 1, "the test was read once"
    assert worker.readings(cell) == 1


def test_adapters_are_kept_where_that_is_asked(make_spec):
    (cell,) = cells(make_spec())
    Worker(make_spec()).work(Work(cell))
    keeping = Worker(make_spec(keep_adapters=True))
    found = keeping.work(Work(cell))
    (directory,) = steps(keeping, "stage")
    assert Adapter.load(directory / "adapter").digest == found.adapter


def test_a_training_of_somebody_else_is_used_and_left_alone(make_spec):
    (cell,) = cells(make_spec())
    keeping = Worker(make_spec(keep_adapters=True))
    keeping.work(Work(cell))
    other = Worker(make_spec(test_limit=3))
    assert other.work(Work(cell)).test is not None
    assert len(steps(other, "stage")) == 1


def test_what_is_tried_does_not_read_the_test_and_is_kept_until_it_is_chosen_or_not(make_spec):
    worker = Worker(make_spec())
    tried = [worker.work(Work(Cell({"lora.rank": rank}, 0), judged=False)) for rank in (2, 3)]
    assert [outcome.test for outcome in tried] == [None, None]
    assert entries() == []
    assert len(steps(worker, "stage")) == 2
    worker.forget(tried[1])
    judged = worker.work(Work(Cell({"lora.rank": 2}, 0)))
    assert judged.test is not None
    assert replace(judged, test=None) == tried[0]
    assert steps(worker, "stage") == []
    assert worker.work(Work(Cell({"lora.rank": 2}, 0), judged=False)).adapter == judged.adapter, "found judged"


@pytest.mark.parametrize("rate", [1e30, 1e6])
def test_a_training_that_blows_up_is_an_outcome(make_spec, rate):
    worker = Worker(make_spec())
    cell = Cell({"lora.rank": 2, "train.learning_rate": rate}, 0)
    found = worker.work(Work(cell))
    assert found.worse_than_untrained
    if rate == 1e30:
        assert (found.state, found.steps, found.test) == ("diverged", 4, None)
        assert 0 < found.step <= 4
        assert found.validation[0][0] == 0
        assert worker.work(Work(cell)) == found
        assert found.trainable > 0


def checkpoints(worker):
    return sorted(path.parent.parent.name for path in worker.cache.root.glob("*.work/scratch/step-*"))


def test_of_a_training_that_blew_up_no_checkpoint_is_left(make_spec):
    settings = {"train.learning_rate": 1e30, "train.max_grad_norm": 0, "train.scheduler": "constant"}
    spec = make_spec(set={"train.max_steps": 12, **settings})
    worker = Worker(spec)
    (cell,) = cells(spec)
    found = worker.work(Work(cell))
    assert found.state == "diverged"
    assert found.step > 1, "there was a checkpoint"
    assert checkpoints(worker) == []
    assert not list(worker.cache.root.glob("*.work"))
    assert worker.work(Work(cell)) == found


def test_a_training_that_was_stopped_goes_on_until_it_is_forgotten(make_spec):
    worker = Worker(make_spec())
    cell = Cell({"lora.rank": 2}, 0)
    paused = worker.work(Work(cell, pause=0.5))
    assert len(checkpoints(worker)) == 1
    again = Worker(make_spec())
    again.trainer.train = None
    assert again.work(Work(cell, pause=0.5)) == paused, "nothing was trained for it"
    worker.forget(paused)
    assert checkpoints(worker) == []
    assert not list(worker.cache.root.glob("*.work"))
    assert again.work(Work(cell, pause=0.5)) == paused, "it is known what it came to"
    del again.trainer.train
    whole = again.work(Work(cell))
    assert (whole.state, paused.validation[0] in whole.validation) == ("done", True)


def test_checkpoints_of_a_run_are_left_to_it(make_spec, recipe, tmp_path, monkeypatch):
    from lorchestra.train.loop import Loop

    step = Loop._step

    def stop(self, number):
        if self.name == "colours" and number == 1:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(Recipe.load(recipe), directory=tmp_path / "run")
    worker = Worker(make_spec())
    (begun,) = checkpoints(worker)
    cell = Cell({"lora.rank": 2}, 0)
    paused = worker.work(Work(cell, pause=0.5))
    assert paused.digest.startswith(begun.removeprefix("stage-").removesuffix(".work")), "it is the same training"
    worker.forget(paused)
    assert checkpoints(worker) == [begun]


def test_checkpoints_that_another_process_is_at_are_left(make_spec):
    from filelock import FileLock

    worker = Worker(make_spec())
    paused = worker.work(Work(Cell({"lora.rank": 2}, 0), pause=0.5))
    (begun,) = checkpoints(worker)
    with FileLock(worker.cache.root / begun.replace(".work", ".lock")):
        worker.forget(paused)
        assert checkpoints(worker) == [begun]
    worker.forget(paused)
    assert checkpoints(worker) == []


@pytest.mark.slow
def test_what_a_recipe_leaves_open_is_settled_from_the_cells_own_examples(tmp_path, tiny_dir):
    path = write_colours(tmp_path, tiny_dir, 1000)
    text = path.read_text(encoding="utf-8").replace("lora: {rank: 2, alpha: 4, dropout: 0}\n", "")
    path.write_text(text.replace(", learning_rate: 0.01", ""), encoding="utf-8")
    plain = {"recipe": "recipe.yaml", "name": "s", "axes": {"data.size": [100, 520]}, "seeds": 1, "test_limit": 2}
    spec = SweepSpec.from_dict(plain, tmp_path)
    worker = Worker(spec)
    small, large = (worker.work(Work(cell)) for cell in cells(spec))
    for n, found in ((100, small), (520, large)):
        assert found.learning_rate == suggest_learning_rate(n, "sft").value
    assert small.learning_rate > large.learning_rate
    fixed = SweepSpec.from_dict({**plain, "set": {"lora.rank": 3, "train.learning_rate": 0.01}}, tmp_path)
    set_small, set_large = (worker_of.work(Work(cell)) for worker_of in [Worker(fixed)] for cell in cells(fixed))
    assert set_small.trainable == set_large.trainable == small.trainable * 3 // suggest_rank(100).value
    assert (set_small.learning_rate, set_large.learning_rate) == (0.01, 0.01)


def test_cells_are_checked_before_the_first_is_trained(make_spec):
    for axes, word in (
        ({"lora.rank": [2], "data.size": [5, 5000]}, "5000"),
        ({"lora.target_modules": [["q_proj"], ["q_prj"]]}, "did you mean 'q_proj'"),
        ({"data.imbalance": [90]}, "imbalance of 90"),
    ):
        spec = make_spec(axes=axes)
        with pytest.raises(UserError, match=word):
            Worker(spec).check(cells(spec))


def test_the_sources_are_told_of_once(make_spec):
    class Said:
        def __init__(self):
            self.lines = []

        def task(self, name, total=None, unit="it"):
            from lorchestra.events import SILENT

            return SILENT.task(name, total, unit)

        def event(self, kind, /, **fields):
            return None

        def say(self, text):
            self.lines.append(text)

    out, inside = Said(), Said()
    spec = make_spec(axes={"max_length": [64, 60], "lora.rank": [1, 2]})
    worker = Worker(spec, None, out, inside)
    for cell in cells(spec):
        worker.work(Work(cell))
    assert sum("colours.jsonl" in line for line in out.lines) == 2, "two stages read it"


def test_a_worker_elsewhere_is_the_same_worker(make_spec):
    spec = make_spec(anchor=True)
    other = Worker(spec, 3).elsewhere()()
    assert (other.spec, other.spec.directory, other.folds) == (spec, spec.directory, 3)
    assert recipe_of(other.spec, cells(spec)[0]).lora_of(recipe_of(spec, cells(spec)[0]).stages[-1]).rank == 2
