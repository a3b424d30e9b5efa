"""Norms of a base's weights: those of the tensors, however they are stored."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lorchestra.errors import AdapterError, SourceError
from lorchestra.fusion import base_norms
from lorchestra.fusion.base_norms import weight_norms


def test_norms_of_the_tiny_model(tiny_dir, tiny_model, monkeypatch):
    monkeypatch.setattr(base_norms, "BLOCK", 100)  # several blocks a tensor
    shapes = {p: tuple(m.weight.shape) for p, m in tiny_model.named_modules() if p.endswith("_proj")}
    found = weight_norms(tiny_dir, shapes)
    assert set(found) == set(shapes)
    for path, norm in found.items():
        assert norm == pytest.approx(float(tiny_model.get_submodule(path).weight.double().norm()), rel=1e-12)


def test_a_tied_head_is_the_input_embedding(tiny_dir, tiny_model):
    norm = float(tiny_model.get_submodule("model.embed_tokens").weight.double().norm())
    assert weight_norms(tiny_dir, {"lm_head": (260, 32)}) == {"lm_head": pytest.approx(norm, rel=1e-12)}


def test_shards_half_precision_prefixes_and_transposed_weights(tmp_path):
    weights = {"model.a.weight": torch.randn(4, 6).bfloat16(), "h.0.c.weight": torch.randn(5, 3).half()}
    for k, (name, tensor) in enumerate(weights.items()):
        save_file({name: tensor}, tmp_path / f"model-{k}.safetensors")
    index = {"weight_map": {name: f"model-{k}.safetensors" for k, name in enumerate(weights)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = weight_norms(tmp_path, {"a": (4, 6), "h.0.c": (3, 5)}, {"h.0.c"})
    for path, name in (("a", "model.a.weight"), ("h.0.c", "h.0.c.weight")):
        assert found[path] == pytest.approx(float(weights[name].double().norm()), rel=1e-12)


def test_wrong_input(tmp_path):
    save_file(
        {"a.weight": torch.ones(4, 6), "q.weight": torch.ones(4, 6).to(torch.int8)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(AdapterError, match=r"'b'.*another base"):
        weight_norms(tmp_path, {"b": (4, 6)})
    with pytest.raises(AdapterError, match=r"'a'.*\(6, 4\), the base's is \(4, 6\)"):
        weight_norms(tmp_path, {"a": (6, 4)})
    with pytest.raises(SourceError, match="'q' as I8, quantised"):
        weight_norms(tmp_path, {"q": (4, 6)})
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(SourceError, match="damaged"):
        weight_norms(tmp_path, {"a": (4, 6)})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no \*.safetensors"):
        weight_norms(tmp_path, {"a": (4, 6)})
