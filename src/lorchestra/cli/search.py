"""``lorchestra search``: coefficients for adapters, chosen on your own data, and the adapter that comes of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.completion import adapters, among, models
from lorchestra.cli.options import (
    Device,
    Dtype,
    Field,
    Format,
    Json,
    Weighted,
    domains,
    named_adapters,
    number,
    one_of,
    refuse_overwriting,
)
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.evaluate.goal import Goal
    from lorchestra.evaluate.selection import Selection
    from lorchestra.pipeline.search_alone import Verified
    from lorchestra.pipeline.searching import Searched, SearchPlan

# The table is in fusion/search/strategies.py, which imports numpy; a test holds the two together.
STRATEGIES = ("gradient", "surrogate", "tpe", "cmaes", "sobol", "grid", "heuristics")
RULES = ("one_se", "minimum")
GOALS = ("mean", "worst")
CHOICE, SPACE, DATA = "How to choose", "Where to search", "Data"


def search(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Model directory, org/name, GGUF file or pip: source.",
                                        autocompletion=models)],
    adapter: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ADAPTER…", help="In the order in which they were trained.",
                       autocompletion=adapters),
    ],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="[NAME=]FILE", help="Held-out examples of one domain. Repeat for several."),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", "-o", metavar="DIR", help="Where the result goes.")],
    strategy: Annotated[
        str,
        typer.Option("--strategy", metavar="NAME", help=", ".join(STRATEGIES) + ".",
                     autocompletion=among(*STRATEGIES)),
    ] = "gradient",
    budget: Annotated[
        int | None,
        typer.Option("--budget", min=1, help="Forward passes over λ-validation; a gradient counts two.",
                     show_default="the strategy's"),
    ] = None,
    goal: Annotated[
        str,
        typer.Option("--goal", metavar="GOAL", help="mean or worst of the domains, or notes=2,chat=1.",
                     rich_help_panel=CHOICE, autocompletion=among(*GOALS)),
    ] = "mean",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="No domain may fall so far below the best single adapter.",
                     rich_help_panel=CHOICE),
    ] = None,
    rule: Annotated[
        str,
        typer.Option("--rule", metavar="RULE", help="one_se: the simplest that the best cannot be told from; minimum.",
                     rich_help_panel=CHOICE, autocompletion=among(*RULES)),
    ] = "one_se",
    folds: Annotated[int, typer.Option("--folds", min=2, rich_help_panel=CHOICE, help="Of the cross-validation.")] = 5,
    layer_groups: Annotated[
        int, typer.Option("--layer_groups", min=1, rich_help_panel=SPACE, help="λ for so many groups of layers.")
    ] = 1,
    shrinkage: Annotated[
        float,
        typer.Option("--shrinkage", min=0, rich_help_panel=SPACE, help="How strongly groups are drawn to one λ."),
    ] = 0.1,
    low: Annotated[float, typer.Option("--low", rich_help_panel=SPACE, help="Of every λ; negative subtracts.")] = 0.0,
    high: Annotated[float, typer.Option("--high", rich_help_panel=SPACE, help="Of every λ.")] = 2.0,
    step: Annotated[float, typer.Option("--step", rich_help_panel=SPACE, help="Of the grid.")] = 0.1,
    total: Annotated[
        list[float] | None, typer.Option("--total", rich_help_panel=SPACE, help="Σλ of the grid (1). Repeat.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Truncate the fused adapter to this rank.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of what is drawn.")] = 0,
    test_share: Annotated[
        float,
        typer.Option("--test_share", min=0, max=0.9, rich_help_panel=DATA, help="Share sealed for a verdict."),
    ] = 0.0,
    limit: Annotated[
        int | None, typer.Option("--limit", min=2, rich_help_panel=DATA, help="λ-validation items of each domain.")
    ] = None,
    task: Annotated[
        str,
        typer.Option("--task", metavar="KIND", help="sft, dpo, or auto: dpo for preference pairs.",
                     rich_help_panel=DATA, autocompletion=among("auto", "sft", "dpo")),
    ] = "auto",
    beta: Annotated[float, typer.Option("--beta", rich_help_panel=DATA, help="β of preference pairs.")] = 0.1,
    max_length: Annotated[int, typer.Option("--max_length", min=8, rich_help_panel=DATA, help="Tokens.")] = 1024,
    system: Annotated[
        str | None, typer.Option("--system", rich_help_panel=DATA, help="System prompt where there is none.")
    ] = None,
    format: Format = "auto",
    field: Field = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Search the weights of adapters on held-out data, and write the adapter that they make.

    Trained stacks, single adapters, uniform weights and the base are always tried; then the strategy spends its budget.
    The choice is checked by cross-validation, and with `--test_share` judged on examples that the search never sees.
    DIR receives the adapter, search.json and search.html. A search that was stopped goes on where it was.

    **Examples**

    `lorchestra search my-base general clinic preference --data held-out.jsonl -o tuned`

    `lorchestra search my-base general clinic --data notes=notes.jsonl --data chat=pairs.jsonl --goal worst
    --test_share 0.3 -o tuned`
    """
    sources = named_adapters(adapter)
    refuse_overwriting(output_dir, [Weighted(source, 1.0) for source in sources.values()])
    _check(strategy, rule, task, low, high, beta)
    specs = domains(data, format, field, system)
    from dataclasses import replace

    from lorchestra.cli.progress import make_reporter
    from lorchestra.pipeline.searching import SearchPlan
    from lorchestra.pipeline.single import check_place

    check_place(output_dir)
    plan = SearchPlan(
        strategy, budget, _goal(goal, tolerance, list(specs)), seed, layer_groups, shrinkage, low, high, step,
        tuple(total or (1.0,)),
    )  # fmt: skip
    reporter = make_reporter()
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.belonging import base_remarks, check_base
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.home import home
    from lorchestra.base.load import load_tokenizer, prepare_base, source_name
    from lorchestra.base.locate import locate
    from lorchestra.data.render import Renderer
    from lorchestra.fusion.search.driver import budget_of
    from lorchestra.pipeline.cache import StepCache
    from lorchestra.pipeline.lazy import LazyBase
    from lorchestra.pipeline.search_alone import choose_from, fused_by, search_data, search_step, verify
    from lorchestra.pipeline.searching import space_of

    members = {
        name: Adapter.load(locate(source, relative_to=Path.cwd(), reporter=reporter))
        for name, source in sources.items()
    }
    budget_of(space_of(members, plan), strategy, budget)
    directory = prepare_base(base, relative_to=Path.cwd(), reporter=reporter)
    identity = fingerprint(directory, source_name(directory))
    check_base(members, identity)
    for line in base_remarks(members, identity):
        reporter.say(line)
    lazy = LazyBase(directory, identity.name, device, dtype, reporter)
    tokenizer = load_tokenizer(directory)
    found_data = search_data(
        specs, Renderer(tokenizer, max_length), test_share=test_share, seed=seed, task=task, limit=limit,
        relative_to=Path.cwd(), reporter=reporter,
    )  # fmt: skip
    for line in found_data.remarks(members):
        reporter.say(f"warning: {line}")
    betas = {name: beta for name, domain in found_data.validation.items() if domain.kind == "dpo"}
    searched = search_step(
        lazy, identity, members, found_data.validation, betas, plan, StepCache(home() / "steps"), reporter
    )
    selection = choose_from(searched, plan, betas, "one_se" if rule == "one_se" else "minimum", folds, 10)
    delivered = selection.standings[selection.adapters].candidate
    fused, retained = fused_by(members, plan, delivered.weights, output_dir.resolve().name, rank)
    fused = replace(fused, base=identity)
    verified = verify(
        lazy.plain(), members, found_data, betas, fused, delivered.weights, len(searched.candidates), rank, plan.goal,
        reporter,
    )  # fmt: skip
    told = _told(output_dir, identity.name, members, plan, searched, selection, fused, retained, verified)
    fused.save(output_dir)
    _write(told, output_dir)
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(told):
        typer.echo(line)


