"""Texts that say almost the same: MinHash LSH finds the candidates, their exact Jaccard similarity decides."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

SIMILAR = 0.8  # Jaccard similarity of shingles from which two texts count as near-duplicates
_CANDIDATE = 0.55  # what the hash tables look for: lower, so that fewer than 1 % of the pairs at 0.8 escape
_PERMUTATIONS = 64
_WIDTH = 3
_LONGEST = 3_000  # tokens of a text that are looked at

# Scripts that write without spaces count character by character, others word by word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def shingles(text: str) -> np.ndarray:
    """Sorted unique uint32 hashes ``[n]`` of the three-token pieces of a normalised text."""
    tokens = [match[0] for match in _TOKEN.finditer(text)][:_LONGEST]
    pieces = range(max(1, len(tokens) - _WIDTH + 1)) if tokens else ()
    hashes = [zlib.crc32("\x1f".join(tokens[i : i + _WIDTH]).encode()) for i in pieces]
    return np.unique(np.array(hashes, np.uint32))


def without_boilerplate(sets: Sequence[np.ndarray], sources: Sequence[Hashable]) -> list[np.ndarray]:
    """``sets`` without what more than half of the texts of the same source have: the words of a prompt template
    make no two texts alike. Sources of fewer than ten texts stay as they are."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, source in enumerate(sources):
        members[source].append(i)
    out = list(sets)
    for indices in members.values():
        if len(indices) < 10:
            continue
        counts = Counter(np.concatenate([sets[i] for i in indices]).tolist())
        common = np.array([piece for piece, n in counts.items() if 2 * n > len(indices)], np.uint32)
        for i in indices:
            out[i] = np.setdiff1d(sets[i], common, assume_unique=True)
    return out


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two shingle sets; 0 of empty ones."""
    both = np.intersect1d(a, b, assume_unique=True).size
    return both / (a.size + b.size - both) if a.size and b.size else 0.0


def but_for_numbers(texts: Sequence[str]) -> list[list[int]]:
    """Indices of texts that are the same but for their numbers (``3 days``, ``12 days``), group by group."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        pattern, numbers = _NUMBER.subn("0", text)
        if numbers:
            groups[pattern].append(i)
    return [indices for indices in groups.values() if len(indices) > 1]


def near_pairs(sets: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs ``(i, j)``, i < j, whose similarity is at least :data:`SIMILAR`."""
    from datasketch import MinHash, MinHashLSH

    tables = MinHashLSH(threshold=_CANDIDATE, num_perm=_PERMUTATIONS)
    blank = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
    pairs: list[tuple[int, int]] = []
    for j, pieces in enumerate(sets):
        if not pieces.size:
            continue
        sketch = blank.copy()
        sketch.update_batch(pieces)
        pairs += [(i, j) for i in sorted(tables.query(sketch)) if similarity(sets[i], pieces) >= SIMILAR]
        tables.insert(j, sketch)
    return pairs
