"""The loop on the tiny model: an exact resume, after a kill and after Ctrl-C, early stopping, accumulation, float16."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.train.conftest import KillAfter, KilledError, adapter_for, inputs, pairs, run, sft_items

from lorchestra.errors import Interrupted, TrainingError, UserError
from lorchestra.events import Silent
from lorchestra.train.loop import Loop, smoothed_loss
from lorchestra.train.settings import ContextMember, LoraSettings, Objective, TrainSettings


@pytest.mark.parametrize("task", ["sft", "dpo"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resume_is_bitwise(tiny_model, tmp_path, task, dropout):
    given = inputs(
        objective=Objective(task=task),
        items=sft_items(22) if task == "sft" else pairs(22),
        validation=sft_items(6, seed=1) if task == "sft" else pairs(6, seed=1),
        lora=LoraSettings(rank=2, alpha=4, dropout=dropout),
        context={"old": (adapter_for(tiny_model, 1), ContextMember(schedule="cosine"))},
    )
    straight = run(tiny_model, tmp_path, given, name="straight")
    for steps in (2, 5, 8):
        with pytest.raises(KilledError):
            run(tiny_model, tmp_path, given, name="killed", reporter=KillAfter(steps))
    resumed = run(tiny_model, tmp_path, given, name="killed")
    assert resumed.adapter.digest == straight.adapter.digest
    assert resumed.progress.history == straight.progress.history
    assert resumed.progress.validation == straight.progress.validation


def steep(**train):
    """The first loss is ln 2, its gradients are beyond float16."""
    objective = Objective(task="dpo", beta=1e7)
    settings = TrainSettings(batch_size=4, learning_rate=1e-9, **train)
    return inputs(objective=objective, items=pairs(22), validation=[], train=settings)


def test_infinite_gradients_without_a_scaler_stop_the_stage(tmp_path):
    """On a CPU accelerate has no scaler for float16: nothing would skip the step, and the factors would be lost."""
    with pytest.raises(TrainingError, match=r"loss 0\.69.*Training diverged"):
        run(make_tiny_model().to(torch.float16), tmp_path, steep(max_steps=2))


def test_a_scaler_finds_its_scale_and_leaves_no_infinity_in_the_history(tmp_path, monkeypatch):
    """What a GPU does in float16, with torch's scaler for CPUs: overflowing steps are skipped and have no norm."""
    from accelerate import Accelerator

    prepare = Accelerator.prepare

    def with_scaler(self, *args, **kwargs):
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**24), True
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "prepare", with_scaler)
    train = TrainSettings(max_steps=24, batch_size=4, learning_rate=1e-3)
    result = run(make_tiny_model().to(torch.float16), tmp_path, inputs(train=train))
    norms = [row["gradient_norm"] for row in result.progress.history]
    assert norms[0] is None
    assert norms[-1] is not None
    assert json.dumps(result.progress.history, allow_nan=False)
    assert all(torch.isfinite(update.B).all() for update in result.adapter.modules.values())


def test_accumulation_equals_a_larger_batch(tiny_model, tmp_path):
    """The token mean runs over the whole step, whatever its micro-batches."""
    common = {"max_steps": 1, "learning_rate": 1e-3}
    whole = run(tiny_model, tmp_path, inputs(train=TrainSettings(batch_size=22, **common)), name="whole")
    parts = run(
        tiny_model, tmp_path, inputs(train=TrainSettings(batch_size=4, gradient_accumulation=6, **common)), name="parts"
    )
    assert parts.progress.history[0]["loss"] == pytest.approx(whole.progress.history[0]["loss"], rel=1e-5)
    assert parts.progress.history[0]["gradient_norm"] == pytest.approx(
        whole.progress.history[0]["gradient_norm"], rel=1e-4
    )


