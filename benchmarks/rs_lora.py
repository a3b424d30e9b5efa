"""What the sweeps of ``examples/rs-lora`` say: the tables of ``docs/rs-lora.md``, made from their results.

Nothing is trained here. The results were made by ``lorchestra sweep examples/rs-lora/NAME.yaml`` and lie in
``benchmarks/results/sweeps``::

    python benchmarks/rs_lora.py                         # prints every table
    python benchmarks/rs_lora.py --docs docs/rs-lora.md  # writes them where the page has their markers

Differences are paired: the same seed, the same test items. Their 95 % intervals cover another seed as well as other
items (``lorchestra.stats.crossed``); what is known of a seed as a whole (a loss, a curve) has Student's interval over
the seeds. The anchor gives all scalings the same scale at rank 8: the three are one training there, shown once.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lorchestra.stats.crossed import crossed_ratio
from lorchestra.stats.intervals import Interval, student
from lorchestra.sweep.outcome import Outcome
from lorchestra.sweep.table import Row, ScoreTable, row_of, scores

RESULTS = Path(__file__).parent / "results" / "sweeps"
ANCHOR = 8
SAME = "all three"  # the scalings at the anchor
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Key = tuple[Any, ...]


class Sweep:
    """The finished trainings of one sweep, by setting.

    Args:
        name: of its file in :data:`RESULTS`.
        keys: of its axes, without their section: ``rank``, ``scaling``.
        groups: values of the axes → trainings, in the order of their seeds, which are the same everywhere.
    """

    def __init__(self, name: str) -> None:
        told = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        self.name = name
        axes = list(told["spec"]["axes"])
        self.keys = tuple(axis.rpartition(".")[2] for axis in axes)
        self.groups: dict[Key, list[Outcome]] = {}
        for cell in told["cells"]:
            outcome = Outcome.from_dict(cell)
            if outcome.state == "done":
                self.groups.setdefault(tuple(outcome.settings[axis] for axis in axes), []).append(outcome)
        whole = set.intersection(*({run.seed for run in group} for group in self.groups.values()))
        for key, group in self.groups.items():  # a sweep that was ended early has some settings with one seed more
            self.groups[key] = sorted((run for run in group if run.seed in whole), key=lambda run: run.seed)
        self.rows: dict[Key, Row] = {key: row_of(group, axes) for key, group in self.groups.items()}

    def values(self, name: str) -> list[Any]:
        """The values of one axis, in order."""
        place = self.keys.index(name)
        return list(dict.fromkeys(key[place] for key in self.groups))

    def at(self, **values: Any) -> Key:
        """The setting with these values."""
        return tuple(values[name] for name in self.keys)

    def score(self, key: Key) -> ScoreTable:
        """Test scores of a setting.

        Raises:
            ValueError: it has none.
        """
        found = scores(self.groups[key])
        if found is None:
            raise ValueError(f"{self.name}: no test scores for {key}")
        return found

    def difference(self, ours: Sequence[Key], theirs: Sequence[Key]) -> Interval:
        """Mean score of the settings ``ours`` minus that of ``theirs``, pair by pair, seed by seed, item by item."""
        tables = [(self.score(a), self.score(b)) for a, b in zip(ours, theirs, strict=True)]
        return crossed_ratio(np.mean([a.values - b.values for a, b in tables], axis=0), groups=tables[0][0].groups)

    def by_seed(self, ours: Sequence[Key], theirs: Sequence[Key], of: Callable[[Outcome], float]) -> Interval:
        """Mean of ``of`` over the settings ``ours`` minus that over ``theirs``, with Student's interval over seeds."""
        pairs = [(self.groups[a], self.groups[b]) for a, b in zip(ours, theirs, strict=True)]
        apart = [[of(mine) - of(other) for mine, other in zip(a, b, strict=True)] for a, b in pairs]
        values = [fmean(seed) for seed in zip(*apart, strict=True)]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return student(fmean(values), error, len(values))


# ---- what is measured of a training


def after_first_epoch(run: Outcome) -> float:
    """Validation loss after one epoch, nats a token."""
    return next(loss for step, loss in run.validation if step >= run.steps_per_epoch)


def mean_training_loss(run: Outcome) -> float:
    """Mean over all steps, nats a token: the area under the curve. A faster training has less."""
    return fmean(loss for loss, _ in run.history)


def last_validation(run: Outcome) -> float:
    """Validation loss at the end, nats a token."""
    found = run.final_validation_loss
    if found is None:
        raise ValueError("a training without validation")
    return found


# ---- tables


@lru_cache
def sweep_of(name: str) -> Sweep:
    """Read once."""
    return Sweep(name)


def ways(sweep: Sweep, rank: int) -> list[Key]:
    """Every scaling and initialisation at a rank."""
    return [
        sweep.at(rank=rank, scaling=way, init=init) for init in sweep.values("init") for way in sweep.values("scaling")
    ]


