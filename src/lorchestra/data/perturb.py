"""Fewer, wrongly labelled or unevenly spread training examples, on purpose: how well does a method bear it?

Every function is one of the examples, an amount and a seed, and of nothing else: who is kept or changed is decided by a
hash of what the example says, so that it is the same in every process, and a larger amount contains the smaller one.
Give them a stage's *training* part only: a verdict on perturbed validation or test examples says nothing.

If several are wanted: :func:`imbalanced`, then :func:`subset`, then :func:`with_label_noise`. The profile survives the
subset as any share does, sizes stay comparable over ratios, and the count of wrong labels is exact at the end.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from lorchestra.data.example import Example, Message
from lorchestra.data.split import content_key, normalise
from lorchestra.errors import DataError, counted

PER_CLASS = 4  # examples that one answer stands for, on average, if the answers are classes


def subset(examples: Sequence[Example], n: int, seed: int) -> tuple[Example, ...]:
    """``n`` of ``examples``, in their order; ``subset(…, 100)`` is part of ``subset(…, 300)``.

    Groups are taken one after the other, in the order of their hashes, so that at most one is taken in part.

    Raises:
        DataError: ``n`` below 1, or fewer examples than ``n``.
    """
    if n < 1:
        raise DataError(f"a subset of {n} training examples was asked for; expected at least 1")
    if n > len(examples):
        raise DataError(
            f"a subset of {n} training examples was asked for, and there are {len(examples)}; "
            "ask for fewer, or give the stage more data or a larger training share"
        )
    return _in_place(examples, _order(examples, lambda e: (_rank(seed, "group", _group(e)), _own(e, seed, "size")))[:n])


def with_label_noise(examples: Sequence[Example], share: float, seed: int) -> tuple[Example, ...]:
    """``examples``, of which exactly ``round(share · n)`` have a wrong gold answer; what is wrong at 10 % is wrong at
    20 % too, and in the same way.

    What a wrong answer is depends on the example:

    - a preference pair: chosen and rejected change places;
    - multiple choice: another of its choices, each as likely;
    - one of a few labels (an answer stands for :data:`PER_CLASS` examples or more): another label, each as likely;
    - free text: the answer of another example. As long as no answer is that of more than half of the examples this is
      a derangement: at ``share`` 1 every answer is given once, and to a question it does not belong to.

    An answer that differs in letter case or white space only is not a wrong one.

    Raises:
        DataError: a share outside 0 … 1, or an example for which there is no wrong answer.
    """
    if not 0 <= share <= 1:
        raise DataError(f"a share of {share:g} wrong labels was asked for; expected 0 to 1 (0.1 is one in ten)")
    wrong = _order(examples, lambda e: _own(e, seed, "noise"))[: round(share * len(examples))]
    plain = [i for i, e in enumerate(examples) if e.rejected is None and not e.choices]
    others = _other_answers([examples[i] for i in plain], seed) if set(plain) & set(wrong) else ()
    given = dict(zip(plain, others, strict=False))
    changed = list(examples)
    for i in wrong:
        changed[i] = _mislabelled(examples[i], given.get(i), seed)
    return tuple(changed)


def imbalanced(examples: Sequence[Example], ratio: float, seed: int) -> tuple[Example, ...]:
    """``examples`` with its K classes (gold answers) thinned to the sizes s, s·q, s·q², …, s/``ratio``, for
    q = ratio^(−1/(K−1)), rounded, in the order of the sizes they have; s is as large as they allow.

    ``ratio`` 1 thins every class to the smallest. The sizes do not depend on the seed, unless two classes are equally
    large: then the hash decides which is the rarer one. What is kept of a class for one ratio contains, or is contained
    in, what is kept for another.

    Raises:
        DataError: a ratio below 1, no classes (free text, or one answer only), or classes too small for the ratio.
    """
    if not 1 <= ratio < math.inf:
        raise DataError(f"an imbalance of {ratio:g} was asked for; expected largest class : smallest class, at least 1")
    sizes = Counter(normalise(e.gold) for e in examples)
    if not _are_labels(sizes):
        raise DataError(
            f"imbalance needs classes, and {counted(len(examples), 'training example')} with "
            f"{counted(len(sizes), 'distinct answer')} have none; expected two answers or more, each for "
            f"{PER_CLASS} examples on average. Leave imbalance out for this stage"
        )
    classes = sorted(sizes, key=lambda label: (-sizes[label], _rank(seed, "class", label)))
    shrink = [ratio ** (-k / (len(classes) - 1)) for k in range(len(classes))]
    largest = math.floor(min(sizes[label] / q for label, q in zip(classes, shrink, strict=True)) + 1e-9)
    if largest < ratio:
        raise DataError(
            f"an imbalance of {ratio:g} was asked for, and the largest class would have "
            f"{counted(largest, 'example')}, the smallest less than one; ask for at most {largest}, or give more data"
        )
    keep = {label: round(largest * q) for label, q in zip(classes, shrink, strict=True)}
    kept: list[int] = []
    for i in _order(examples, lambda e: _own(e, seed, "balance")):
        label = normalise(examples[i].gold)
        if keep[label]:
            keep[label] -= 1
            kept.append(i)
    return _in_place(examples, kept)


def _rank(seed: int, purpose: str, *texts: str) -> bytes:
    """A uniform draw that depends on its arguments alone; ``purpose`` keeps the draws of one seed independent."""
    return hashlib.sha256("\0".join((str(seed), purpose, *texts)).encode()).digest()


def _own(example: Example, seed: int, purpose: str) -> bytes:
    return _rank(seed, purpose, *content_key(example))


def _group(example: Example) -> str:
    """What the split goes by: an example without a group is its own."""
    return normalise(example.group) or content_key(example)[0]


def _order(examples: Sequence[Example], key: Callable[[Example], bytes | tuple[bytes, ...]]) -> list[int]:
    """Places by ``key``; of equal examples the first comes first."""
    keys = [key(example) for example in examples]
    return sorted(range(len(examples)), key=lambda i: (keys[i], i))


def _in_place(examples: Sequence[Example], kept: Iterable[int]) -> tuple[Example, ...]:
    return tuple(examples[i] for i in sorted(kept))


def _are_labels(answers: Counter[str]) -> bool:
    """Whether answers (normalised, with their counts) are a few labels, rather than free text."""
    return len(answers) >= 2 and answers.total() >= PER_CLASS * len(answers)


def _mislabelled(example: Example, other: str | None, seed: int) -> Example:
    if example.rejected is not None:
        return replace(_answering(example, example.rejected), rejected=example.gold)
    if example.choices:
        wrong = [choice for choice in example.choices if normalise(choice) != normalise(example.gold)]
        other = wrong[_draw(example, seed, len(wrong))] if wrong else None
    if other is None:
        raise DataError(
            f"{example.origin or 'an example'}: there is no wrong answer to give it, since every other one is "
            f"{example.gold[:60]!r} too; label noise needs two answers at least"
        )
    return _answering(example, other)


def _answering(example: Example, gold: str) -> Example:
    return replace(example, messages=(*example.prompt, Message(example.messages[-1].role, gold)))


def _draw(example: Example, seed: int, n: int) -> int:
    """One of 0 … n−1, from 256 bits, so that the remainder's bias is nil."""
    return int.from_bytes(_own(example, seed, "label"), "big") % n


def _other_answers(examples: Sequence[Example], seed: int) -> list[str | None]:
    """For each of ``examples`` (no pairs, no choices) the wrong answer that it is to get, ``None`` if there is none."""
    answers = [normalise(e.gold) for e in examples]
    sizes = Counter(answers)
    if len(sizes) < 2:
        return [None] * len(examples)
    if _are_labels(sizes):
        written = {answer: e.gold for answer, e in zip(reversed(answers), reversed(examples), strict=True)}
        labels = sorted(sizes)
        return [
            written[[label for label in labels if label != answer][_draw(e, seed, len(labels) - 1)]]
            for answer, e in zip(answers, examples, strict=True)
        ]
    # Equal answers side by side, and each example gets the answer that stands as many places on as the commonest
    # answer is common: that lies behind its own kind, and before it again as long as no kind is more than a half.
    order = _order(examples, lambda e: (_rank(seed, "answer", normalise(e.gold)), _own(e, seed, "answer")))
    shift, n = max(sizes.values()), len(order)
    given: list[str | None] = [None] * n
    for place, i in enumerate(order):
        far = (order[(place + shift + step) % n] for step in range(n))
        given[i] = examples[next(j for j in far if answers[j] != answers[i])].gold
    return given
