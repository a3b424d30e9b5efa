"""An adapter as GGUF: what llama.cpp makes of the file, alpha over each tensor's own rank, is the adapter."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from tests.export.conftest import FAMILIES, SIZES
from transformers import AutoConfig

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import TrainingError, UserError
from lorchestra.export import gguf_file
from lorchestra.export.gguf_adapter import export_adapter


def make(shapes, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            path: LowRank(torch.randn(m, r, generator=generator) * 1e-3, torch.randn(r, n, generator=generator))
            for (path, (m, n)), r in zip(shapes.items(), ranks, strict=True)
        }
    )


def as_llama_cpp_applies(file):
    """Tensor name → ΔW float64, by the formula of llama.cpp's adapter: (alpha / r)·b·a."""
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert len(tensors) == 2 * len(names)
    return {
        name: torch.from_numpy(
            alpha / tensors[f"{name}.lora_b"].shape[1] * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        )
        for name in names
    }


SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.0.self_attn.v_proj": (32, 64),
    "model.layers.1.mlp.down_proj": (64, 96),
}
NAMES = dict(
    zip(
        SHAPES,
        ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"),
        strict=True,
    )
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), (4, 2, 4, 7)])
def test_what_llama_cpp_applies_is_the_adapter(family, tmp_path, dtype, ranks):
    """Also with mixed ranks; q and k with their rows in llama.cpp's order."""
    adapter = make(SHAPES, ranks)
    config = AutoConfig.from_pretrained(family("llama"))
    done = export_adapter(adapter, config, tmp_path / "a.gguf", dtype, notes={"lorchestra.digest": adapter.digest})
    limit = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 6e-3, "q8_0": 2e-2}[dtype]
    assert done.error <= limit
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["lorchestra.digest"].contents() == adapter.digest
    found = as_llama_cpp_applies(tmp_path / "a.gguf")
    assert set(found) == set(NAMES.values())
    heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}
    for path, name in NAMES.items():
        expected = adapter.modules[path].dense(torch.float64)
        if name in heads:  # of each head, a row of the first half, then one of the second
            halves = expected.reshape(heads[name], 2, -1, expected.shape[1])
            expected = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(expected.shape)
        assert (found[name] - expected).norm() <= limit * expected.norm()


def test_other_families_keep_their_rows(family, tmp_path):
    adapter = make({"model.layers.0.self_attn.q_proj": (64, 64)}, (4,))
    export_adapter(adapter, AutoConfig.from_pretrained(family("qwen2")), tmp_path / "a.gguf", "float32")
    (found,) = as_llama_cpp_applies(tmp_path / "a.gguf").values()
    torch.testing.assert_close(
        found, adapter.modules["model.layers.0.self_attn.q_proj"].dense(torch.float64), rtol=1e-5, atol=1e-9
    )


def test_what_llama_cpp_does_not_adapt_is_refused(family, tmp_path):
    config = AutoConfig.from_pretrained(family("llama"))
    head = make({"lm_head": (SIZES["vocab_size"], 64)}, (2,))
    with pytest.raises(UserError, match=r"changes 'lm_head', .*merge it into its base"):
        export_adapter(head, config, tmp_path / "a.gguf", "float16")
    rows = Adapter(make({"model.embed_tokens": (64, 288)}, (2,)).modules, embeddings=frozenset({"model.embed_tokens"}))
    with pytest.raises(UserError, match=r"changes 'model.embed_tokens'"):
        export_adapter(rows, config, tmp_path / "a.gguf", "float16")
    with pytest.raises(UserError, match=r"'model.vision.q_proj.weight', which has no place"):
        export_adapter(make({"model.vision.q_proj": (4, 4)}, (2,)), config, tmp_path / "a.gguf", "float16")
    untied = AutoConfig.from_pretrained(family("llama, untied"))
    assert export_adapter(head, untied, tmp_path / "b.gguf", "float16").tensors == 2
    assert set(FAMILIES) >= {"llama", "llama, untied"}


def test_a_wrong_file_is_found(family, tmp_path, monkeypatch):
    rounded = gguf_file._rounded
    monkeypatch.setattr(gguf_file, "_rounded", lambda planned: rounded(planned) * np.float16(1.25))
    with pytest.raises(TrainingError, match="read back is off by"):
        export_adapter(
            make(SHAPES, (4,) * 4), AutoConfig.from_pretrained(family("llama")), tmp_path / "a.gguf", "float16"
        )
