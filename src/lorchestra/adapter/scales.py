"""The scale that a PEFT configuration gives each module, as PEFT itself works it out."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from lorchestra.errors import AdapterError

# Patterns of a foreign file are untrusted regular expressions: all of them together get this long, in seconds.
PATTERN_SECONDS = 1.0
_LONGEST_PATTERN = 1000
_LARGEST = 1e30
# No operator of regular expressions unless escaped; dots are taken as dots.
_TEXT = re.compile(r"(?:\\\W|[^\\()\[\]{}?*+|^$])+")


def module_scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Module path → s of ΔW = s·B·A: α/r, or α/√r with ``use_rslora``; r and α by ``rank_pattern``, ``alpha_pattern``.

    Args:
        config: ``adapter_config.json``.
        ranks: module path → r of the stored factors.

    Raises:
        AdapterError: a rank that is not the stored factors', a number or pattern that cannot be used.
    """
    empty = [path for path, rank in ranks.items() if rank < 1]
    if empty:
        raise AdapterError(f"module {empty[0]!r} has rank 0; an update needs at least rank 1")
    r_of = Patterns(config, "rank_pattern", "r").values(ranks)
    alpha_of = Patterns(config, "alpha_pattern", "lora_alpha").values(ranks)
    scales = {}
    for path, rank in ranks.items():
        if r_of[path] != rank:
            raise AdapterError(
                f"module {path!r}: the configuration says rank {r_of[path]:g}, the weights have rank {rank}, so its "
                "scale is not known; correct r or rank_pattern in adapter_config.json to what it was trained with"
            )
        scales[path] = alpha_of[path] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


class Patterns:
    """``{pattern: number}`` of a configuration, with a number for all other modules.

    As in PEFT, a pattern is a regular expression for the end of a path (``(.*\\.)?(pattern)$``) and the first that
    matches counts. One without operators but dots, escaped or not, is compared as text.
    """

    def __init__(self, config: Mapping[str, Any], key: str, default_key: str) -> None:
        self.key = key
        table = config.get(key) or {}
        if not isinstance(table, Mapping):
            raise AdapterError(f"{key} should map patterns to numbers; it is {type(table).__name__}")
        self.default = _number(default_key, config.get(default_key))
        self.literal: dict[str, int] = {}  # text → its place among the patterns
        self.expressions: list[tuple[int, str, Any]] = []
        self.numbers: list[float] = []
        for place, (pattern, value) in enumerate(table.items()):
            self.numbers.append(_number(f"{key}[{pattern!r}]", value))
            text = _as_text(pattern)
            if text is not None:
                self.literal.setdefault(text, place)
            else:
                self.expressions.append((place, pattern, self._compiled(pattern)))

    def values(self, paths: Iterable[str]) -> dict[str, float]:
        """Module path → its number.

        Raises:
            AdapterError: the patterns take longer than :data:`PATTERN_SECONDS`.
        """
        deadline = time.monotonic() + PATTERN_SECONDS
        return {path: self._value(path, deadline) for path in paths}

    def _value(self, path: str, deadline: float) -> float:
        parts = path.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        first = min((self.literal[end] for end in ends if end in self.literal), default=len(self.numbers))
        for place, pattern, expression in self.expressions:
            if place > first:
                break
            try:
                if expression.match(path, timeout=max(deadline - time.monotonic(), 1e-3)):
                    first = place
                    break
            except TimeoutError:
                raise AdapterError(
                    f"{self.key}: matching {pattern!r} takes too long; write the modules' names instead"
                ) from None
        return self.numbers[first] if first < len(self.numbers) else self.default

    def _compiled(self, pattern: str) -> Any:
        import regex

        if len(pattern) > _LONGEST_PATTERN:
            raise AdapterError(f"{self.key}: a pattern of {len(pattern)} characters is refused")
        try:
            return regex.compile(rf"(.*\.)?({pattern})$")
        except (regex.error, RecursionError) as error:
            raise AdapterError(f"{self.key}: {pattern!r} is no regular expression that works: {error}") from None


def _as_text(pattern: str) -> str | None:
    """``layers\\.0\\.q_proj`` and ``layers.0.q_proj`` → ``layers.0.q_proj``; ``None`` for a true expression."""
    return re.sub(r"\\(.)", r"\1", pattern, flags=re.DOTALL) if _TEXT.fullmatch(pattern) else None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise AdapterError(f"adapter_config.json: {name} should be a number; it is {value!r}")
    return float(value)