def _check(strategy: str, rule: str, task: str, low: float, high: float, beta: float) -> None:
    one_of("--strategy", strategy, STRATEGIES)
    one_of("--rule", rule, RULES)
    one_of("--task", task, ("auto", "sft", "dpo"))
    if not low < high:
        raise UserError(f"--low {low:g} is not below --high {high:g}")
    if not beta > 0:
        raise UserError(f"--beta {beta:g} is not above 0")


def _goal(text: str, tolerance: float | None, domains: list[str]) -> Goal:
    from lorchestra.evaluate.goal import Goal

    if text in ("mean", "worst"):
        return Goal("worst" if text == "worst" else "mean", tolerance=tolerance)
    weights = {}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        if not sign:
            raise UserError(f"--goal {text!r}: write mean, worst, or weights as in {domains[0]}=2,{domains[-1]}=1")
        if name.strip() not in domains:
            raise UserError(
                f"--goal {text!r} names {name.strip()!r}, which is no --data; there are {', '.join(domains)}"
            )
        weights[name.strip()] = number(value, f"--goal {text!r}: write NAME=WEIGHT")
    try:
        return Goal("weighted", weights, tolerance)
    except ValueError as error:
        raise UserError(f"--goal {text!r}: {error}") from error


def _told(
    out: Path,
    base: str,
    members: Mapping[str, Any],
    plan: SearchPlan,
    searched: Searched,
    selection: Selection,
    fused: Any,
    retained: float,
    verified: Verified | None,
) -> dict[str, Any]:
    """Everything that is known, in the words of ``report.json``."""
    from datetime import UTC, datetime
    from importlib.metadata import version

    from lorchestra.evaluate.reasons import reasons

    delivered = selection.standings[selection.adapters]
    verdict: dict[str, Any] = {"verdict": {"sentence": "", "notes": []}, "evaluation": None}
    if verified is not None:
        verdict = verified.verdict.as_dict()
        verdict["evaluation"]["ledger"] = verified.ledger
    common = fused.lineage.settings.get("layer_groups")
    weights = {p.name: p.coefficient for p in fused.lineage.parents}
    return {
        "title": out.resolve().name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "lorchestra": version("lorchestra"),
        "output_dir": str(out),
        "base": {"name": base},
        **verdict,
        "search": {
            "strategy": plan.strategy,
            "slopes": searched.slopes,
            "members": list(delivered.candidate.weights) if common else list(members),
            "chosen": dict(delivered.candidate.weights),
            "origin": delivered.candidate.origin,
            "candidates": [standing.as_dict() for standing in selection.standings],
            "validation_items": selection.items,
            "selection": {**selection.as_dict(), "reasons": reasons(selection)},
        },
        "fusion": {
            "weights": weights,
            "norms": {name: adapter.norm() for name, adapter in members.items()},
            "rank": max(update.rank for update in fused.modules.values()),
            "retained": retained,
            "digest": fused.digest,
        },
        "settings": plan.as_dict(),
    }


