"""The tokenizer in the file: types, scores, names of splits; what has no name is refused."""

from __future__ import annotations

import json

import gguf
import pytest
from tests.export.test_llama_cpp import TOKENIZERS, sentencepiece_tokenizer
from tokenizers import Regex, pre_tokenizers

from lorchestra.errors import SourceError, UserError
from lorchestra.export.tokens import add_tokenizer, pre_tokenizer


def fields(tokenizer, directory, size, source=None):
    tokenizer.save_pretrained(directory)
    writer = gguf.GGUFWriter(path=None, arch="llama")
    add_tokenizer(writer, directory, size, source)
    return {key: value.value for key, value in writer.kv_data[0].items()}


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "sentencepiece"])
def test_byte_level(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    size = len(tokenizer)
    found = fields(tokenizer, tmp_path, size + 2)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.tokens"] == [
        *tokenizer.convert_ids_to_tokens(range(size)),
        f"[PAD{size}]",
        f"[PAD{size + 1}]",
    ]
    kinds = found["tokenizer.ggml.token_type"]
    assert {gguf.TokenType(kinds[i]).name for i in tokenizer.all_special_ids} == {"CONTROL"}
    assert [gguf.TokenType(kind).name for kind in kinds[-2:]] == ["UNUSED", "UNUSED"]
    assert found["tokenizer.ggml.merges"][:2] == ["h e", "Ġ t"]
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def test_sentencepiece(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    found = fields(tokenizer, tmp_path, len(tokenizer))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is False
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    kinds = dict(zip(tokens, (gguf.TokenType(kind).name for kind in found["tokenizer.ggml.token_type"]), strict=True))
    assert (kinds["<0x0A>"], kinds["<unk>"], kinds["<bos>"], kinds["the"]) == ("BYTE", "UNKNOWN", "CONTROL", "NORMAL")
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    by_merge = [scores[tokens.index("".join(pair))] for pair in merges]
    assert by_merge == sorted(by_merge, reverse=True), "the earlier merge scores higher"
    assert len(set(by_merge)) == len(by_merge)


@pytest.mark.parametrize(
    "steps",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\d+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        ),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel()]),
    ],
)
def test_a_split_without_a_name_is_refused_with_the_way_out(steps, tmp_path):
    tokenizer = TOKENIZERS["gpt-2"]()
    tokenizer.backend_tokenizer.pre_tokenizer = steps
    with pytest.raises(UserError, match="--tokenizer_from with a GGUF file of the same base"):
        fields(tokenizer, tmp_path, len(tokenizer))
    with pytest.raises(UserError, match="how this tokenizer splits text"):
        pre_tokenizer({})


def test_wrong_input(tmp_path):
    tokenizer = TOKENIZERS["gpt-2"]()
    with pytest.raises(UserError, match=r"the tokenizer has 267 tokens, the embedding 200 rows"):
        fields(tokenizer, tmp_path, 200)
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(SourceError, match=r"no.gguf cannot be read as GGUF"):
        fields(tokenizer, tmp_path, 300, tmp_path / "no.gguf")
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["model"] = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**value, "added_tokens": []})))
    with pytest.raises(UserError, match=r"of type 'WordLevel', and only BPE"):
        fields(words, tmp_path, 300)
