"""Checkpoints: whole or not there, the newest one wins, everything that training depends on comes back bit for bit."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch

from lorchestra.bank import TrainableMember
from lorchestra.errors import StorageError
from lorchestra.train.checkpoint import Checkpoints, Progress


class Training:
    """A member, its optimiser and schedule, prepared by accelerate, trained on noise with dropout."""

    def __init__(self, directory):
        from accelerate import Accelerator
        from transformers import get_scheduler

        generator = torch.Generator().manual_seed(0)
        pair = (torch.zeros(6, 2), torch.randn(2, 5, generator=generator))
        self.member = TrainableMember({"module": pair}, 2.0, 0.5)
        self.accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(self.member.parameters(), lr=0.1)
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
        _, self.optimizer, self.scheduler = self.accelerator.prepare(self.member, optimizer, scheduler)
        self.checkpoints = Checkpoints(directory)

    def steps(self, count):
        """Losses and learning rates: they depend on the factors, the optimiser's state and torch's random numbers."""
        told = []
        for _ in range(count):
            x = torch.nn.functional.dropout(torch.randn(4, 5), 0.5)
            loss = ((x @ self.member.A[0].T @ self.member.B[0].T - 1) ** 2).mean()
            loss.backward()
            told.append((float(loss.detach()), self.scheduler.get_last_lr()[0], random.random()))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return told

    def factors(self):
        return {key: value.clone() for key, value in self.member.state_dict().items()}


def progress_at(step):
    return Progress(
        step=step, history=[{"step": 1, "loss": 0.1}], validation=[{"step": 0, "loss": 1 / 3}], best_loss=1 / 3,
        best_step=2, waited=1, stopped=False, tokens=123, seconds=4.5,
    )  # fmt: skip


@pytest.fixture
def scratch(tmp_path):
    return tmp_path / "scratch"


def test_a_fresh_start(scratch):
    training = Training(scratch)
    before = training.factors()
    assert training.checkpoints.restore(training.accelerator) == Progress()
    assert all(torch.equal(before[key], value) for key, value in training.factors().items())


def test_training_goes_on_bit_for_bit(scratch):
    torch.manual_seed(3)
    random.seed(3)
    first = Training(scratch)
    first.steps(4)
    first.checkpoints.save(first.accelerator, progress_at(4))
    expected, factors = first.steps(3), first.factors()

    torch.manual_seed(99)
    random.seed(99)
    second = Training(scratch)
    second.steps(1)  # whatever it did before
    assert second.checkpoints.restore(second.accelerator) == progress_at(4)
    assert second.steps(3) == expected
    assert all(torch.equal(factors[key], value) for key, value in second.factors().items())


def test_the_newest_is_kept_and_wins(scratch):
    training = Training(scratch)
    for step in (2, 4, 10, 100):
        training.checkpoints.save(training.accelerator, progress_at(step))
        assert [p.name for p in scratch.iterdir()] == [f"step-{step:08d}"]
    assert training.checkpoints.restore(training.accelerator).step == 100


def test_what_a_kill_left_half_written_is_not_taken_for_a_checkpoint(scratch):
    training = Training(scratch)
    training.checkpoints.save(training.accelerator, progress_at(2))
    shutil.copytree(scratch / "step-00000002", scratch / "step-00000004.partial")
    (scratch / "step-00000004.partial" / "progress.json").unlink()
    assert training.checkpoints.restore(training.accelerator).step == 2
    training.checkpoints.save(training.accelerator, progress_at(4))
    assert [p.name for p in scratch.iterdir()] == ["step-00000004"], "and it is written over"


def test_an_older_one_that_was_half_removed_does_no_harm(scratch):
    training = Training(scratch)
    training.checkpoints.save(training.accelerator, progress_at(4))
    shutil.copytree(scratch / "step-00000004", scratch / "step-00000002")
    shutil.rmtree(scratch / "step-00000002" / "state")
    assert training.checkpoints.restore(training.accelerator).step == 4
    training.checkpoints.save(training.accelerator, progress_at(6))
    assert [p.name for p in scratch.iterdir()] == ["step-00000006"]


def test_the_best_factors(scratch):
    training = Training(scratch)
    kept = {}
    for step in (1, 2, 3):
        training.steps(1)
        kept[step] = training.factors()
        training.checkpoints.save_best(training.member, step)
    training.steps(2)
    training.checkpoints.load_best(training.member, 2)
    assert all(torch.equal(kept[2][key], value) for key, value in training.factors().items())
    training.checkpoints.drop_best(keep=2)
    assert [p.name for p in scratch.iterdir()] == ["best-00000002.safetensors"]
    assert training.checkpoints.restore(training.accelerator) == Progress(), "the best factors are no checkpoint"


def test_a_full_disk_is_said_and_the_checkpoint_before_stands(scratch, mounted):
    scratch.mkdir()
    mounted(scratch, "size=400k")
    training = Training(scratch)
    training.steps(1)
    training.checkpoints.save(training.accelerator, progress_at(2))
    whole = {p.relative_to(scratch): p.read_bytes() for p in scratch.rglob("*") if p.is_file()}
    (scratch / "filler").write_bytes(b"x" * 4096 * (os.statvfs(scratch).f_bavail - 2))
    with pytest.raises((StorageError, OSError)) as caught:
        training.checkpoints.save(training.accelerator, progress_at(4))
    if isinstance(caught.value, StorageError):
        assert "Free some space and run again" in str(caught.value)
    else:
        assert os.strerror(28) in str(caught.value)
    for path, data in whole.items():
        assert (scratch / path).read_bytes() == data
    (scratch / "filler").unlink()
    assert training.checkpoints.restore(training.accelerator).step == 2
    training.checkpoints.save(training.accelerator, progress_at(4))
    assert training.checkpoints.restore(training.accelerator).step == 4
