"""What vLLM is given: portable, exact, and the best there is where its slots are too small."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.serve.vllm_world import mixture, one, peft_adapter, served

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError
from lorchestra.serve.engine import Target
from lorchestra.serve.vllm_adapters import Workshop, target_key


@pytest.fixture
def made(tiny_dir, tmp_path):
    """Two adapters by PEFT, ΔW of each from the model that PEFT merged, and a workshop for slots of rank 6."""
    base = make_tiny_model()
    adapters, deltas = [], []
    for name, rank, settings in (("a", 6, {"rslora": True, "alpha": 5}), ("b", 4, {"alpha": 8})):
        merged = peft_adapter(base, tmp_path / name, rank, seed=rank, **settings)
        adapters.append(served(name, tmp_path / name))
        state = base.state_dict()
        deltas.append({p: v.double() - state[p].double() for p, v in merged.state_dict().items()})
    workshop = Workshop(tiny_dir, BaseId("tiny"), tmp_path / "out", 6)
    return workshop, adapters, deltas


def make(workshop, target):
    return workshop._make(target_key(target), target)


def test_a_foreign_rslora_directory_is_written_with_its_scale_folded(made):
    workshop, (a, _), (delta, _) = made
    portable = make(workshop, one(a))
    config = json.loads((portable.directory / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False)
    stored = Adapter.load(portable.directory)
    assert stored.digest == a.digest
    for path, update in stored.modules.items():
        torch.testing.assert_close(update.dense(torch.float64), delta[f"{path}.weight"], atol=2e-5, rtol=0)


def test_a_mixture_over_the_slots_rank_is_the_best_of_that_rank_and_says_what_it_keeps(made, caplog):
    workshop, (a, b), (delta_a, delta_b) = made
    caplog.set_level(logging.INFO, "lorchestra.serve")
    portable = make(workshop, mixture((a, 0.7), (b, -0.3)))
    kept = whole = 0.0
    for path, update in Adapter.load(portable.directory).modules.items():
        U, S, Vh = torch.linalg.svd(0.7 * delta_a[f"{path}.weight"] - 0.3 * delta_b[f"{path}.weight"])
        best = U[:, :6] * S[:6] @ Vh[:6]
        torch.testing.assert_close(update.dense(torch.float64), best, atol=1e-4, rtol=1e-4)
        assert update.rank == 6
        kept, whole = kept + float(S[:6].square().sum()), whole + float(S.square().sum())
    told = re.search(r"rank 10 → 6 keeps ([0-9.]+)", caplog.text)
    assert float(told[1]) == pytest.approx(kept / whole, abs=1e-3)
    assert kept / whole < 0.999


def test_a_mixture_within_the_rank_is_exact(made):
    workshop, (_, b), (_, delta) = made
    portable = make(workshop, mixture((b, -0.25)))
    for path, update in Adapter.load(portable.directory).modules.items():
        torch.testing.assert_close(update.dense(torch.float64), -0.25 * delta[f"{path}.weight"], atol=2e-5, rtol=0)


def test_names_stand_for_weights_and_never_for_others(made):
    _, (a, b), _ = made
    assert target_key(Target("base")) is None
    assert target_key(mixture((a, 0.0))) is None
    assert target_key(one(a)) == target_key(mixture((b, 0.0), (a, 1.0))) == f"a@{a.digest[7:23]}"
    mixed = target_key(mixture((a, 0.5), (b, 0.25)))
    assert mixed == target_key(mixture((b, 0.25), (a, 0.5)))
    others = [mixture((a, 0.25), (b, 0.5)), mixture((a, 0.5), (b, 0.250001)), mixture((a, 0.5)), mixture((a, -0.5))]
    assert len({mixed, *map(target_key, others)}) == 5


def test_two_names_of_the_same_weights_have_directories_of_their_own(made):
    workshop, (a, _), _ = made
    again = served("again", a.directory)
    assert make(workshop, one(a)).directory != make(workshop, one(again)).directory


def test_a_rank_over_the_slots_is_refused_without_a_place_on_this_server(made, tmp_path):
    workshop, (a, _), _ = made
    workshop.max_rank = 5
    with pytest.raises(AdapterError, match="rank 6, vLLM's slots hold 5") as refused:
        make(workshop, one(a))
    assert str(tmp_path) not in str(refused.value)
