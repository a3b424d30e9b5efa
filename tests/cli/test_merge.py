"""``merge-lora`` and ``merge``: the exact sum in the weights, checked, whole or not at all; wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import dense_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.base.fingerprint import fingerprint

IDS = torch.tensor([[1, 40, 41, 42, 90, 2], [1, 7, 8, 9, 10, 11]])
WEIGHTS = {"a": 0.3, "b": 0.5, "c": -0.2}


@pytest.fixture
def three(make_adapter, tmp_path) -> dict[Path, float]:
    ranks = {"a": 2, "b": 3, "c": 1}
    return {make_adapter(tmp_path / name, seed, rank): WEIGHTS[name] for seed, (name, rank) in enumerate(ranks.items())}


@torch.no_grad()
def logits(directory: Path | str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "spelling",
    [
        lambda base: ["merge-lora", "--base_model", base, "--adapters", "a,b,c", "--weights", "0.3,0.5,-0.2"],
        lambda base: ["merge", base, "a=0.3", "b=0.5", "c=-0.2"],
    ],
)
def test_the_merged_model_is_the_dense_sum(lorchestra, tiny_dir, three, spelling):
    told = lorchestra(*spelling(tiny_dir), "--output_dir", "merged", "--json")
    assert told.code == 0, told.err
    expected = dense_logits(tiny_dir, three, IDS)
    torch.testing.assert_close(logits("merged"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dense_logits(tiny_dir, {}, IDS), expected, atol=1e-2)

    summary = json.loads(told.out)
    assert summary["weights"] == WEIGHTS
    assert summary["parity"] < 1e-4
    assert summary["rounding_lost"] < 1e-4
    state = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64).requires_grad_(False)
    adapters = [(Adapter.load(directory), weight) for directory, weight in three.items()]
    update, weight = 0.0, 0.0
    for path in adapters[0][0].modules:
        update += sum(w * a.modules[path].dense(torch.float64) for a, w in adapters).square().sum()
        weight += state.get_submodule(path).weight.square().sum()
    assert summary["update_ratio"] == pytest.approx(float((update / weight).sqrt()), rel=1e-4)

    assert AutoTokenizer.from_pretrained("merged").chat_template
    note = json.loads(Path("merged/lorchestra.json").read_text())
    assert {p["name"]: p["coefficient"] for p in note["lineage"]["parents"]} == WEIGHTS


def test_bfloat16_is_rounded_once_and_says_what_it_lost(lorchestra, tiny_dir, three):
    small = lorchestra("merge", tiny_dir, "a=0.001", "-o", "small", "--dtype", "bfloat16")
    assert small.code == 0, small.err
    assert "--dtype float32 keeps all of it" in small.out
    told = lorchestra("merge", tiny_dir, "a", "b", "-o", "merged", "--dtype", "bfloat16", "--json")
    summary = json.loads(told.out)
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype="auto").requires_grad_(False)
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).requires_grad_(False)
    lost = whole = same = entries = 0
    members = [Adapter.load(name) for name in ("a", "b")]
    for path in members[0].modules:
        before = base.get_submodule(path).weight
        update = sum(m.modules[path].dense(torch.float64) for m in members)
        found = merged.get_submodule(path).weight
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, (before.double() + update).float().bfloat16())
        arrived = found.double() - before.bfloat16().double()
        lost += torch.minimum((arrived - update).abs(), update.abs()).square().sum()
        whole += update.square().sum()
        same, entries = same + int((arrived == 0).sum()), entries + arrived.numel()
    assert summary["rounding_lost"] == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)
    assert summary["entries_lost"] == pytest.approx(same / entries, abs=1e-9)
    assert 0 < summary["base_rounding"] < 0.01
    assert summary["worst"]["rounding_lost"] >= summary["rounding_lost"]


def test_without_room_for_a_model_the_check_is_left_out_and_that_is_said(lorchestra, tiny_dir, three, monkeypatch):
    from lorchestra.cli import merge

    monkeypatch.setattr(merge, "PARITY_BYTES", 1 << 40)
    told = lorchestra("merge", tiny_dir, "a", "-o", "merged", "--json")
    assert told.code == 0
    assert "not compared with base + adapters" in told.err
    assert json.loads(told.out)["parity"] is None
    asked = lorchestra("merge", tiny_dir, "a", "-o", "asked", "--json", "--parity")
    assert json.loads(asked.out)["parity"] < 1e-4
    told = lorchestra("merge", tiny_dir, "a", "-o", "silent", "--no-parity")
    assert "not compared" not in told.err
    assert "parity" not in told.out


def test_a_quantised_base_is_dequantised_only_if_asked(lorchestra, make_adapter, tmp_path):
    """Adapters that name the quantised base still belong to it."""
    from tests.base.test_dequantise import as_fp8

    meant = as_fp8(tmp_path / "base")
    path = "model.layers.0.self_attn.q_proj"
    noise = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(64, 2, generator=noise), torch.randn(2, 64, generator=noise) * 0.01)
    Adapter({path: factors}, fingerprint(tmp_path / "base"), Lineage(name="a")).save(tmp_path / "a")
    lorchestra("merge", "base", "a", "-o", "out").refused("is quantised (fp8)", "--dequantise")
    told = lorchestra("merge", "base", "a", "-o", "out", "--dequantise", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["dtype"] == "float32"
    found = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float64).get_submodule(path).weight
    expected = meant[f"{path}.weight"] + factors.dense(torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_member_away_from_its_context_is_warned_of(lorchestra, tiny_dir, make_adapter, tmp_path):
    first = make_adapter(tmp_path / "first", seed=1)
    parent = Parent("first", Adapter.load(first).digest, 1.0)
    make_adapter(tmp_path / "second", seed=2, context=(parent,))
    as_trained = lorchestra("merge", tiny_dir, "first", "second", "-o", "one")
    assert "warning" not in as_trained.err
    other = lorchestra("merge", tiny_dir, "first=0.5", "second", "-o", "two")
    assert "second was trained beside first at 1; with second at 1 that is 1, but it is 0.5 here" in other.err
    alone = lorchestra("merge", tiny_dir, "second", "-o", "three")
    assert "second was trained beside first at 1, which is no member of this mixture" in alone.err


def test_an_adapter_of_another_tool_is_merged_as_unverified(lorchestra, tiny_dir, make_adapter, tmp_path):
    (make_adapter(tmp_path / "a", seed=1) / "lorchestra.json").unlink()
    told = lorchestra("merge", tiny_dir, "a=0.5", "-o", "merged")
    assert told.code == 0, told.err
    assert "a does not say which weights it was trained on" in told.err
    torch.testing.assert_close(
        logits("merged"), dense_logits(tiny_dir, {tmp_path / "a": 0.5}, IDS), rtol=1e-5, atol=1e-5
    )


def test_two_directories_of_one_name_are_told_apart(lorchestra, tiny_dir, make_adapter, tmp_path):
    members = {make_adapter(tmp_path / "x" / "final", 1): 0.5, make_adapter(tmp_path / "y" / "final", 2): 0.25}
    told = lorchestra("merge", tiny_dir, "x/final=0.5", "y/final=0.25", "-o", "merged", "--json")
    assert json.loads(told.out)["weights"] == {"x/final": 0.5, "y/final": 0.25}
    torch.testing.assert_close(logits("merged"), dense_logits(tiny_dir, members, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("adapters", "weights", "words"),
    [
        ("a,b,c", "0.3,0.5", ["--weights has 2 numbers for 3 adapters"]),
        ("a,b", "", ["--weights is missing", "2 adapters"]),
        ("a", "much", ["--weights", "'much' is not a finite number"]),
        ("a", "nan", ["'nan' is not a finite number"]),
        ("a,nothere", "1,1", ["'nothere'", "there is no"]),
        ("a,./a", "1,1", ["given twice"]),
        ("a", "0", ["every weight is zero"]),
        ("a,twin", "1,-1", ["is zero"]),
        ("", "", ["--adapters is empty"]),
        ("foreign", "1", ["foreign was trained on", "not those of"]),
        ("a,foreign", "1,1", ["different bases"]),
        ("whole", "1", ["a whole model, not an adapter"]),
        ("wide", "1", ["wide", "shape"]),
    ],
)
def test_wrong_members_are_told_and_nothing_is_written(
    lorchestra, tiny_dir, other_base, three, make_adapter, tmp_path, adapters, weights, words
):
    make_adapter(tmp_path / "twin", seed=0, rank=2)
    make_adapter(tmp_path / "foreign", seed=1, base=other_base)
    (tmp_path / "whole").symlink_to(tiny_dir)
    _widen(make_adapter(tmp_path / "wide", seed=1))
    there = sorted(p.name for p in tmp_path.iterdir() if p.name != "home")
    told = lorchestra(
        "merge-lora", "--base_model", tiny_dir, "--adapters", adapters, "--weights", weights, "--output_dir", "out"
    )
    told.refused(*words)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == there


def _widen(directory: Path) -> None:
    """The same adapter for a model with wider layers, as another tool would write it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "adapter_model.safetensors")
    wider = {k: torch.cat([t, t], dim=1) if "lora_A" in k else torch.cat([t, t]) for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in wider.items()}, directory / "adapter_model.safetensors")
    (directory / "lorchestra.json").unlink()


def test_places_and_numbers_that_cannot_be(lorchestra, tiny_dir, three, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    lorchestra("merge", tiny_dir, "a", "-o", "taken").refused("taken is there already")
    lorchestra("merge", tiny_dir, "a", "-o", "out", "--dtype", "bf16").refused("'bf16'", "bfloat16")
    lorchestra("merge", tiny_dir, "a", "-o", "out", "--device", "tpu").refused("'tpu'")
    lorchestra("merge", tiny_dir, "a").refused("--output_dir")
    lorchestra("merge", "a", "b", "-o", "out").refused("'a' is an adapter, not a model")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_merge_that_answers_otherwise_is_not_kept(lorchestra, tiny_dir, three, tmp_path, monkeypatch):
    """The law can fail: a merge of twice the update, as by a wrong scale."""
    from lorchestra.fusion import stream

    right = stream.merge
    monkeypatch.setattr(stream, "merge", lambda base, fused, out, **more: right(base, fused * 2.0, out, **more))
    told = lorchestra("merge", tiny_dir, "a", "-o", "out")
    assert told.code == 1
    assert "does not answer as base + adapters do" in told.err
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]
