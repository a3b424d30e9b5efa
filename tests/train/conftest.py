"""Stages of the tiny model: rendered items, a context, and what a stage is given."""

from __future__ import annotations

import random

import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.data.render import Branch, Rendered
from lorchestra.events import Silent
from lorchestra.train.settings import LoraSettings, Objective, TrainSettings
from lorchestra.train.stage import StageInputs, train_stage

BASE = BaseId(name="tiny", weights="sha256:tiny")


def sft_items(n, seed=0):
    chance = random.Random(seed)
    out = []
    for _ in range(n):
        prompt = tuple(chance.randrange(4, 260) for _ in range(chance.randrange(3, 9)))
        answer = (*(100 + (t % 7) for t in prompt[:3]), 2)
        out.append(Rendered(prompt, (Branch(answer, (True,) * len(answer)),), 0))
    return out


def pairs(n, seed=0):
    out = []
    for item in sft_items(n, seed):
        good = item.branches[0]
        bad = Branch((*(150 + (t % 7) for t in item.prompt[:3]), 2), good.supervised)
        out.append(Rendered(item.prompt, (good, bad), 0))
    return out


def adapter_for(model, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
            m, n = module.weight.shape
            modules[path] = LowRank(
                torch.randn(m, 2, generator=generator) * scale, torch.randn(2, n, generator=generator) * scale
            )
    return Adapter(modules, BASE)


def inputs(**changes):
    values = {
        "name": "new", "objective": Objective(), "lora": LoraSettings(rank=2, alpha=4),
        "train": TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, checkpoint_every=3),
        "items": sft_items(22), "validation": sft_items(6, seed=1), "context": {},
    }  # fmt: skip
    return StageInputs(**(values | changes))


def run(model, tmp_path, given, name="work", **kwargs):
    return train_stage(model, BASE, 3, given, tmp_path / name, **kwargs)


class KilledError(Exception):
    pass


class KillAfter(Silent):
    """Ends the process's work from inside, at the n-th training step, as a kill would."""

    def __init__(self, steps):
        self.steps = steps

    def event(self, kind, /, **fields):
        if kind == "train_step" and fields["step"] == self.steps:
            raise KilledError