def article_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """The article's table, rank by rank, over all scalings and initialisations."""
    yield (
        "r", "validation loss over seeds", "gradient norm over seeds", "diverged", "test accuracy", "95 %", "gap",
        "loss rose", "parameters", "time",
    )  # fmt: skip
    for rank in sweep.values("rank"):
        chosen = ways(sweep, rank)
        rows, runs = [sweep.rows[key] for key in chosen], [run for key in chosen for run in sweep.groups[key]]
        tables = [sweep.score(key) for key in chosen]
        accuracy = crossed_ratio(np.mean([table.values for table in tables], axis=0), groups=tables[0].groups)
        spread = math.sqrt(fmean((row.validation_spread or 0) ** 2 for row in rows))
        gradient = math.sqrt(fmean((row.gradient_spread or 0) ** 2 for row in rows))
        yield (
            str(rank), f"± {spread:.3f}", f"± {gradient:.0%}", str(sum(row.diverged for row in rows)),
            *_estimate(accuracy), f"{fmean(row.gap or 0 for row in rows):+.2f}",
            f"{sum(run.onset is not None for run in runs)} of {len(runs)}",
            f"{rows[0].trainable / 1e6:.1f} M", f"{min(run.seconds for run in runs):.0f} s",
        )  # fmt: skip


def settings_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """What became of every rank, scaling and initialisation."""
    yield (
        "r", "scaling", "init", "γ", "learning rate", "validation loss", "over seeds", "gradient norm", "over seeds",
        "test accuracy", "95 %", "gap", "parameters", "time",
    )  # fmt: skip
    for key, row in sweep.rows.items():
        rank, scaling, init = key
        if rank == ANCHOR and scaling != sweep.values("scaling")[0]:
            continue
        runs = sweep.groups[key]
        yield (
            str(rank), SAME if rank == ANCHOR else scaling, init, f"{row.scale:.3g}",
            f"{row.learning_rate:.2g}", f"{row.validation:.3f}", f"± {row.validation_spread or 0:.3f}",
            f"{row.gradient:.2f}", f"± {row.gradient_spread or 0:.0%}", *_estimate(row.test), f"{row.gap:+.2f}",
            f"{row.trainable / 1e6:.1f} M", f"{min(run.seconds for run in runs):.0f} s",
        )  # fmt: skip


def start_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """The first gradient's norm by rank, and its exponent in r: B is still zero."""
    ranks = sweep.values("rank")
    yield ("scaling", "init", *(f"r = {rank}" for rank in ranks), "exponent of r", "over seeds")
    for init in sweep.values("init"):
        for scaling in sweep.values("scaling"):
            norms = np.array(
                [
                    [run.history[0][1] for run in sweep.groups[sweep.at(rank=rank, scaling=scaling, init=init)]]
                    for rank in ranks
                ]
            )
            slopes = np.polyfit(np.log(ranks), np.log(norms), 1)[0]
            cells = (f"{norm:.2f}" for norm in norms.mean(axis=1))
            yield (scaling, init, *cells, f"{slopes.mean():+.2f}", f"± {slopes.std(ddof=1):.2f}")


def rank_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """Test accuracy of every rank minus that of rank 8 with the same initialisation: what a wrong guess costs."""
    ranks = [rank for rank in sweep.values("rank") if rank != ANCHOR]
    all_ways = {rank: ways(sweep, rank) for rank in (ANCHOR, *ranks)}
    yield ("scaling", "init", *(f"r = {rank}" for rank in ranks))
    for place, start in enumerate(all_ways[ANCHOR]):
        found = [sweep.difference([all_ways[rank][place]], [start]) for rank in ranks]
        named = dict(zip(sweep.keys, start, strict=True))
        yield (named["scaling"], named["init"], *map(_signed, found))
    whole = [sweep.difference(all_ways[rank], all_ways[ANCHOR]) for rank in ranks]
    yield ("mean of the six", "", *map(_signed, whole))
    losses = [sweep.by_seed(all_ways[rank], all_ways[ANCHOR], last_validation) for rank in ranks]
    yield ("mean of the six, validation loss", "", *map(_signed, losses))


COMPARED = {
    "rslora − lora": ({"scaling": "rslora", "init": "kaiming"}, {"scaling": "lora", "init": "kaiming"}),
    "constant − lora": ({"scaling": "constant", "init": "kaiming"}, {"scaling": "lora", "init": "kaiming"}),
    "rescaled − kaiming, at rslora": (
        {"scaling": "rslora", "init": "rescaled"}, {"scaling": "rslora", "init": "kaiming"},
    ),
    "the article's: constant × rescaled − lora × kaiming": (
        {"scaling": "constant", "init": "rescaled"}, {"scaling": "lora", "init": "kaiming"},
    ),
}  # fmt: skip