def test_early_stopping_keeps_the_best(tiny_model, tmp_path):
    train = TrainSettings(max_steps=40, batch_size=4, learning_rate=0.5, eval_every=1, patience=3, max_grad_norm=0)
    result = run(tiny_model, tmp_path, inputs(train=train))
    assert result.progress.stopped
    assert result.progress.step < 40
    assert result.progress.step - result.progress.best_step == 3


def test_gradient_checkpointing_changes_nothing(tiny_model, tmp_path):
    plain = run(tiny_model, tmp_path, inputs(), name="plain")
    saving = TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, gradient_checkpointing=True)
    saved = run(tiny_model, tmp_path, inputs(train=saving), name="saved")
    assert saved.progress.history[-1]["loss"] == pytest.approx(plain.progress.history[-1]["loss"], rel=1e-4)
    assert not any(m.training for m in tiny_model.modules())


def test_tensorboard_hears_of_every_step_validation_and_weight(tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = TrainSettings(max_steps=4, batch_size=4, eval_every=2, report_to=("tensorboard",))
    context = {"old": (adapter_for(tiny_model, 1), ContextMember(schedule="linear", to=0.5))}
    progress = run(tiny_model, tmp_path, inputs(train=train, context=context), log_directory=tmp_path / "logs").progress
    heard = {}
    for file in (tmp_path / "logs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            heard[tag] = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]
    for key in ("loss", "learning_rate", "gradient_norm"):
        assert [(row["step"], row[key]) for row in progress.history] == heard[key]
    assert [(row["step"], row["loss"]) for row in progress.validation] == heard["validation_loss"]
    assert [step for step, _ in heard["validation_loss"]] == [0, 2, 4]
    assert [(row["step"], row["context"]["old"]) for row in progress.history] == heard["context/old"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_wandb_and_mlflow_hear_the_same(tiny_model, tmp_path, monkeypatch, name):
    """Accelerate's own trackers, with a stand-in for the packages that they call."""
    import accelerate.tracking

    told = MagicMock()
    told.search_experiments.return_value = []
    told.utils.validation = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    monkeypatch.setitem(sys.modules, name, told)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.tracking.LoggerType(name)])
    train = TrainSettings(max_steps=2, batch_size=4, eval_every=1, report_to=(name,))
    given = replace(inputs(train=train), name="clinic")
    progress = run(tiny_model, tmp_path, given, log_directory=tmp_path / "logs").progress
    wandb = name == "wandb"
    if wandb:
        told.init.assert_called_once_with(project="lorchestra", name="clinic", dir=str(tmp_path / "logs"))
    else:
        assert [call.kwargs["run_name"] for call in told.start_run.call_args_list] == ["clinic"]
    calls = (told.init.return_value.log if wandb else told.log_metrics).call_args_list
    heard = {(key, call.kwargs["step"]): value for call in calls for key, value in call.args[0].items()}
    for key in ("loss", "learning_rate", "gradient_norm"):
        assert [heard[key, row["step"]] for row in progress.history] == [row[key] for row in progress.history]
    assert [heard["validation_loss", step] for step in (0, 1, 2)] == [row["loss"] for row in progress.validation]
    (told.init.return_value.finish if wandb else told.end_run).assert_called_once()


def test_a_tracker_that_will_not_start_is_told_in_a_sentence(tiny_model, tmp_path, monkeypatch):
    """As MLflow does with a store it has given up, and W&B without a login."""
    from accelerate.tracking import TensorBoardTracker

    def refuse(self):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(TensorBoardTracker, "start", refuse)
    train = TrainSettings(max_steps=1, report_to=("tensorboard",))
    with pytest.raises(UserError, match=r"report_to: tensorboard cannot be started: not logged in\nMend this"):
        run(tiny_model, tmp_path, inputs(train=train), log_directory=tmp_path / "logs")


def pressing(monkeypatch, at, times=1):
    """Ctrl-C, for real, in optimiser step ``at`` (from 0), ``times`` times."""
    plain, seen = Loop._step, []

    def step(self, number):
        row = plain(self, number)
        if number == at and not seen:
            seen.append(number)
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return row

    monkeypatch.setattr(Loop, "_step", step)


class Watching(Silent):
    """Hears what is said, and presses Ctrl-C in the ``at``-th validation (from 1), if asked to."""

    def __init__(self, at=None):
        self.said, self.at, self.seen = [], at, 0

    def say(self, text):
        self.said.append(text)

    def task(self, name, total=None, unit="it"):
        if name == "validation":
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGINT)
        return super().task(name, total, unit)


