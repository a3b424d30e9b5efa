"""The tokenizer of a GGUF file: copied from the base's own GGUF if there is one, else written from tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.errors import SourceError, UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

# llama.cpp splits text by rules of its own, known by name. The expressions of tokenizer.json that they stand for differ
# in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    _WORDS.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe",
    _WORDS.replace("DIGITS", r"\p{N}"): "qwen2",
}
_WAY_OUT = "give --tokenizer_from with a GGUF file of the same base, whose tokenizer is then copied"
_WRITTEN_ELSEWHERE = {"tokenizer.chat_template"}  # the training run's


def add_tokenizer(writer: GGUFWriter, directory: Path, size: int, source: Path | None) -> None:
    """Tokens, merges, special tokens and the chat template.

    Args:
        writer: of the file.
        directory: the model's, with its tokenizer.
        size: rows of the embedding; ids beyond the tokenizer's are marked unused.
        source: a GGUF file of the same base; its tokenizer is copied, but for the chat template.

    Raises:
        UserError: a tokenizer that llama.cpp has no name for, or of another size than the model.
        SourceError: no tokenizer.json, or ``source`` is not GGUF.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if source is not None:
        _copy(writer, source, tokenizer, size)
    else:
        _write(writer, directory, tokenizer, size)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _copy(writer: GGUFWriter, source: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(source).fields
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise SourceError(f"{source} cannot be read as GGUF: {error}") from error
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise SourceError(f"{source} holds no tokenizer; give a GGUF file of the whole base")
    found = len(tokens.data)
    if not len(tokenizer) <= found <= size:
        raise UserError(
            f"{source.name} has {found:,} tokens, the model's tokenizer {len(tokenizer):,} and its embedding {size:,} "
            "rows: it is of another base"
        )
    for key, field in fields.items():
        if key.startswith("tokenizer.") and key not in _WRITTEN_ELSEWHERE:
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)


def _write(writer: GGUFWriter, directory: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise SourceError(f"{directory} has no tokenizer.json; {_WAY_OUT}")
    value = json.loads(file.read_text(encoding="utf-8"))
    model = value.get("model") or {}
    if model.get("type") != "BPE":
        raise UserError(f"the tokenizer is of type {model.get('type')!r}, and only BPE can be written; {_WAY_OUT}")
    if len(tokenizer) > size:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens, the embedding {size:,} rows; it is another model's"
        )
    sentencepiece = bool(model.get("byte_fallback"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    tokens, types = _tokens(
        model["vocab"], value.get("added_tokens") or [], size, sentencepiece, model.get("unk_token")
    )
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, model.get("merges") or []))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_prefixed(value))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(value))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    _add_specials(writer, tokenizer)


def pre_tokenizer(value: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json splits text.

    Raises:
        UserError: it has none here.
    """
    steps = _steps(value.get("pre_tokenizer"))
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"]["Regex"] for step in steps if "Regex" in (step.get("pattern") or {})]
    whole = kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True)
    if kinds == ["Split", "ByteLevel"] and not whole and patterns[0:1] and patterns[0] in _SPLITS:
        return _SPLITS[patterns[0]]
    if kinds == ["Digits", "ByteLevel"] and whole and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and whole:
        return "gpt-2"
    raise UserError(f"how this tokenizer splits text ({', '.join(map(str, kinds))}) has no name here; {_WAY_OUT}")


def _steps(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, Mapping):
        return []
    inner = value.get("pretokenizers")
    return [step for part in inner for step in _steps(part)] if isinstance(inner, list) else [value]


def _tokens(
    vocab: Mapping[str, int], added: list[Mapping[str, Any]], size: int, sentencepiece: bool, unknown: str | None
) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in vocab.items():
        tokens[i], types[i] = token, TokenType.NORMAL
        if sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = TokenType.BYTE
    for entry in added:
        i, text = int(entry["id"]), str(entry["content"])
        types[i] = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        tokens[i] = text.replace("▁", " ") if sentencepiece and not entry.get("special") else text
        if text == unknown:
            types[i] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """SentencePiece merges the pair whose piece scores highest; the earlier a merge is, the higher its piece."""
    rank: dict[str, int] = {}
    for k, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, k)
    return [-float(rank.get(token, 0)) for token in tokens]


def _prefixed(value: Mapping[str, Any]) -> bool:
    """Whether a space is put before text."""
    text = json.dumps([value.get("normalizer"), value.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _add_specials(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for value, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if value is not None:
            add(value)
    plain = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and plain[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
