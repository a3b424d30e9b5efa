"""Train / validation / sealed test, by a hash of the group: what belongs together stays together, everywhere."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorchestra.data.example import Example
from lorchestra.errors import DataError


def normalise(text: str) -> str:
    """``text`` without the differences that do not make another text: NFKC, case folded, single spaces.

    Applied to its own result it changes nothing.
    """
    while True:
        folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        if folded == text:
            return folded
        text = folded


@dataclass(frozen=True, slots=True)
class SplitSpec:
    """Shares of the three parts, which add up to 1, and the seed of the hash.

    Raises:
        DataError: a negative share, or a sum that is not 1.
    """

    train: float = 0.8
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.train, self.validation, self.test)
        if not (all(share >= 0 for share in shares) and abs(sum(shares) - 1) < 1e-6):
            raise DataError(
                f"split: got train {self.train}, validation {self.validation}, test {self.test}; "
                "expected three shares that are not negative and add up to 1"
            )


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts, and how many examples were left out as repeated.

    Training examples are in the order of the input. Held-out ones are in the order of their groups' hashes, so that the
    first n of them are a fair sample of all sources, whatever n is.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    duplicates: int = 0

    def parts(self) -> Iterator[tuple[str, tuple[Example, ...]]]:
        """``("train", …)``, ``("validation", …)``, ``("test", …)``."""
        yield "train", self.train
        yield "validation", self.validation
        yield "test", self.test


def content_key(example: Example) -> tuple[str, ...]:
    """What makes two examples the same one: the normalised prompt, gold and rejected answer."""
    prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in example.prompt)
    return normalise(prompt), normalise(example.gold), normalise(example.rejected or "")


def part_of(group: str, spec: SplitSpec) -> str:
    """``train``, ``validation`` or ``test``: a function of the seed and the normalised group, and of nothing else."""
    u = int.from_bytes(_hash(group, spec)[:8], "big") / 2**64
    if u < spec.train:
        return "train"
    # The two ends of the interval meet at train + validation; a share of exactly 0 gets nothing.
    return "validation" if u < spec.train + spec.validation or spec.test == 0 else "test"


def _hash(group: str, spec: SplitSpec) -> bytes:
    return hashlib.sha256(f"{spec.seed}\n{normalise(group)}".encode()).digest()


def split(examples: Iterable[Example], spec: SplitSpec) -> Splits:
    """Put every example into the part of its group; of equal ones (:func:`content_key`) the first counts.

    An example without a group is its own: its prompt decides.
    """
    parts: dict[str, list[tuple[bytes, Example]]] = {"train": [], "validation": [], "test": []}
    seen: set[tuple[str, ...]] = set()
    duplicates = 0
    for example in examples:
        key = content_key(example)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        group = example.group or key[0]
        parts[part_of(group, spec)].append((_hash(group, spec)[8:], example))
    for part in ("validation", "test"):
        parts[part].sort(key=lambda pair: pair[0])
    train, validation, test = (tuple(example for _, example in part) for part in parts.values())
    return Splits(train, validation, test, duplicates)