def interruptible(model, task="sft"):
    return inputs(
        objective=Objective(task=task),
        items=sft_items(22) if task == "sft" else pairs(22),
        validation=sft_items(6, seed=1) if task == "sft" else pairs(6, seed=1),
        lora=LoraSettings(rank=2, alpha=4, dropout=0.2),
        context={"old": (adapter_for(model, 1), ContextMember(schedule="cosine"))},
        train=TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, checkpoint_every=100),
    )


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_ctrl_c_in_a_step_finishes_and_keeps_it(tiny_model, tmp_path, monkeypatch, task):
    given = interruptible(tiny_model, task)
    straight = run(tiny_model, tmp_path, given, name="straight")
    watching = Watching()
    with monkeypatch.context() as patch:
        pressing(patch, at=3)
        with pytest.raises(Interrupted, match="4 of 12 steps of new are kept, and the same command goes on from there"):
            run(tiny_model, tmp_path, given, name="stopped", reporter=watching)
    assert watching.said == ["stopping after this step; Ctrl-C again stops at once"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = run(tiny_model, tmp_path, given, name="stopped", reporter=watching)
    assert watching.said[-1] == "new: resumed after step 4 of 12"
    assert resumed.adapter.digest == straight.adapter.digest
    assert resumed.progress.history == straight.progress.history
    assert resumed.progress.validation == straight.progress.validation


@pytest.mark.parametrize(("nth", "kept"), [(2, 6), (3, 12)])
def test_ctrl_c_in_a_validation_keeps_the_step_before_it(tiny_model, tmp_path, nth, kept):
    given = interruptible(tiny_model)
    straight = run(tiny_model, tmp_path, given, name="straight")
    with pytest.raises(Interrupted, match=f"{kept} of 12 steps"):
        run(tiny_model, tmp_path, given, name="stopped", reporter=Watching(at=nth))
    resumed = run(tiny_model, tmp_path, given, name="stopped")
    assert resumed.adapter.digest == straight.adapter.digest
    assert resumed.progress.validation == straight.progress.validation, (
        "the validation it was stopped in is made up for"
    )


def test_ctrl_c_before_the_first_step(tiny_model, tmp_path):
    given = interruptible(tiny_model)
    with pytest.raises(Interrupted, match="stopped before the first step of new was done"):
        run(tiny_model, tmp_path, given, reporter=Watching(at=1))
    assert not list((tmp_path / "work").glob("step-*"))


def test_ctrl_c_twice_does_not_wait_and_goes_on_from_the_checkpoint_before(tiny_model, tmp_path, monkeypatch):
    given = interruptible(tiny_model)
    given = replace(given, train=given.train.model_copy(update={"checkpoint_every": 2}))
    straight = run(tiny_model, tmp_path, given, name="straight")
    with monkeypatch.context() as patch:
        pressing(patch, at=4, times=2)
        with pytest.raises(Interrupted, match="4 of 12 steps"):
            run(tiny_model, tmp_path, given, name="stopped")
    assert run(tiny_model, tmp_path, given, name="stopped").adapter.digest == straight.adapter.digest


def test_the_training_loss_that_is_shown_is_a_mean_of_the_last_steps():
    history = [{"loss": float(loss)} for loss in range(50)]
    assert smoothed_loss(history[:1]) == 0
    assert smoothed_loss(history[:4]) == 1.5
    assert smoothed_loss(history) == sum(range(30, 50)) / 20
