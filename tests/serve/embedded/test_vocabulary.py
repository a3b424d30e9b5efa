"""Tokens as bytes, put together, are what the tokenizer decodes: byte-level and byte-fallback tokenizers."""

from __future__ import annotations

import pytest

from lorchestra.serve.embedded.vocabulary import Vocabulary

TEXTS = [
    "Take 2 tablets, twice a day.",
    "体温 39.5°C，请就医。",
    "naïve café — 😀👩‍⚕️",
    "  two  spaces\n\ttabs ",
    "क्षत्रिय",
]


def make_fallback_tokenizer():
    """As Llama 2's: words with ▁ for the space before them, and bytes for what is no word."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "▁", "▁t", "a", "▁a", "e", "t", "▁ta"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("▁", "t"), ("▁", "a"), ("▁t", "a")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(kind, text, tiny_tokenizer):
    tokenizer = tiny_tokenizer if kind == "byte-level" else make_fallback_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(vocabulary.bytes, ids)).decode() == text


def test_every_byte_has_its_token(tiny_tokenizer):
    vocabulary = Vocabulary(tiny_tokenizer)
    assert {vocabulary.bytes(i) for i in range(4, 260)} == {bytes([byte]) for byte in range(256)}


def test_special_tokens_are_shown_by_name(tiny_tokenizer):
    vocabulary = Vocabulary(tiny_tokenizer)
    assert (vocabulary.shown(2), vocabulary.special(2)) == ("<|im_end|>", True)
    assert not vocabulary.special(100)


def test_half_a_character_is_shown_as_bytes(tiny_tokenizer):
    vocabulary = Vocabulary(tiny_tokenizer)
    ids = tiny_tokenizer("发", add_special_tokens=False)["input_ids"]
    assert [vocabulary.shown(i) for i in ids] == ["bytes:\\xe5", "bytes:\\x8f", "bytes:\\x91"]


def test_a_row_without_a_token_writes_nothing(tiny_tokenizer):
    assert Vocabulary(tiny_tokenizer).bytes(300) == b""
