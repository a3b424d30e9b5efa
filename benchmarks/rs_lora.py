"""What the sweeps of ``examples/rs-lora`` say: the tables of ``docs/rs-lora.md``, made from their results.

Nothing is trained here. The results were made by ``lorchestra sweep examples/rs-lora/NAME.yaml`` and lie in
``benchmarks/results/sweeps``::

    python benchmarks/rs_lora.py          # prints every table
    python benchmarks/rs_lora.py --docs   # writes them where the pages have their markers

How they are compared is in ``rs_lora_parts.py``. The anchor gives all scalings the same scale at rank 8: the three are
one training there, shown once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from rs_lora_more import against_table, imbalance_table, noise_table, one_rate_table, sizes_table
from rs_lora_parts import (
    Key,
    Sweep,
    after_first_epoch,
    estimate,
    last_validation,
    mean_training_loss,
    signed,
    sweep_of,
)

from lorchestra.stats.crossed import crossed_ratio

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/rs-lora.md", ROOT / "examples/medical/README.md")
ANCHOR = 8
SAME = "all three"  # the scalings at the anchor
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


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
            *estimate(accuracy), f"{fmean(row.gap or 0 for row in rows):+.2f}",
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
            f"{row.gradient:.2f}", f"± {row.gradient_spread or 0:.0%}", *estimate(row.test), f"{row.gap:+.2f}",
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
        yield (named["scaling"], named["init"], *map(signed, found))
    whole = [sweep.difference(all_ways[rank], all_ways[ANCHOR]) for rank in ranks]
    yield ("mean of the six", "", *map(signed, whole))
    losses = [sweep.by_seed(all_ways[rank], all_ways[ANCHOR], last_validation) for rank in ranks]
    yield ("mean of the six, validation loss", "", *map(signed, losses))


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
        yield (name, *(signed(sweep.difference(*_compared(sweep, name, chosen))) for chosen in shown.values()))


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
                signed(sweep.by_seed(*_compared(sweep, name, chosen), of))
                for of in measures.values()
                for chosen in (apart, apart[:-1])
            ),
        )


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
} | {
    "one-rate": ("one-rate", one_rate_table),
    "noise": ("noise", noise_table),
    "imbalance": ("imbalance", imbalance_table),
    "sizes": ("sizes", sizes_table),
    **{name: (name, against_table) for name in ("more-examples", "orthogonality", "few")},
    "contexts": ("contexts", partial(against_table, reference=1)),
}


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
    options.add_argument("--docs", action="store_true", help="write them into the pages that have their markers")
    options.add_argument("--table", choices=list(TABLES), action="append", help="only this one; repeat")
    asked = options.parse_args()
    if asked.docs:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name in asked.table or TABLES:
        print(f"{name}\n\n{markdown(name)}")


if __name__ == "__main__":
    main()
