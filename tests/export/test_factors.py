"""A PEFT export is the adapter: small, its scale folded in, and plain PEFT applies it as it is."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import StorageError, TrainingError
from lorchestra.export import factors
from lorchestra.export.factors import DTYPES, balanced, difference, export_peft

LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
IDS = torch.tensor([[1, 40, 41, 42, 90, 2]])


def make(seed=0, rank=4, spread=1.0):
    """As training leaves them: A of order 1, B small; in the tiny model's shapes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}
    return Adapter(
        {
            f"model.layers.{layer}.{kind}": LowRank(
                torch.randn(m, rank, generator=generator) * 0.2 / spread,
                torch.randn(rank, n, generator=generator) * spread,
            )
            for layer in range(2)
            for kind, (m, n) in shapes.items()
        }
    )


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-7), ("bfloat16", 5e-3), ("float16", 5e-4)])
def test_read_back_and_in_plain_peft(tiny_dir, tmp_path, dtype, limit):
    adapter = make()
    done = export_peft(adapter, tmp_path / "out", dtype)
    assert done.error <= limit
    assert (done.rank, done.directory) == (4, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"], config["use_rslora"]) == (4, 4, False)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {DTYPES[dtype]}  # noqa: SIM118
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir)
    with torch.no_grad():
        base = plain(IDS).logits
        found = peft.PeftModel.from_pretrained(plain, tmp_path / "out")(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64)
        for path, update in adapter.modules.items():
            merged.get_submodule(path).weight += update.dense(torch.float64)
        expected = merged(IDS).logits
    assert (found - expected).norm() <= max(10 * limit, 1e-5) * (expected - base).norm()


def test_float32_changes_nothing(tmp_path):
    adapter = make(spread=100)
    export_peft(adapter, tmp_path / "out")
    assert Adapter.load(tmp_path / "out").digest == adapter.digest


def test_an_8b_adapter_of_rank_16_is_below_100_mb_in_bfloat16():
    """By shapes: 224 modules."""
    parameters = sum(32 * 16 * (m + n) for m, n in LLAMA_8B.values())
    assert parameters == 41_943_040
    assert parameters * DTYPES["bfloat16"].itemsize < 100e6 < parameters * DTYPES["float32"].itemsize


def test_the_size_is_that_of_the_numbers_and_a_header(tmp_path):
    adapter = make()
    small, large = (export_peft(adapter, tmp_path / dtype, dtype).size for dtype in ("bfloat16", "float32"))
    assert large - small == pytest.approx(2 * adapter.parameters, abs=64)
    assert small - 2 * adapter.parameters < 200 * 2 * len(adapter.modules)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.floats(-12, 12))
def test_balancing_changes_no_bit_of_the_product(seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    update = LowRank(
        torch.randn(6, 2, generator=generator) * 2.0**magnitude, torch.randn(2, 5, generator=generator) / 2.0**magnitude
    )
    B, A = balanced(update)
    assert torch.equal(B @ A, update.dense())
    assert 0.3 < float(B.norm() / 12**0.5) / float(A.norm() / 10**0.5) < 3


def test_what_float16_would_lose_of_unbalanced_factors(tmp_path):
    """B of order 1e-7: in float16 a handful of values, or none."""
    adapter = make(spread=1e6)
    assert export_peft(adapter, tmp_path / "out", "float16").error < 1e-3
    lost = {path: LowRank(u.B.half().float(), u.A) for path, u in adapter.modules.items()}
    assert difference(adapter, lost) > 0.05


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.floats(1e-6, 1.0))
def test_the_difference_is_the_dense_one(seed, size):
    adapter, noise = make(seed, 2), make(seed + 1, 2)
    found = {path: LowRank(u.B + size * noise.modules[path].B, u.A) for path, u in adapter.modules.items()}
    apart = sum(
        float((found[p].dense(torch.float64) - u.dense(torch.float64)).square().sum())
        for p, u in adapter.modules.items()
    )
    assert difference(adapter, found) == pytest.approx(apart**0.5 / adapter.norm(), rel=1e-3)
    assert difference(adapter, adapter.modules) == 0.0


def test_a_failed_check_keeps_nothing(tmp_path, monkeypatch):
    read = factors.read_peft

    def damaged(directory):
        loaded = read(directory)
        path, update = next(iter(loaded.modules.items()))
        return Adapter({**loaded.modules, path: update * 1.1})

    monkeypatch.setattr(factors, "read_peft", damaged)
    with pytest.raises(TrainingError, match="is not kept"):
        export_peft(make(), tmp_path / "out", "bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        export_peft(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