def _compared(sweep: Sweep, name: str, ranks: Sequence[int]) -> tuple[list[Key], list[Key]]:
    """The two settings of :data:`COMPARED` at each of these ranks."""
    ours, theirs = COMPARED[name]
    return [sweep.at(rank=rank, **ours) for rank in ranks], [sweep.at(rank=rank, **theirs) for rank in ranks]


def accuracy_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """Differences in test accuracy of the ways to stabilise the rank, at each rank and over those but the anchor."""
    ranks = sweep.values("rank")
    apart = [rank for rank in ranks if rank != ANCHOR]
    shown = {**{f"r = {rank}": [rank] for rank in ranks}, "mean of 4, 16, 32": apart[:-1], "and 64": apart}
    yield ("test accuracy", *shown)
    for name in COMPARED:
        yield (name, *(_signed(sweep.difference(*_compared(sweep, name, chosen))) for chosen in shown.values()))


def speed_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """How fast the loss falls: differences over all ranks but the anchor, paired by seed. Less is faster."""
    measures = {
        "mean training loss": mean_training_loss,
        "validation after 1 epoch": after_first_epoch,
        "validation at the end": last_validation,
    }
    apart = [rank for rank in sweep.values("rank") if rank != ANCHOR]
    yield ("nats a token", *(f"{name}, r = {span}" for name in measures for span in ("4 to 64", "4 to 32")))
    for name in COMPARED:
        yield (
            name,
            *(
                _signed(sweep.by_seed(*_compared(sweep, name, chosen), of))
                for of in measures.values()
                for chosen in (apart, apart[:-1])
            ),
        )


def noise_table(sweep: Sweep) -> Iterator[Sequence[str]]:
    """Test accuracy by share of wrong training labels, and what the difference of the scalings becomes."""
    clean, *noisy = sweep.values("noise")
    spans = [[clean], *([share] for share in noisy), noisy]
    yield ("test accuracy", *(f"{share:.0%} wrong" for share in (clean, *noisy)), "mean of the wrong")
    for scaling in sweep.values("scaling"):
        rows = [sweep.rows[sweep.at(noise=share, scaling=scaling)] for share in (clean, *noisy)]
        yield (
            scaling,
            *(_whole(row.test) for row in rows),
            f"{fmean(row.test.estimate for row in rows[1:] if row.test):.3f}",
        )
    both = [
        [[sweep.at(noise=share, scaling=scaling) for share in span] for scaling in ("rslora", "lora")] for span in spans
    ]
    yield ("rslora − lora", *(_signed(sweep.difference(ours, theirs)) for ours, theirs in both))
    start = [found[0] for found in both[0]]
    yield ("and more than at 0% by", "0", *(_signed(_interaction(sweep, *found, *start)) for found in both[1:]))


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
            scaling, *(f"{_whole(sweep.rows[key].test)}; {sweep.rows[key].validation:.3f}" for key in keys),
            _signed(sweep.difference(last, first)), _signed(sweep.by_seed(last, first, last_validation)),
        )  # fmt: skip


def _estimate(found: Interval | None) -> tuple[str, str]:
    return ("–", "") if found is None else (f"{found.estimate:.3f}", f"[{found.low:.3f}, {found.high:.3f}]")


def _whole(found: Interval | None) -> str:
    return " ".join(_estimate(found))


def _signed(found: Interval) -> str:
    """With its interval if there is one, bold where that leaves zero out; ``0`` where there is no difference at all."""
    if found.low == found.high == 0:
        return "0"
    if math.isinf(found.high):  # of one seed, which tells nothing of another
        return f"{found.estimate:+.3f}"
    text = f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.excludes(0) else text


Table = Callable[[Sweep], Iterator[Sequence[str]]]
OF_RANKS: Mapping[str, Table] = {
    "article": article_table,
    "start": start_table,
    "settings": settings_table,
    "ranks": rank_table,
    "accuracy": accuracy_table,
    "speed": speed_table,
}
TABLES: Mapping[str, tuple[str, Table]] = {
    f"{task}-{kind}": (f"ranks-{task}", table) for task in ("subjects", "reviews") for kind, table in OF_RANKS.items()
} | {"one-rate": ("one-rate", one_rate_table), "noise": ("noise", noise_table)}


def markdown(name: str) -> str:
    """A table by its name."""
    source, make = TABLES[name]
    head, *body = make(sweep_of(source))
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)) + "\n"


def filled(page: str) -> str:
    """``page`` with every marked table made anew."""
    return MARK.sub(lambda found: f"{found[1]}{markdown(found[2])}{found[4]}", page)


def main() -> None:
    """Print the tables, or write them into a page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--docs", type=Path, help="a page with markers: <!-- table: NAME --> … <!-- end -->")
    options.add_argument("--table", choices=list(TABLES), action="append", help="only this one; repeat")
    asked = options.parse_args()
    if asked.docs:
        asked.docs.write_text(filled(asked.docs.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name in asked.table or TABLES:
        print(f"{name}\n\n{markdown(name)}")


if __name__ == "__main__":
    main()