def _write(told: Mapping[str, Any], out: Path) -> None:
    from lorchestra.report.write import write_report

    write_report(told, out, name="search")


def _lines(told: Mapping[str, Any]) -> list[str]:
    found = told["search"]
    best = min(c["score"] for c in found["candidates"])
    chosen = next(c for c in found["candidates"] if c["weights"] == found["chosen"])
    width = max(len(name) for name in found["chosen"])
    out = [
        f"{len(found['candidates'])} candidates and {found['slopes']} gradients on {found['validation_items']} items "
        f"({found['strategy']}); lowest score {best:.4f} (the base: 1)",
        f"chosen ({chosen['origin']}, {chosen['score']:.4f}):",
        *(f"  {name:<{width}}  λ {weight:g}" for name, weight in found["chosen"].items()),
        *found["selection"]["reasons"],
    ]
    if sentence := told["verdict"]["sentence"]:
        out += [f"Sealed test: {sentence}", *told["verdict"]["notes"]]
    else:
        out.append("No test was sealed: what the choice is worth on new examples is the cross-validated figure above.")
    where = told["output_dir"]
    kept = told["fusion"]["retained"]
    out.append(
        f"{where}: rank {told['fusion']['rank']}, retained energy {kept:.2%}; {told['fusion']['digest'][:19]}; "
        f"page {Path(where) / 'search.html'}"
    )
    out.append(f"Next: {shlex.join(['lorchestra', 'chat', where])}")
    return out
