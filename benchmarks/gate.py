"""A gate and a router on mixed traffic of four domains: who is asked, what it is worth, what it costs.

Prints one table a part and writes ``benchmarks/results/gate.json``::

    lorchestra run examples/gate/four-domains.yaml                    # trains the four adapters
    python benchmarks/gate.py --run runs/four-domains --work DIR      # all parts; what is in DIR is not done again
    python benchmarks/gate.py --run runs/four-domains --only cost --only choice
    python benchmarks/gate.py --short                                 # a tiny random base: for CI

- accuracy: of the sealed test's prompts, the share that goes to its own domain's adapter, by states after l layers. All
  know the training prompts with their domains; the gate is the warm start (no training end to end), and knows each
  adapter's losses on ``--examples`` of them a domain; naive Bayes counts words. 95 % intervals (Wilson, by group).
- losses: sealed-test losses of the base, each adapter, the best static weights of a search on λ-validation, an oracle
  that is told the domain, and a gate trained end to end; paired intervals by group.
- cost: the features of a prompt over its prefill (all layers, logits of the last position), in one process, turn about;
  medians. The bound is l/L + 2 %.
- choice: ``Router.route`` of one prompt among many adapters, each with prompts of its own around one of the test's.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its parts are scripts too

from gate_parts import Case, naive_bayes, real, tiny
from gate_tables import table
from gate_worth import fitted, losses

RESULTS = Path(__file__).parent / "results" / "gate.json"
LAYERS = (0, 1, 2, 4, 8)
LENGTHS = (32, 128, 512)
SLACK = 0.02  # of the prefill, beside l/L
PROMPTS = 400  # of an adapter that is chosen among: enough for as many centroids as there may be


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, help="directory of a finished run of the recipe")
    options.add_argument("--recipe", type=Path, default=Path("examples/gate/four-domains.yaml"))
    options.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="instead of --run")
    options.add_argument("--only", action="append", choices=list(MEASURES), help="parts; repeat. All unless given")
    options.add_argument("--searched", type=Path, help="searched.json of the run's search; else one is made")
    options.add_argument("--examples", type=int, default=100, help="training prompts of a domain")
    options.add_argument("--held", type=int, default=20, help="λ-validation items of a domain")
    options.add_argument("--items", type=int, default=60, help="sealed-test items of a domain, of the losses")
    options.add_argument("--layers", type=int, default=1, help="l of the gate that is trained end to end")
    options.add_argument("--epochs", type=float, default=1.0, help="of its training")
    options.add_argument(
        "--adapters", type=int, action="append", help="to choose among; repeat. 57 and 1000 unless given"
    )
    options.add_argument("--rounds", type=int, default=5, help="of the timed parts")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--work", type=Path, help="keeps what takes long, to be used again")
    options.add_argument("--out", type=Path, default=RESULTS, help="where the figures go, as JSON")
    options.add_argument("--short", action="store_true", help="tiny random base, one round; writes nothing")
    asked = options.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    if asked.short:
        asked.rounds, asked.adapters, asked.layers = 1, [3, 10], 1
    asked.adapters = asked.adapters or [57, 1000]
    found = {} if asked.short or not asked.out.exists() else json.loads(asked.out.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        asked.work = asked.work or Path(scratch) / "work"
        asked.work.mkdir(parents=True, exist_ok=True)
        if asked.short:
            case = tiny(Path(scratch))
        elif asked.run or asked.adapter:
            case = real(asked)
        else:
            options.error("give --run DIR, --adapter NAME=DIR for every stage, or --short")
        asked.pad_id = case.base.pad_id
        for part in asked.only or list(MEASURES):
            found[part] = about(asked, case) | MEASURES[part](asked, case)
            if not asked.short:  # after each, so that an interrupted benchmark has what it measured
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(found))


def about(asked: argparse.Namespace, case: Case) -> dict[str, Any]:
    """When, where and of what."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"), "threads": asked.threads, "cpus": os.cpu_count(),
        "load": os.getloadavg()[1], "dtype": str(case.base.dtype).removeprefix("torch."), "domains": list(case.members),
    }  # fmt: skip


