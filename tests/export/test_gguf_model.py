"""A model as GGUF gives the model back: every tensor, and the logits as transformers reads the file."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.conftest import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorchestra.errors import SourceError, StorageError, TrainingError, UserError
from lorchestra.export import gguf_file, gguf_model
from lorchestra.export.gguf_model import export_model

PROMPTS = ("the fever there", "发烧 fever 123")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_transformers_reads_the_same_model(family, name, tmp_path):
    done = export_model(family(name), tmp_path / "m.gguf", "float16", prompts=PROMPTS)
    assert 0 < done.error < 2**-11
    assert 0 < done.logits < 5e-3
    exact = export_model(family(name), tmp_path / "exact.gguf", "float32", prompts=PROMPTS)
    assert exact.error == 0.0
    assert exact.logits < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_eight_bits(family, name, tmp_path):
    done = export_model(family(name), tmp_path / "m.gguf", "q8_0", prompts=PROMPTS)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    assert 1e-3 < done.error < 0.01
    assert 1e-3 < done.logits < 0.1
    assert done.size < 0.6 * export_model(family(name), tmp_path / "half.gguf", "float16").size


def test_rows_that_fill_no_blocks_of_eight_bits_are_float16():
    assert gguf_file.kind_for((4, 40), "q8_0").name == "F16"
    assert gguf_file.kind_for((4, 64), "q8_0").name == "Q8_0"
    assert gguf_file.kind_for((64,), "q8_0").name == "F32"


def test_what_the_file_says(family, tmp_path):
    export_model(family("llama, scaled"), tmp_path / "m.gguf", "bfloat16", notes={"lorchestra.adapter": "sha256:1"})
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["llama.context_length"] == 512
    assert said["llama.rope.dimension_count"] == 16
    assert said["llama.attention.head_count_kv"] == 2
    assert said["lorchestra.adapter"] == "sha256:1"
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert said["tokenizer.ggml.eos_token_id"] == 2
    assert said["tokenizer.chat_template"] == AutoTokenizer.from_pretrained(family("llama, scaled")).chat_template
    assert any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    assert not any(tensor.name == "output.weight" for tensor in reader.tensors), "tied"


def test_where_llama_knows_no_window_the_context_ends_with_it(family, tmp_path):
    export_model(family("mistral"), tmp_path / "m.gguf", "float16")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 128


def test_the_tokenizer_of_a_source_file_is_copied(family, tmp_path):
    export_model(family("llama"), tmp_path / "source.gguf", "float16")
    directory = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(family("llama"))
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(family("llama"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(directory)
    export_model(directory, tmp_path / "m.gguf", "float16", tokenizer_from=tmp_path / "source.gguf")
    source, found = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("source", "m"))
    keys = {key for key in source if key.startswith("tokenizer.")} - {"tokenizer.chat_template"}
    assert len(keys) > 5
    for key in keys:
        assert found[key].contents() == source[key].contents(), key
        assert found[key].types == source[key].types, key
    assert found["tokenizer.chat_template"].contents() == tokenizer.chat_template, "the model's own"


class TestFailures:
    def test_a_tensor_that_is_not_what_it_should_be(self, family, tmp_path, monkeypatch):
        rounded = gguf_file._rounded

        def damaged(planned):
            array = rounded(planned).copy()
            if planned.name == "blk.1.ffn_up.weight":
                array[0, 0] *= np.float16(1.01)
            return array

        monkeypatch.setattr(gguf_file, "_rounded", damaged)
        with pytest.raises(TrainingError, match=r"'blk.1.ffn_up.weight' read back is off by .*more than F16 rounds"):
            export_model(family("llama"), tmp_path / "m.gguf", "float16")

    def test_rows_in_the_wrong_order_are_found_by_the_logits(self, family, tmp_path, monkeypatch):
        """Tensors alone cannot tell: they are compared with what was meant to be written."""
        monkeypatch.setattr("lorchestra.export.gguf_model.reorder", lambda *_: None)
        with pytest.raises(TrainingError, match=r"logits of m.gguf differ from the model's by .*It is not kept"):
            export_model(family("llama"), tmp_path / "m.gguf", "float16", prompts=PROMPTS)

    def test_what_float16_cannot_hold(self, family, tmp_path):
        self.changed(family, tmp_path / "model", "model.layers.0.mlp.up_proj.weight", 1e6)
        with pytest.raises(UserError, match=r"'blk.0.ffn_up.weight' holds an entry of 1e\+06, beyond float16"):
            export_model(tmp_path / "model", tmp_path / "m.gguf", "float16")
        assert export_model(tmp_path / "model", tmp_path / "n.gguf", "bfloat16").error < 2**-8
        self.changed(family, tmp_path / "model", "model.norm.weight", float("nan"))
        with pytest.raises(UserError, match=r"'output_norm.weight' holds NaN or infinity"):
            export_model(tmp_path / "model", tmp_path / "m.gguf", "float32")

    def test_a_disk_without_room(self, family, tmp_path, monkeypatch):
        full = shutil._ntuple_diskusage(100, 99, 1)
        monkeypatch.setattr("lorchestra.export.gguf_file.shutil.disk_usage", lambda path: full)
        with pytest.raises(StorageError, match=r"m.gguf needs .* GB and 0.00 GB are free"):
            export_model(family("llama"), tmp_path / "m.gguf", "float16")
        assert not (tmp_path / "m.gguf").exists()

    def test_damaged_and_foreign_files(self, family, tmp_path):
        self.changed(family, tmp_path / "model", "model.norm.weight", 1.0)
        file = tmp_path / "model" / "model.safetensors"
        weights = load_file(file)
        save_file({"model.embed_tokens.weight": weights["model.embed_tokens.weight"].to(torch.int8)}, file)
        with pytest.raises(SourceError, match="as I8, quantised"):
            export_model(tmp_path / "model", tmp_path / "m.gguf", "float16")
        save_file({"model.norm.weight": weights["model.norm.weight"]}, file)
        with pytest.raises(SourceError, match="no input embedding"):
            export_model(tmp_path / "model", tmp_path / "m.gguf", "float16")
        with pytest.raises(SourceError, match="no configuration"):
            export_model(tmp_path, tmp_path / "m.gguf", "float16")
        assert set(gguf_model.LIMITS) == set(gguf_file.FORMATS)

    @staticmethod
    def changed(family, directory, name, value):
        """A copy of the llama with one entry set."""
        model = AutoModelForCausalLM.from_pretrained(family("llama"))
        model.get_parameter(name).data.view(-1)[0] = value
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(family("llama")).save_pretrained(directory)
