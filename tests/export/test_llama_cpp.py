"""llama.cpp itself, as in Ollama, reads what was exported: tokens, logits, adapters. The independent oracle."""

from __future__ import annotations

import json
import sys
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from tests.export.conftest import FAMILIES, byte_tokenizer, make_family
from tests.export.test_gguf_adapter import make
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorchestra.export.gguf_adapter import export_adapter
from lorchestra.export.gguf_model import export_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="xllamacpp is installed on Linux only"),
]
TEXT = "the fever there"


@contextmanager
def served(file, *adapters):
    """``post(path, value)`` to llama.cpp's server on ``file``, with adapters at weight 1."""
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 256, 1, 1
    parameters.warmup = False
    loras = []
    for adapter in adapters:
        loras.append(xllamacpp.CommonAdapterLoraInfo())
        loras[-1].path, loras[-1].scale = str(adapter), 1.0
    parameters.lora_adapters = loras
    server = xllamacpp.Server(parameters)

    def post(path, value):
        data = json.dumps(value).encode()
        asked = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read())

    yield post


def logprobs(post, ids, size):
    """Log-probabilities ``[size]`` of the token after ``ids``."""
    asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": size, "cache_prompt": False}
    # An answer that is no text (half a character) has no probabilities: let it be "a".
    found = post("/completion", {**asked, "logit_bias": [["a", 100.0]]})["completion_probabilities"][0]["top_logprobs"]
    values = torch.full((size,), torch.nan, dtype=torch.float64)
    for entry in found:
        values[entry["id"]] = entry["logprob"]
    assert not values.isnan().any()
    return values


@torch.no_grad()
def expected(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family(family, name, tmp_path):
    """Also beyond the sliding windows, and with scaled rotary embeddings."""
    export_model(family(name), tmp_path / "m.gguf", "float32")
    model = AutoModelForCausalLM.from_pretrained(family(name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(family(name))
    ids = tokenizer(TEXT)["input_ids"]
    long = (ids * 20)[:90]
    with served(tmp_path / "m.gguf") as post:
        assert post("/tokenize", {"content": TEXT})["tokens"] == ids
        for prompt in (ids, long):
            found, wanted = logprobs(post, prompt, model.config.vocab_size), expected(model, prompt)
            spread = (wanted - wanted.mean()).norm()
            assert (found - wanted).norm() <= 0.01 * spread, len(prompt)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_rounded(family, name, dtype, tmp_path):
    export_model(family(name), tmp_path / "m.gguf", dtype)
    model = AutoModelForCausalLM.from_pretrained(family(name)).eval()
    ids = AutoTokenizer.from_pretrained(family(name))(TEXT)["input_ids"]
    with served(tmp_path / "m.gguf") as post:
        found, wanted = logprobs(post, ids, model.config.vocab_size), expected(model, ids)
    assert (found - wanted).norm() <= (0.01 if dtype == "float16" else 0.15) * (wanted - wanted.mean()).norm()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_beside_its_base(family, name, tmp_path):
    """Mixed ranks; its effect is that of the merged model."""
    shapes = {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.0.self_attn.k_proj": (32, 64),
        "model.layers.1.self_attn.v_proj": (32, 64),
        "model.layers.1.mlp.down_proj": (64, 96),
    }
    adapter = make(shapes, (4, 2, 4, 7)) * 40.0
    export_model(family(name), tmp_path / "m.gguf", "float32")
    export_adapter(adapter, AutoConfig.from_pretrained(family(name)), tmp_path / "a.gguf", "float32")
    model = make_family(name)
    ids = byte_tokenizer()(TEXT)["input_ids"]
    plain = expected(model, ids)
    for path, update in adapter.modules.items():
        model.get_submodule(path).weight += update.dense()
    adapted = expected(model, ids)
    with served(tmp_path / "m.gguf", tmp_path / "a.gguf") as post:
        found = logprobs(post, ids, model.config.vocab_size)
    effect = (adapted - plain).norm()
    assert effect > 0.05 * (plain - plain.mean()).norm(), "it does something"
    assert (found - adapted).norm() <= 0.02 * effect


TEXTS = (
    "the fever there, 38.5 °C", "  two  spaces", "Line one\n\nline two\t tab", "患者发热三天,伴咳嗽", "I'll say: don't",
    "emoji 🚀 and 12345", "<|im_start|>user\nfever<|im_end|>",
)  # fmt: skip


def sentencepiece_tokenizer():
    """As Gemma's: BPE over ▁ with byte fallback, trained on a little text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *bytes_], show_progress=False)
    corpus = [
        "the fever of the patient is there",
        "other feathers, otherwise there",
        "发热 发热三天 line two tab spaces",
    ]
    backend.train_from_iterator(corpus * 5, trainer)
    value = json.loads(backend.to_str())
    value["added_tokens"] = [entry for entry in value["added_tokens"] if entry["content"] in special]
    backend = Tokenizer.from_str(json.dumps(value))
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def digits_tokenizer():
    """As SmolLM's: every digit alone, then as GPT-2."""
    from tokenizers import pre_tokenizers

    found = byte_tokenizer()
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return found


def split_tokenizer(digits):
    """As Llama 3's (up to three digits stay together) and Qwen 2's (one)."""
    from tokenizers import Regex, pre_tokenizers

    from lorchestra.export.tokens import _WORDS

    found = byte_tokenizer()
    split = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated")
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return found


TOKENIZERS = {
    "sentencepiece": sentencepiece_tokenizer,
    "gpt-2": byte_tokenizer,
    "smollm": digits_tokenizer,
    "llama-bpe": lambda: split_tokenizer(r"\p{N}{1,3}"),
    "qwen2": lambda: split_tokenizer(r"\p{N}"),
}


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_text_becomes_the_same_tokens(name, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = TOKENIZERS[name]()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 3, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    export_model(tmp_path, tmp_path / "m.gguf", "float16")
    with served(tmp_path / "m.gguf") as post:
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert post("/tokenize", {"content": text, "parse_special": True})["tokens"] == ids, text
