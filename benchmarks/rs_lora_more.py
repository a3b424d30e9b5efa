"""Tables of the sweeps with one question each; for ``benchmarks/rs_lora.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np
from rs_lora_parts import (
    Key,
    Sweep,
    last_validation,
    mean_training_loss,
    signed,
    whole,
)

from lorchestra.stats.crossed import crossed_ratio
from lorchestra.stats.intervals import Interval
from lorchestra.sweep.cells import worded


def noise_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """Test accuracy by share of wrong training labels, and what the difference of the scalings becomes."""
    return _harm(sweep, "noise", "{:.0%} wrong", "the wrong")


def imbalance_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """Test accuracy by how uneven the classes are, and what the difference of the scalings becomes."""
    return _harm(sweep, "imbalance", "{} : 1", "the uneven")


def _harm(sweep: Sweep, of: str, words: str, all_called: str) -> Iterator[Sequence[str]]:
    clean, *noisy = sweep.values(of)
    spans = [[clean], *([share] for share in noisy), noisy]
    yield ("test accuracy", *(words.format(share) for share in (clean, *noisy)), f"mean of {all_called}")
    for scaling in sweep.values("scaling"):
        rows = [sweep.rows[sweep.at(**{of: share}, scaling=scaling)] for share in (clean, *noisy)]
        yield (
            scaling,
            *(whole(row.test) for row in rows),
            f"{fmean(row.test.estimate for row in rows[1:] if row.test):.3f}",
        )
    both = [
        [[sweep.at(**{of: share}, scaling=scaling) for share in span] for scaling in ("rslora", "lora")]
        for span in spans
    ]
    yield ("rslora − lora", *(signed(sweep.difference(ours, theirs)) for ours, theirs in both))
    start = [found[0] for found in both[0]]
    more = [_interaction(sweep, ours, theirs, start[0], start[1]) for ours, theirs in both[1:]]
    yield (f"and more than at {words.format(clean).removesuffix(' wrong')} by", "0", *map(signed, more))


def _interaction(sweep: Sweep, ours: Sequence[Key], theirs: Sequence[Key], our: Key, their: Key) -> Interval:
    """Mean of ``ours`` − ``theirs``, minus (``our`` − ``their``), paired by seed and item."""
    start = sweep.score(our).values - sweep.score(their).values
    apart = [sweep.score(a).values - sweep.score(b).values - start for a, b in zip(ours, theirs, strict=True)]
    return crossed_ratio(np.mean(apart, axis=0), groups=sweep.score(our).groups)


def one_rate_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """One learning rate at every rank: validation loss, test accuracy, and the span over ranks."""
    ranks = sweep.values("rank")
    yield ("scaling", *(f"r = {rank}" for rank in ranks), f"r = {ranks[-1]} − r = {ranks[0]}", "validation loss, same")
    for scaling in sweep.values("scaling"):
        keys = [sweep.at(rank=rank, scaling=scaling) for rank in ranks]
        first, last = keys[:1], keys[-1:]
        yield (
            scaling, *(f"{whole(sweep.rows[key].test)}; {sweep.rows[key].validation:.3f}" for key in keys),
            signed(sweep.difference(last, first)), signed(sweep.by_seed(last, first, last_validation)),
        )  # fmt: skip
    for ours in ("rslora", "constant"):
        pairs = [([sweep.at(rank=r, scaling=ours)], [sweep.at(rank=r, scaling="lora")]) for r in ranks]
        accuracy = (signed(sweep.difference(*pair)) for pair in pairs)
        losses = (signed(sweep.by_seed(*pair, last_validation)) for pair in pairs)
        yield (f"{ours} − lora", *("; ".join(both) for both in zip(accuracy, losses, strict=True)), "", "")


def against_table(sweep: Sweep, reference: int = 0) -> Iterator[Sequence[str]]:
    """What became of every setting, and what it has more or less than the ``reference``-th."""
    against = list(sweep.groups)[reference]
    yield (
        ", ".join(sweep.keys), "validation loss", "over seeds", "test accuracy", "gap", "loss rose",
        "test accuracy, more", "validation loss at the end, more", "mean training loss, more",
    )  # fmt: skip
    for key, row in sweep.rows.items():
        differences = (
            signed(sweep.difference([key], [against])),
            signed(sweep.by_seed([key], [against], last_validation)),
            signed(sweep.by_seed([key], [against], mean_training_loss)),
        )
        yield (
            ", ".join(worded(part) for part in key), f"{row.validation:.3f}", f"± {row.validation_spread or 0:.3f}",
            whole(row.test), f"{row.gap:+.2f}", f"{row.rising} of {row.done}",
            *(("", "", "") if key == against else differences),
        )  # fmt: skip


def sizes_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """The ranks beside each other, size by size."""
    low, high = sweep.values("rank")
    yield (
        "training examples", f"r = {low}", f"r = {high}", f"r = {high} − r = {low}", "validation loss, same", "gap",
        "loss rose",
    )  # fmt: skip
    for size in sweep.values("size"):
        one, two = sweep.at(size=size, rank=low), sweep.at(size=size, rank=high)
        rows = sweep.rows[one], sweep.rows[two]
        yield (
            f"{size:,}", *(f"{whole(row.test)}; {row.validation:.3f}" for row in rows),
            signed(sweep.difference([two], [one])), signed(sweep.by_seed([two], [one], last_validation)),
            " · ".join(f"{row.gap:+.2f}" for row in rows), " · ".join(f"{row.rising} of {row.done}" for row in rows),
        )  # fmt: skip
