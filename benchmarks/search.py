"""Searching the weights of three adapters: ours against a simplex grid that PEFT fuses anew at every point.

PEFT's side is ``add_weighted_adapter`` with ``cat`` (its exact way), the candidate scored, the next one: the 66 points
of the grid with steps of 0.1. Ours is ``search_weights``: the bank mounts the adapters once, and a strategy proposes.
Same base, same items, same number format, in one process. Prints one table and writes
``benchmarks/results/search.json``::

    lorchestra run examples/medical/recipe.yaml                  # trains the three adapters; ten minutes
    python benchmarks/search.py --run runs/medical               # all 66 points with PEFT
    python benchmarks/search.py --run runs/medical --points 22   # times 22 of them, and multiplies
    python benchmarks/search.py --run runs/medical --together    # only whether candidates gain from sharing passes
    python benchmarks/search.py --short                          # a tiny random model, 15 points: for CI

PEFT's candidates are scored twice over: in the plain way (padded batches in the order of the data, logits of every
position), and by our own scorer (batches of like length, logits of supervised positions only), which leaves nothing but
the fusing and the number of candidates to tell the two apart. The plain way is timed on ``--plain`` points and
multiplied; the losses are those of our scorer. The grid's best is that of all its points: what PEFT did not fuse, the
strategy ``grid`` scores through the bank, to the same sums. The last column is when a search first had a candidate at
most 0.1 % above the grid's best, a point of a slope included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiny import tiny_base

RESULTS = Path(__file__).parent / "results" / "search.json"
STRATEGIES = ("gradient", "surrogate", "tpe", "grid")
SLACK = 1.001  # of the grid's best loss
PLAIN_BATCH = 8


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Case:
    """What is searched: a loaded base, adapters as PEFT directories and as ours, held-out items, β."""

    base: Any
    adapters: Mapping[str, Path]
    members: Mapping[str, Any]
    domains: Mapping[str, Any]
    betas: Mapping[str, float]
    clock: Callable[[], float] = time.perf_counter


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, help="directory of a finished run of the recipe")
    options.add_argument("--recipe", type=Path, default=Path("examples/medical/recipe.yaml"))
    options.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="instead of --run; in order"
    )
    options.add_argument("--items", type=int, default=20, help="of λ-validation, a domain")
    options.add_argument("--points", type=int, help="of the grid that PEFT fuses; the time is multiplied")
    options.add_argument("--plain", type=int, default=2, help="points that are scored the plain way too")
    options.add_argument("--strategies", default=",".join(STRATEGIES))
    options.add_argument("--step", type=float, default=0.1)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--together", action="store_true", help="only: do candidates gain from sharing passes?")
    options.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: on a machine that is busy")
    options.add_argument("--short", action="store_true", help="tiny model, step 0.25; writes nothing")
    asked = options.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if asked.short:
            asked.step, case = 0.25, tiny(Path(scratch))
        elif asked.run or asked.adapter:
            case = real(asked)
        else:
            options.error("give --run DIR, --adapter NAME=DIR three times, or --short")
        case = replace(case, clock=CLOCKS[asked.clock])
        print(sharing(case) if asked.together else table(measure(case, asked, Path(scratch))))


def measure(case: Case, asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """PEFT's grid, then every strategy, each from nothing."""
    import torch

    from lorchestra.fusion.search.designs import simplex_grid

    points = list(simplex_grid(len(case.members), asked.step))
    peft = by_peft(case, points, asked.points, asked.plain)
    print(f"PEFT: {peft['best']:.4f} in {peft['seconds']:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, Any] = {
        "grid": len(points), "items": {name: len(domain.items) for name, domain in case.domains.items()},
        "threads": torch.get_num_threads(), "dtype": str(case.base.dtype), "cpus": os.cpu_count(),
        "torch": torch.__version__, "clock": asked.clock, "peft": peft, "ours": [],
    }  # fmt: skip
    for strategy in asked.strategies.split(","):
        row = by_bank(case, strategy, asked.step, scratch / strategy)
        row |= {"share": row["seconds"] / peft["seconds"], "share_plain": row["seconds"] / peft["plain_seconds"]}
        found["ours"].append(row)
        settle(found)
        print(f"{strategy}: {row['best']:.4f} in {row['seconds']:.0f} s", file=sys.stderr, flush=True)
        if not asked.short:  # after each, so that an interrupted benchmark has what it measured
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def settle(found: dict[str, Any]) -> None:
    """What the grid's best is (of the points that PEFT fused, and of all where the bank scored the grid), and when each
    search first came as low."""
    grids = [row["best_of_grid"] for row in found["ours"] if row["strategy"] == "grid"]
    found["best_of_grid"] = min([found["peft"]["best"], *grids])
    wanted = found["best_of_grid"] * SLACK
    for row in found["ours"]:
        row["reached"] = next((at for at, score in row["heard"] if score <= wanted), None)


