"""Tokens as bytes: a token may be half a character, and only bytes can be put together again."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """What each token of a tokenizer writes.

    Byte-level tokenizers (GPT-2's, Llama 3's, Qwen's) and those that fall back to bytes (Llama 2's, Gemma's) are read
    exactly; of any other kind a token writes what it adds to the text of a token before it.

    Args:
        tokenizer: of transformers.

    Attributes:
        size: ids are below it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        named = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._special = frozenset((*map(int, named), *map(int, tokenizer.all_special_ids)))
        self.size = max(len(tokenizer), *(i + 1 for i in self._added), 1)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_of = _bytes_of_characters() if backend is not None and "ByteLevel" in str(backend.decoder) else None
        self._anchor = int(tokenizer("a", add_special_tokens=False)["input_ids"][-1])
        self.bytes = cache(self._bytes)
        self.shown = cache(self._shown)

    @property
    def longest(self) -> int | None:
        """Bytes that no token writes more of; ``None`` where a tokenizer may leave out some of a text's."""
        added = self._tokenizer.added_tokens_decoder.values()
        if self._byte_of is None or self._tokenizer.backend_tokenizer.normalizer is not None:
            return None
        if any(token.lstrip or token.rstrip for token in added):
            return None
        return max(len(self._bytes(token)) for token in range(self.size))

    def special(self, token: int) -> bool:
        """Whether it steers, and is no text: the end of a turn, a beginning."""
        return token in self._special

    def _bytes(self, token: int) -> bytes:
        """What ``token`` writes, UTF-8; of a special token, its name."""
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.convert_ids_to_tokens(token) if token < self.size else None
        if name is None:
            return b""  # the model has more rows than the tokenizer has tokens
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in name)
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes.fromhex(byte[1])
        before, after = (
            self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in ([self._anchor], [self._anchor, token])
        )
        return str(after)[len(before) :].encode()

    def _shown(self, token: int) -> str:
        """Its text; where it is no whole characters, ``bytes:\\xe4\\xbd``, as OpenAI writes it."""
        content: bytes = self.bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
