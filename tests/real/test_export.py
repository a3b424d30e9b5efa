"""The real base as GGUF: llama.cpp makes the same tokens of text, and the same of them, as transformers does."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from tests.export.test_llama_cpp import TEXTS, expected, logprobs, served
from tests.real.test_medical import BASE

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.base.load import load_base, prepare_base
from lorchestra.base.locate import locate
from lorchestra.export.gguf_adapter import export_adapter
from lorchestra.export.gguf_model import export_model

pytestmark = pytest.mark.real
PROMPT = "What should a patient with a fever do first? 患者: the doctor said"


def test_model_and_adapter_in_llama_cpp(tmp_path):
    source = locate(BASE)
    base = load_base(prepare_base(BASE), dtype="float32")
    noise = torch.Generator().manual_seed(0)
    modules = {}
    for path, module in base.model.named_modules():
        if path.endswith("_proj"):
            m, n = module.weight.shape
            update = LowRank(torch.randn(m, 4, generator=noise), torch.randn(4, n, generator=noise))
            modules[path] = update * (0.05 * float(module.weight.norm()) / update.norm())
    done = export_model(base.directory, tmp_path / "m.gguf", "float16", prompts=[PROMPT])
    assert done.logits < 0.01
    export_adapter(Adapter(modules), base.model.config, tmp_path / "a.gguf", "float16")
    copied = export_model(base.directory, tmp_path / "copied.gguf", "q8_0", tokenizer_from=source)
    assert copied.size < 0.6 * done.size
    theirs, ours = (
        {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if key.startswith("tokenizer.")}
        for file in (source, tmp_path / "m.gguf")
    )
    for key in ("model", "tokens", "merges", "eos_token_id", "add_bos_token"):
        assert ours[f"tokenizer.ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"], key

    ids = base.tokenizer(PROMPT)["input_ids"]
    size = base.model.config.vocab_size
    plain = expected(base.model, ids)
    for path, update in modules.items():
        base.model.get_submodule(path).weight += update.dense()
    adapted = expected(base.model, ids)
    spread, effect = (plain - plain.mean()).norm(), (adapted - plain).norm()
    assert effect > 0.1 * spread
    for file, limit in (("m.gguf", 0.01), ("copied.gguf", 0.1)):
        with served(tmp_path / file) as post:
            for text in (*TEXTS, PROMPT):
                tokens = base.tokenizer(text, add_special_tokens=False)["input_ids"]
                assert post("/tokenize", {"content": text, "parse_special": True})["tokens"] == tokens, json.dumps(text)
            assert (logprobs(post, ids, size) - plain).norm() <= limit * spread, file
    with served(tmp_path / "m.gguf", tmp_path / "a.gguf") as post:
        assert (logprobs(post, ids, size) - adapted).norm() <= 0.05 * effect
