"""``fuse``: one adapter for several, exactly or at a rank, and what was kept."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from tests.cli.conftest import dense_logits
from transformers import AutoModelForCausalLM

from lorchestra.adapter.adapter import Adapter

IDS = torch.tensor([[1, 40, 41, 42, 90, 2]])


@pytest.fixture
def two(make_adapter, tmp_path) -> dict[Path, float]:
    return {make_adapter(tmp_path / "a", 1, rank=2): 0.3, make_adapter(tmp_path / "b", 2, rank=3): -0.5}


def dense(members: dict[Path, float]) -> dict[str, torch.Tensor]:
    loaded = [(Adapter.load(directory), weight) for directory, weight in members.items()]
    return {path: sum(w * a.modules[path].dense(torch.float64) for a, w in loaded) for path in loaded[0][0].modules}


def test_the_exact_sum(lorchestra, tiny_dir, two):
    told = lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--json")
    assert told.code == 0, told.err
    summary, fused, expected = json.loads(told.out), Adapter.load("fused"), dense(two)
    assert {update.rank for update in fused.modules.values()} == {5}
    for path, update in fused.modules.items():
        torch.testing.assert_close(update.dense(torch.float64), expected[path], rtol=1e-5, atol=1e-7)
    assert summary["retained"] == 1.0
    assert summary["norm"] == pytest.approx(sum(float(d.square().sum()) for d in expected.values()) ** 0.5)
    assert summary["norms"]["a"] == pytest.approx(
        sum(float(u.dense(torch.float64).square().sum()) for u in Adapter.load("a").modules.values()) ** 0.5
    )
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), "fused").eval()
    with torch.no_grad():
        found = plain(input_ids=IDS).logits.double()
    torch.testing.assert_close(found, dense_logits(tiny_dir, two, IDS), rtol=1e-4, atol=1e-4)


def test_at_a_rank_it_is_the_best_approximation_and_says_what_it_kept(lorchestra, two):
    told = lorchestra("fuse", "a=0.3", "b=-0.5", "-o", "fused", "--rank", 2)
    assert told.code == 0, told.err
    kept, whole = 0.0, 0.0
    fused = Adapter.load("fused")
    for path, matrix in dense(two).items():
        U, S, Vh = torch.linalg.svd(matrix)
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(fused.modules[path].dense(torch.float64), best, rtol=1e-4, atol=1e-6)
        kept, whole = kept + float(S[:2].square().sum()), whole + float(S.square().sum())
    assert 0.4 < kept / whole < 0.99
    assert f"retained energy {kept / whole:.2%} of the exact sum" in told.out


def test_one_adapter_at_one_is_itself(lorchestra, two):
    assert lorchestra("fuse", "a", "-o", "fused").code == 0
    assert Adapter.load("fused").digest == Adapter.load("a").digest


def test_wrong_input(lorchestra, two, make_adapter, other_base, tiny_dir, tmp_path):
    make_adapter(tmp_path / "foreign", seed=3, base=other_base)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    lorchestra("fuse", "a=0.3", "b=half", "-o", "out").refused("'half' is not a finite number", "ADAPTER=WEIGHT")
    lorchestra("fuse", "a", "nothere", "-o", "out").refused("'nothere'")
    lorchestra("fuse", "a", "foreign", "-o", "out").refused("different bases")
    lorchestra("fuse", "a", "b", "-o", "out", "--method", "ties").refused("'ties'", "linear")
    lorchestra("fuse", "a", "b", "-o", "a").refused("--output_dir a is adapter 'a'")
    lorchestra("fuse", "a=0", "b=0", "-o", "out").refused("every weight is zero")
    lorchestra("fuse", "a", "a/", "-o", "out").refused("given twice")
    lorchestra("fuse", "a", "b", "-o", "out", "--rank", 0).refused("--rank")
    lorchestra("fuse", "-o", "out").refused("ADAPTER")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    lorchestra("fuse", "a", "b", "-o", "model").refused("model is not empty and holds no adapter")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
