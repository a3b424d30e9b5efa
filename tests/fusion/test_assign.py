"""Which tensor a module is, and files that cannot be trusted: named, refused, nothing written anywhere."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.adapter.lowrank import LowRank
from lorchestra.base.fingerprint import fingerprint
from lorchestra.errors import AdapterError, SourceError
from lorchestra.fusion.assign import plan_shards
from lorchestra.fusion.stream import merge

INDEX = "model.safetensors.index.json"


def adapter_of(*paths, m=6, n=4):
    return Adapter({path: LowRank(torch.ones(m, 2), torch.ones(2, n)) for path in paths})


def make_base(directory, tensors, **config):
    """Two files and their index."""
    directory.mkdir()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, directory / file, metadata={"format": "pt"})
    mapping = {name: file for file, held in halves.items() for name in held}
    (directory / INDEX).write_text(json.dumps({"weight_map": mapping}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base", {f"model.layers.{i}.q_proj.weight": torch.ones(6, 4) for i in range(4)})


@pytest.fixture
def untouched(tmp_path, base):
    """After the test nothing has been written: not beside the base, not in it, not outside."""
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    yield
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "home" not in path.parts)
    assert not [name for name in found if "out" in name or name.startswith(".")]
    assert (tmp_path / "secret.safetensors").read_bytes() == b"secret"


def refused(base, tmp_path, words, adapter=None, error=SourceError):
    with pytest.raises(error, match=words):
        merge(base, adapter or adapter_of("model.layers.0.q_proj"), tmp_path / "out")


@pytest.mark.usefixtures("untouched")
class TestFilesThatCannotBeTrusted:
    @pytest.mark.parametrize(
        "name",
        ["../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", "..\\a.safetensors",
         ".a.safetensors", "a.bin", "", "c:a.safetensors"],
    )  # fmt: skip
    def test_names_that_leave_the_directory(self, base, tmp_path, name):
        index = json.loads((base / INDEX).read_text())
        index["weight_map"]["model.layers.0.q_proj.weight"] = name
        (base / INDEX).write_text(json.dumps(index))
        refused(base, tmp_path, "is no plain file name in the model's directory")

    def test_a_file_that_is_missing(self, base, tmp_path):
        (base / "b.safetensors").unlink()
        refused(base, tmp_path, r"is incomplete: .*index\.json names b\.safetensors")

    def test_a_tensor_that_is_missing(self, base, tmp_path):
        index = json.loads((base / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = "a.safetensors"
        (base / INDEX).write_text(json.dumps(index))
        refused(base, tmp_path, r"a\.safetensors lacks 'lm_head\.weight'")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
    def test_a_damaged_index(self, base, tmp_path, text):
        (base / INDEX).write_text(text)
        refused(base, tmp_path, r"index\.json is damaged")

    def test_a_file_cut_off(self, base, tmp_path):
        data = (base / "b.safetensors").read_bytes()
        (base / "b.safetensors").write_bytes(data[:-1])
        refused(base, tmp_path, r"b\.safetensors is not a safetensors file, or is damaged: it should have")

    def test_a_tensor_in_two_files(self, base, tmp_path):
        (base / INDEX).unlink()
        os.link(base / "a.safetensors", base / "c.safetensors")
        refused(base, tmp_path, "which another file of the base holds too")

    def test_an_output_inside_the_base(self, base, tmp_path):
        with pytest.raises(SourceError, match="lies inside the base"):
            merge(base, adapter_of("model.layers.0.q_proj"), base / "merged")
        with pytest.raises(SourceError, match="lies inside the base"):
            merge(base, adapter_of("model.layers.0.q_proj"), tmp_path / "base" / ".." / "base" / "x" / "y")
        assert sorted(path.name for path in base.iterdir()) == ["a.safetensors", "b.safetensors", "config.json", INDEX]

    def test_an_adapter_of_other_weights(self, base, tmp_path):
        other = BaseId("other", "sha256:0")
        adapter = Adapter(adapter_of("model.layers.0.q_proj").modules, other)
        refused(base, tmp_path, "was trained on other", adapter, AdapterError)
        assert fingerprint(base).weights != other.weights


@pytest.mark.usefixtures("untouched")
class TestModulesThatAreNoTensor:
    def test_fused_layers_are_named(self, tmp_path):
        tensors = {"model.layers.0.self_attn.qkv_proj.weight": torch.ones(18, 4)}
        base = make_base(tmp_path / "fused", {**tensors, "model.layers.0.mlp.gate_up_proj.weight": torch.ones(12, 4)})
        words = r"'model\.layers\.0\.self_attn\.k_proj': it keeps it inside 'model\.layers\.0\.self_attn\.qkv_proj"
        refused(base, tmp_path, words, adapter_of("model.layers.0.self_attn.k_proj"), AdapterError)
        words = r"it keeps it inside 'model\.layers\.0\.mlp\.gate_up_proj\.weight', together with others"
        refused(base, tmp_path, words, adapter_of("model.layers.0.mlp.up_proj"), AdapterError)

    def test_experts_in_one_tensor_are_named(self, tmp_path):
        stacked = {"model.layers.0.mlp.experts.up_proj": torch.ones(3, 6, 4), "model.norm.weight": torch.ones(4)}
        base = make_base(tmp_path / "experts", stacked)
        words = r"it keeps all experts in 'model\.layers\.0\.mlp\.experts\.up_proj', one tensor; merge .* with PEFT"
        refused(base, tmp_path, words, adapter_of("model.layers.0.mlp.experts.1.up_proj"), AdapterError)
        words = r"'model\.layers\.0\.mlp\.experts\.up_proj' in the base, of shape \(3, 6, 4\): several matrices"
        refused(base, tmp_path, words, adapter_of("model.layers.0.mlp.experts.up_proj"), AdapterError)

    def test_integers(self, tmp_path):
        base = make_base(tmp_path / "packed", {"q.weight": torch.ones(6, 4, dtype=torch.int8), "k": torch.ones(1)})
        refused(base, tmp_path, "stored as I8: it is quantised", adapter_of("q"), AdapterError)


def test_experts_in_tensors_of_their_own_are_merged(tmp_path):
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in range(3)]
    base = make_base(tmp_path / "base", {name: torch.ones(6, 4) for name in names})
    adapter = adapter_of("model.layers.0.block_sparse_moe.experts.1.w1")
    changed = [o.name for s in plan_shards(base, {}, adapter, "auto", False) for o in s.outputs if o.module]
    assert changed == [names[1]]


def test_nested_configurations_are_not_untied(tmp_path):
    tensors = {"model.embed_tokens.weight": torch.ones(6, 4), "model.norm.weight": torch.ones(4)}
    base = make_base(tmp_path / "base", tensors, text_config={"vocab_size": 6}, tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=r"configuration is nested \(text_config\)"):
        merge(base, adapter_of("lm_head"), tmp_path / "out", untie=True)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("transformer.h.0.attn.c_proj", "h.0.attn.c_proj.weight"),
        ("layers.0.q", "model.layers.0.q.weight"),
        ("model.layers.0.q", "model.language_model.layers.0.q.weight"),
        ("model.layers.0.q", "model.layers.0.q.weight"),
    ],
)
def test_files_may_name_the_wrapper_otherwise(tmp_path, path, name):
    base = make_base(tmp_path / "base", {name: torch.ones(6, 4), "other.weight": torch.ones(6, 4)})
    outputs = [o for s in plan_shards(base, {}, adapter_of(path), "auto", False) for o in s.outputs]
    assert {o.name: o.module for o in outputs} == {name: path, "other.weight": None}