# ---- who is asked


def accuracy(asked: argparse.Namespace, case: Case) -> dict[str, Any]:
    """By gate, router and naive Bayes, for every l."""
    train, test = case.prompts("train"), case.prompts("test")
    truth, groups = [one.domain for one in test], [one.group for one in test]
    rows: dict[str, dict[str, Any]] = {}
    for layers in case.layers(LAYERS):
        x, seen = states(case, layers, train, asked), states(case, layers, test, asked)
        said = {"gate": by_gate(asked, case, layers, seen)} | by_router(case, layers, train, x, seen)
        for name, names in said.items():
            rows.setdefault(name, {})[str(layers)] = shares(truth, names, groups)
    words = naive_bayes([(one.text, one.domain) for one in train], [one.text for one in test])
    rows["naive Bayes on words"] = {"0": shares(truth, words, groups)}
    return {"train": len(train), "scored": len(case.drawn(asked.examples)), "test": len(test), "rows": rows}


def states(case: Case, layers: int, prompts: Sequence[Any], asked: argparse.Namespace) -> Any:
    """``[b, n]`` of the prompts; kept in the work directory."""
    import torch
    from safetensors.torch import load_file, save_file

    from lorchestra.adapter.digest import json_digest
    from lorchestra.gate.features import FeatureSpec, features

    digest = json_digest([layers, [one.item.prompt for one in prompts], str(case.base.dtype)])[7:31]
    place = asked.work / f"states-{digest}.safetensors"
    if not place.exists():
        with torch.no_grad():
            found = features(case.base.model, [one.item.prompt for one in prompts], FeatureSpec(layers))
        save_file({"x": found}, place.with_suffix(".partial"))
        place.with_suffix(".partial").rename(place)
    return load_file(place)["x"]