def by_peft(case: Case, points: Sequence[Sequence[float]], timed: int | None, plain: int) -> dict[str, Any]:
    """The grid: fuse with ``cat``, score, forget, next."""
    from peft import PeftModel

    from lorchestra.evaluate.metrics import loss_ratios
    from lorchestra.evaluate.score import score

    names = list(case.adapters)
    reference = {name: score(case.base.model, domain, case.base.pad_id) for name, domain in case.domains.items()}
    model = PeftModel.from_pretrained(case.base.model, case.adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(case.adapters[name], adapter_name=name)
    inner = model.get_base_model()
    chosen = points if timed is None else points[:: max(len(points) // timed, 1)][:timed]
    fusing, scoring, plainly, losses = [], [], [], []
    for number, point in enumerate(chosen):
        started = case.clock()
        model.add_weighted_adapter(names, list(point), "candidate", combination_type="cat")
        model.set_adapter("candidate")
        fused = case.clock()
        found = {name: score(inner, domain, case.base.pad_id) for name, domain in case.domains.items()}
        done = case.clock()
        if number < plain:
            for domain in case.domains.values():
                score_plainly(inner, domain, case.base.pad_id)
            plainly.append(case.clock() - done)
        model.set_adapter(names[0])
        model.delete_adapter("candidate")
        ratios = loss_ratios(found, reference, case.betas)
        losses.append(statistics.fmean(ratios.values()))
        fusing.append(fused - started)
        scoring.append(done - fused)
    model.unload()
    each = statistics.fmean(fusing) + statistics.fmean(scoring)
    best = min(range(len(chosen)), key=losses.__getitem__)
    return {
        "points": len(chosen), "multiplied": len(chosen) < len(points), "best": losses[best],
        "at": dict(zip(names, chosen[best], strict=True)), "fuse_seconds": statistics.median(fusing),
        "score_seconds": statistics.median(scoring), "plain_score_seconds": statistics.median(plainly),
        "seconds": each * len(points),
        "plain_seconds": (statistics.fmean(fusing) + statistics.fmean(plainly)) * len(points),
    }  # fmt: skip


def score_plainly(model: Any, domain: Any, pad_id: int) -> None:
    """Σ log p of every answer as most people compute it: padded batches, logits everywhere."""
    import torch

    texts = [(item.prompt, branch.ids) for item in domain.items for branch in item.branches]
    for start in range(0, len(texts), PLAIN_BATCH):
        batch = texts[start : start + PLAIN_BATCH]
        width = max(len(prompt) + len(ids) for prompt, ids in batch)
        ids = torch.full((len(batch), width), pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            mask[row, :end] = 1
            labels[row, len(prompt) : end] = torch.tensor(answer)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            picked = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
            (picked * (labels[:, 1:] >= 0)).sum(1)


def by_bank(case: Case, strategy: str, step: float, work: Path) -> dict[str, Any]:
    """One search from nothing; ``heard`` are seconds and score of every candidate."""
    from lorchestra.events import Silent
    from lorchestra.pipeline.searching import SearchPlan, search_weights

    started = case.clock()
    heard: list[tuple[float, float]] = []

    class Clock(Silent):
        def event(self, kind: str, /, **fields: Any) -> None:
            heard.append((case.clock() - started, fields["score"]))

    found = search_weights(
        case.base, case.members, case.domains, case.betas, SearchPlan(strategy, step=step), work, Clock()
    )
    seconds = case.clock() - started
    best = min(found.candidates, key=lambda c: c.score)
    simplex = [c.score for c in found.candidates if abs(sum(c.weights.values()) - 1) < 1e-3]
    return {
        "strategy": strategy, "candidates": len(found.candidates), "slopes": found.slopes, "best": best.score,
        "at": dict(best.weights), "origin": best.origin, "seconds": seconds, "heard": heard,
        "best_of_grid": min(simplex),
    }  # fmt: skip


def sharing(case: Case, candidates: int = 4, rounds: int = 2) -> str:
    """Four candidates one after another and in the same passes, by items of the first domain; medians, in Markdown."""
    from lorchestra.bank import Bank
    from lorchestra.evaluate.mixtures import score_mixtures
    from lorchestra.evaluate.score import score
    from lorchestra.objective.batch import length

    bank = Bank(case.base.model, case.base.id)
    for name, adapter in case.members.items():
        bank.load(name, adapter)
    mixtures = [dict.fromkeys(case.members, 0.2 * (k + 1)) for k in range(candidates)]
    lines = ["| items | positions | one after another, s | together, s | ratio |", "|---|---|---|---|---|"]
    domain = next(iter(case.domains.values()))
    for items in (1, 2, 4, 8, 16):
        part = domain.first(items)
        alone, together = [], []
        for _ in range(rounds + 1):
            started = case.clock()
            for mixture in mixtures:
                with bank.using(mixture):
                    score(bank.model, part, case.base.pad_id)
            between = case.clock()
            score_mixtures(bank, part, mixtures, case.base.pad_id)
            alone.append(between - started)
            together.append(case.clock() - between)
        one, all_ = statistics.median(alone[1:]), statistics.median(together[1:])
        positions = sum(map(length, part.items))
        lines.append(f"| {len(part.items)} | {positions} | {one:.2f} | {all_:.2f} | {all_ / one:.2f} |")
    bank.unmount()
    return "\n".join(lines)


def real(asked: argparse.Namespace) -> Case:
    """The recipe's base and λ-validation, and the adapters of a finished run."""
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.base.home import home
    from lorchestra.base.load import load_base
    from lorchestra.pipeline.choosing import betas, domains_of
    from lorchestra.pipeline.prepare import prepare
    from lorchestra.recipe.recipe import Recipe

    recipe = Recipe.load(asked.recipe)
    prepared = prepare(recipe)
    if asked.adapter:
        adapters = {name: Path(place) for name, _, place in (text.partition("=") for text in asked.adapter)}
    else:
        steps = json.loads((asked.run / "plan.json").read_text(encoding="utf-8"))["steps"]
        found = {step["name"]: step["digest"] for step in steps if step["kind"] == "stage"}
        adapters = {
            stage.name: home() / "steps" / f"stage-{found[stage.name][:24]}" / "adapter" for stage in recipe.stages
        }
    base = load_base(prepared.directory, name=prepared.base.name, dtype=asked.dtype)
    domains = domains_of(prepared, "validation", asked.items, choices=False)
    members = {name: Adapter.load(place) for name, place in adapters.items()}
    return Case(base, adapters, members, domains, betas(recipe))


def tiny(scratch: Path) -> Case:
    """A random Llama of two layers, random adapters, random items."""
    import torch

    from lorchestra import Adapter, LowRank
    from lorchestra.base.load import load_base
    from lorchestra.data.render import Branch, Rendered
    from lorchestra.evaluate.score import Domain

    model = tiny_base(scratch / "base", 2)
    linears = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in p}
    adapters = {}
    for name in ("one", "two", "three"):
        modules = {
            path: LowRank(torch.randn(m.out_features, 4) * 0.1, torch.randn(4, m.in_features) * 0.1)
            for path, m in linears.items()
        }
        adapters[name] = Adapter(modules).save(scratch / name)
    items = []
    for _ in range(16):
        ids = tuple(torch.randint(4, 260, (14,)).tolist())
        items.append(Rendered(ids[:8], (Branch(ids[8:], (True,) * 6),), 0))
    domain = Domain("random", "sft", tuple(items), (0,) * 16, tuple(map(str, range(16))))
    base = load_base(scratch / "base", device="cpu", dtype="float32")
    members = {name: Adapter.load(place) for name, place in adapters.items()}
    return Case(base, adapters, members, {"random": domain}, {})


def table(found: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    peft, items = found["peft"], sum(found["items"].values())
    said = f"{peft['points']} points timed, multiplied" if peft["multiplied"] else f"all {found['grid']} points"
    kind = found["dtype"].removeprefix("torch.")
    head = (
        "search", "candidates + gradients", "best loss / base loss", "seconds", "of the grid",
        "of the grid scored plainly", "reached the grid's best after",
    )  # fmt: skip
    best = f"{found['grid']} | {found['best_of_grid']:.4f}"
    lines = [
        f"{items} items, {found['threads']} threads, {kind}, {found['clock']} time",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        f"| PEFT `cat`, scored plainly | {best} | {peft['plain_seconds']:.0f} | "
        f"{peft['plain_seconds'] / peft['seconds']:.2f} | 1 | |",
        f"| PEFT `cat`, our scorer ({said}) | {best} | {peft['seconds']:.0f} | 1 | "
        f"{peft['seconds'] / peft['plain_seconds']:.2f} | |",
    ]
    for row in found["ours"]:
        share = (row["reached"] or 0.0) / peft["seconds"]
        reached = "never" if row["reached"] is None else f"{row['reached']:.0f} s ({share:.2f} of the grid)"
        lines.append(
            f"| {row['strategy']} | {row['candidates']} + {row['slopes']} | {row['best']:.4f} | {row['seconds']:.0f} | "
            f"{row['share']:.2f} | {row['share_plain']:.2f} | {reached} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
