"""``export``: an adapter or a model for other engines, checked; mistakes are told, and nothing is written."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from tests.cli.conftest import dense_logits
from transformers import AutoModelForCausalLM

from lorchestra.adapter.adapter import Adapter

IDS = torch.tensor([[1, 40, 41, 42, 90, 2]])


@pytest.fixture
def adapter(make_adapter, tmp_path):
    return make_adapter(tmp_path / "a", 1, rank=4)


@pytest.fixture
def model(lorchestra, adapter, tiny_dir, tmp_path):
    told = lorchestra("merge", tiny_dir, "a", "-o", "merged")
    assert told.code == 0, told.err
    return tmp_path / "merged"


def test_an_adapter_as_a_small_peft_directory(lorchestra, adapter, tmp_path):
    told = lorchestra("export", "a", "-o", "out", "--rank", 2, "--dtype", "bf16", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    small = Adapter.load(tmp_path / "out")
    assert {update.rank for update in small.modules.values()} == {2}
    assert found["rank"] == 2
    assert found["size"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert found["retained"] == pytest.approx(small.norm() ** 2 / Adapter.load(adapter).norm() ** 2, rel=1e-2)
    assert 0.3 < found["retained"] < 1
    assert 0 < found["error"] < 0.01
    assert small.base == Adapter.load(adapter).base
    assert found["serve"]["lmdeploy"].endswith("--backend pytorch --adapters out=out")
    assert found["serve"]["vllm"].endswith("--enable-lora --max-lora-rank 8 --lora-modules out=out")
    exact = lorchestra("export", "a", "-o", "exact")
    assert exact.code == 0
    assert "float32, rank 4" in exact.out
    assert Adapter.load(tmp_path / "exact").digest == Adapter.load(adapter).digest


def test_an_adapter_as_gguf(lorchestra, adapter, tiny_dir, tmp_path):
    told = lorchestra("export", "a", "-o", "out", "--format", "gguf", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter-f16.gguf", "Modelfile"}
    reader = gguf.GGUFReader(tmp_path / "out" / found["file"])
    assert len(reader.tensors) == found["tensors"] == 8
    assert reader.fields["lorchestra.digest"].contents() == Adapter.load(adapter).digest
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {tiny_dir}", "ADAPTER ./adapter-f16.gguf"]
    moved = lorchestra("export", "a", "-o", "other", "--format", "gguf", "--base", tiny_dir, "--dtype", "q8_0")
    assert moved.code == 0, moved.err
    assert "other/adapter-q8_0.gguf" in moved.out


def test_a_merged_model_as_gguf(lorchestra, adapter, model, tiny_dir, tmp_path):
    told = lorchestra("export", "merged", "-o", "out", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert found["file"] == "model-f16.gguf"
    assert 0 < found["logits"] < 0.02
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-f16.gguf", dtype=torch.float32)
    expected = dense_logits(tiny_dir, {adapter: 1.0}, IDS)
    with torch.no_grad():
        assert (read(IDS).logits - expected).norm() < 0.01 * (expected - expected.mean()).norm()
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./model-f16.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in text
    plain = lorchestra("export", "merged", "-o", "quick", "--dtype", "q8_0", "--no-parity")
    assert plain.code == 0
    assert "quick/model-q8_0.gguf" in plain.out
    assert "logits" not in plain.out


def test_a_failed_check_keeps_nothing(lorchestra, model, tmp_path, monkeypatch):
    monkeypatch.setattr("lorchestra.export.gguf_model.compare_logits", lambda *_: 0.5)
    told = lorchestra("export", "merged", "-o", "out")
    assert told.code == 1
    assert "the logits of model-f16.gguf differ" in told.err
    assert "Traceback" not in told.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_without_memory_the_logits_are_left_and_it_is_said(lorchestra, model, tmp_path, monkeypatch):
    monkeypatch.setattr("lorchestra.cli.export.LOGITS_BYTES", 10**12)
    told = lorchestra("export", "merged", "-o", "out", "--json")
    assert told.code == 0
    assert json.loads(told.out)["logits"] is None
    assert "the logits are not compared" in told.err


def test_wrong_input(lorchestra, adapter, model, make_adapter, other_base, tmp_path):
    lorchestra("export", "a", "-o", "out", "--dtype", "int4").refused("'int4'", "bf16")
    lorchestra("export", "a", "-o", "out", "--format", "onnx").refused("'onnx'", "peft and gguf")
    lorchestra("export", "a", "-o", "out", "--dtype", "q8_0").refused("q8_0 is for GGUF")
    lorchestra("export", "a", "-o", "out", "--rank", 0).refused("--rank")
    lorchestra("export", "a", "-o", "a").refused("is what is to be exported")
    lorchestra("export", "nothere", "-o", "out").refused("'nothere'")
    lorchestra("export", "merged", "-o", "out", "--format", "peft").refused("whole model")
    lorchestra("export", "merged", "-o", "out", "--rank", 4).refused("--rank is for adapters")
    lorchestra("export", "a", "-o", "merged").refused("is there already")
    lorchestra("export", "a", "-o", "out", "--format", "gguf", "--base", other_base).refused("a was trained on")
    (tmp_path / "empty").mkdir()
    lorchestra("export", "empty", "-o", "out").refused("neither an adapter", "nor a model")
    lorchestra("export", "a").refused("--output_dir")
    (tmp_path / "file.gguf").write_bytes(b"none")
    lorchestra("export", "merged", "-o", "out", "--tokenizer_from", "file.gguf").refused("cannot be read as GGUF")
    assert not (tmp_path / "out").exists()
