"""A quantised base as plain weights: those that its own format stands for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_tiny_model, make_tiny_tokenizer

from lorchestra.base.dequantise import dequantised, quantisation
from lorchestra.base.home import home
from lorchestra.errors import SourceError

BLOCK = 32


def as_fp8(directory):
    """Write a tiny Llama as transformers and DeepSeek store fp8: blocks of float8 entries, one scale each.

    Returns:
        Tensor name → float64 values that the file stands for.
    """
    model = make_tiny_model(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2)
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    stored, meant = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        meant[name] = weight.double()
        stored[name] = weight
        if "_proj" in name:
            m, n = weight.shape
            blocks = weight.view(m // BLOCK, BLOCK, n // BLOCK, BLOCK)
            scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
            eighth = (blocks / scale).to(torch.float8_e4m3fn)
            stored[name] = eighth.view(m, n)
            stored[name.removesuffix("weight") + "weight_scale_inv"] = scale.view(m // BLOCK, n // BLOCK)
            meant[name] = (eighth.double() * scale.double()).view(m, n)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    quantise(directory, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
    return meant


def quantise(directory, **settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def test_fp8_becomes_what_it_stands_for(tmp_path):
    meant = as_fp8(tmp_path / "base")
    assert quantisation(tmp_path / "base") == "fp8"
    plain = dequantised(tmp_path / "base")
    assert quantisation(plain) == ""
    found = load_file(plain / "model.safetensors")
    assert set(found) == set(meant)
    for name, weight in meant.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-6, atol=0)
    assert json.loads((plain / "lorchestra.json").read_text())["made_by"] == "dequantise fp8"
    assert (plain / "tokenizer.json").is_file()
    before = (plain / "model.safetensors").stat().st_mtime_ns
    assert dequantised(tmp_path / "base") == plain
    assert (plain / "model.safetensors").stat().st_mtime_ns == before, "made once"


def test_a_plain_base_is_itself(tiny_dir):
    assert quantisation(tiny_dir) == ""
    assert dequantised(tiny_dir) == tiny_dir


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "fbgemm_fp8"])
def test_methods_that_cannot_be_turned_back_are_named(tmp_path, method):
    make_tiny_model().save_pretrained(tmp_path / "base")
    quantise(tmp_path / "base", quant_method=method, bits=4)
    with pytest.raises(SourceError, match=rf"quantised by {method}, which cannot .* Use the unquantised model"):
        dequantised(tmp_path / "base")


@pytest.mark.parametrize(
    ("method", "settings", "asks"),
    [
        ("bitsandbytes", {"load_in_4bit": True}, "bnb_4bit.is_bitsandbytes_available"),
        ("compressed-tensors", {"config_groups": {}}, "compressed_tensors.is_compressed_tensors_available"),
    ],
)
def test_a_missing_library_is_named(tmp_path, method, settings, asks, monkeypatch):
    monkeypatch.setattr(f"transformers.quantizers.quantizer_{asks}", lambda *version: False)
    make_tiny_model().save_pretrained(tmp_path / "base")
    make_tiny_tokenizer().save_pretrained(tmp_path / "base")
    quantise(tmp_path / "base", quant_method=method, **settings)
    with pytest.raises(SourceError, match=rf"{method}"):
        dequantised(tmp_path / "base")
    assert not list((home() / "bases").glob("base-*-v1"))


def test_scales_that_are_missing_are_no_weights(tmp_path):
    """Without them transformers would fill in numbers of its own."""
    as_fp8(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    gone = next(name for name in weights if name.endswith("weight_scale_inv"))
    del weights[gone]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SourceError, match=rf"{gone.removesuffix('_scale_inv')} is stored in F8_E4M3 without its scales"
    ):
        dequantised(tmp_path / "base")


def test_a_damaged_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json cannot be read"):
        dequantised(tmp_path)