def shares(truth: Sequence[str], said: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    """How many are right, with an interval; by domain; how many were given to nobody."""
    from lorchestra.stats.intervals import proportion_interval

    right = [float(a == b) for a, b in zip(truth, said, strict=True)]
    whole = proportion_interval(right, groups)
    by = {name: statistics.fmean(r for r, t in zip(right, truth, strict=True) if t == name) for name in set(truth)}
    return {
        "accuracy": whole.estimate, "low": whole.low, "high": whole.high, "by_domain": dict(sorted(by.items())),
        "nobody": said.count("") / len(said),
    }  # fmt: skip


def by_gate(asked: argparse.Namespace, case: Case, layers: int, seen: Any) -> list[str]:
    """The greatest coefficient of the warm start."""
    gate = fitted(asked, case, layers, 0.0).gate
    return [gate.members[k] for k in gate.coefficients(seen).argmax(dim=1).tolist()]


def by_router(case: Case, layers: int, train: Sequence[Any], x: Any, seen: Any) -> dict[str, list[str]]:
    """By prototypes, the nearest and with nobody; by the weights alone; by both, where every other has prompts."""
    from lorchestra.gate.features import FeatureSpec
    from lorchestra.gate.prototypes import of_adapter, of_prompts
    from lorchestra.gate.router import Router

    spec = FeatureSpec(layers)
    rows = {name: [i for i, one in enumerate(train) if one.domain == name] for name in case.members}
    known = {name: of_prompts(adapter, x[rows[name]], spec) for name, adapter in case.members.items()}
    weights = {name: of_adapter(adapter, spec) for name, adapter in case.members.items()}
    half = {name: known[name] if i % 2 == 0 else weights[name] for i, name in enumerate(case.members)}
    background = case.background(layers)

    def routed(which: Mapping[str, Any]) -> list[str]:
        router = Router(which, background)
        return [next((name for name, _ in router.route(row)), "") for row in seen]

    router, names = Router(known, background), sorted(known)
    nearest = [names[int(router._distances(router._whitened(row)).argmin())] for row in seen]
    return {
        "router, nearest prototype": nearest,
        "router, prototypes": routed(known),
        "directions, the most unlikely for plain prompts": by_directions(weights, background, seen),
        "router, directions": routed(weights),
        "router, both: prototypes of every other adapter": routed(half),
    }


def by_directions(weights: Mapping[str, Any], background: Any, seen: Any) -> list[str]:
    """What a router by directions would choose if it had to: log ‖ΔW x‖² in standard deviations of plain prompts."""
    import torch

    scores = []
    for one in weights.values():
        rows = one.directions * background.norm
        plain, asked = (
            (torch.nn.functional.normalize(x, dim=1) @ rows.T).square().sum(dim=1).clamp_min(1e-30).log()
            for x in (background.x, seen)
        )
        scores.append((asked - plain.mean()) / plain.std())
    return [list(weights)[k] for k in torch.stack(scores).argmax(dim=0).tolist()]


# ---- what it costs


def cost(asked: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Features over prefill, by l and length of the prompt."""
    import torch

    from lorchestra.gate.features import FeatureSpec, features

    model, L = case.base.model, case.layer_count
    found: dict[str, dict[str, dict[str, float]]] = {}
    for length in LENGTHS:
        prompt = case.long_prompt(length)
        ids = torch.tensor([prompt])
        calls: dict[str, Callable[[], Any]] = {
            str(layers): lambda layers=layers, prompt=prompt: features(model, [prompt], FeatureSpec(layers))
            for layers in case.layers(LAYERS)
        }
        calls["prefill"] = lambda ids=ids: model(input_ids=ids, use_cache=True, logits_to_keep=1)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with torch.no_grad():
            for turn in range(asked.rounds + 1):  # the first is a warm-up
                for name, call in calls.items():
                    begun = time.perf_counter()
                    call()
                    if turn:
                        seconds[name].append(time.perf_counter() - begun)
        whole = statistics.median(seconds.pop("prefill"))
        found[str(length)] = {"prefill": {"seconds": whole, "share": 1.0}} | {
            name: {
                "seconds": statistics.median(times), "share": statistics.median(times) / whole,
                "bound": int(name) / L + SLACK,
            }
            for name, times in seconds.items()
        }  # fmt: skip
    return {"layers_of_the_base": L, "rounds": asked.rounds, "lengths": found}


def choice(asked: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Seconds of one choice among many adapters, and of making the router."""
    import torch

    from lorchestra.gate.prototypes import CENTROIDS, FEATURES, of_prompts
    from lorchestra.gate.router import Router

    layers = min(FEATURES.layers, case.layer_count)
    prompts = case.first("test", 25)
    x = states(case, layers, prompts, asked)
    background, adapter = case.background(layers), next(iter(case.members.values()))
    draw = torch.Generator().manual_seed(0)
    spread = x.std(dim=0)
    rows = {}
    for count in asked.adapters:
        known = {}
        for i in range(count):
            around = x[int(torch.randint(len(x), (1,), generator=draw))]
            mine = around + spread * torch.randn(PROMPTS, len(spread), generator=draw)
            known[f"adapter-{i:04}"] = of_prompts(adapter, mine)
        begun = time.perf_counter()
        router = Router(known, background)
        made = time.perf_counter() - begun
        seconds = []
        for turn in range(asked.rounds + 1):
            for row in x:
                begun = time.perf_counter()
                router.route(row, 3)
                if turn:
                    seconds.append(time.perf_counter() - begun)
        seconds.sort()
        rows[str(count)] = {
            "p50": statistics.median(seconds), "p99": seconds[int(0.99 * (len(seconds) - 1))], "made": made,
        }  # fmt: skip
    return {
        "features": x.shape[1],
        "centroids": CENTROIDS,
        "rounds": asked.rounds,
        "prompts": len(prompts),
        "rows": rows,
    }


MEASURES = {"accuracy": accuracy, "losses": losses, "cost": cost, "choice": choice}

if __name__ == "__main__":
    main()
