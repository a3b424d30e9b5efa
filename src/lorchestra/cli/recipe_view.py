"""A result, a plan and a check on the terminal. Standard output; plain text where it is no terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorchestra.cli.choice_view import show_choice
from lorchestra.cli.progress import duration
from lorchestra.cli.terminal import console
from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.data.check import Check, StageCheck
    from lorchestra.pipeline.costs import Outlook
    from lorchestra.pipeline.execute import RunResult
    from lorchestra.pipeline.planned import Plan, PlannedStep
    from lorchestra.recipe.suggestions import Suggestion

MOST = 600  # characters shown of a stretch of an example
METRICS = {
    "nll": "loss",
    "accuracy": "accuracy",
    "preference_accuracy": "preferred",
    "loss_ratio": "loss / base",
}
STATES = {
    "cached": "green", "here": "green", "begun": "cyan", "trained": "cyan", "to fetch": "yellow", "failed": "red",
    "diverged": "red",
}  # fmt: skip


def show_result(result: RunResult) -> None:
    """The verdict, models × domains, where things are, and how to talk to the result."""
    out = console()
    data = json.loads((result.directory / "report.json").read_text(encoding="utf-8"))
    out.print()
    if result.verdict:
        out.print(Text(result.verdict, style="bold"))
    for note in (data.get("verdict") or {}).get("notes", []):
        _indented(out, note, "dim")
    if result.readings:
        _indented(
            out, f"Sealed tests have been read: {', '.join(f'{k} {n}×' for k, n in result.readings.items())}.", "dim"
        )
    if "selection" in (data.get("search") or {}):
        out.print()
        show_choice(out, data["search"])
    if result.gate_verdict:
        out.print()
        out.print(Text(result.gate_verdict, style="bold"))
        for note in (data.get("gate") or {}).get("notes", []):
            _indented(out, note, "dim")
    evaluation = data.get("evaluation")
    if evaluation:
        out.print()
        out.print(_scores(evaluation))
    out.print()
    places = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    stages = result.directory / "adapters"
    places_of = (
        ("adapter", result.adapter),
        ("model", result.merged),
        ("gate", result.gate),
        ("stages", stages),
        ("report", result.report),
    )
    for name, path in places_of:
        if path is not None:
            places.add_row(name, escape(_short(path)))
    if result.published is not None:
        leads = f", {result.published.alias}" if result.published.alias else ""
        places.add_row("published", escape(f"{result.published.reference}{leads}"))
    places.add_row("talk to it", f"lorchestra chat {escape(_short(result.merged or result.adapter))}")
    out.print(places)


def _indented(out: Console, text: str, style: str = "") -> None:
    out.print(Padding(Text(text, style=style), (0, 0, 0, 2), expand=False))


def _scores(evaluation: Mapping[str, Any]) -> Table:
    """Models down, domains across; 95 % intervals are in the report."""
    from lorchestra.evaluate.metrics import LOWER_IS_BETTER

    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in evaluation["rows"]:
        # A domain's own loss / base loss says no more than its loss; of all domains together there is nothing else.
        if row["metric"] in METRICS and not (row["metric"] == "loss_ratio" and row["domain"] in evaluation["domains"]):
            cells.setdefault((row["domain"], row["metric"]), {})[row["model"]] = row["estimate"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("sealed test")
    for domain, metric in cells:
        table.add_column(f"{escape(domain)}\n{METRICS[metric]}", justify="right")
    best = {
        key: (min if key[1] in LOWER_IS_BETTER else max)(values.values(), default=None) for key, values in cells.items()
    }
    for model in evaluation["models"]:
        shown = []
        for key, values in cells.items():
            value = values.get(model)
            text = "–" if value is None else f"{value:.3f}"
            shown.append(f"[bold]{text}[/]" if value is not None and value == best[key] else text)
        table.add_row(escape(model), *shown, style="green" if model == "delivered" else None)
    return table


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def show_plan(plan: Plan) -> None:
    """The steps in order, and what they will cost."""
    out = console()
    show_steps(out, plan, plan.steps, "`lorchestra check` fetches it")
    show_total(out, plan)


def show_steps(out: Console, plan: Plan, shown: Sequence[PlannedStep], fetching: str) -> None:
    """What it is about, what is missing, and the steps ``shown``; ``fetching`` says how to get what is missing."""
    size = f", {plan.parameters:,} parameters" if plan.parameters else ""
    out.print(f"[bold]{plan.recipe}[/] on {escape(plan.base)}{size}, {plan.dtype} on {plan.device}")
    missing = [step for step in shown if step.state == "to fetch"]
    if missing:
        out.print(f"Not here yet, so that neither times nor all numbers can be told ({fetching}):")
        for step in missing:
            _indented(out, f"{step.name}: {step.note.removeprefix('source ')}")
    out.print()
    steps = []
    for step in shown:
        state = f"[{STATES[step.state]}]{step.state}[/]" if step.state in STATES else step.state
        after = escape(", ".join(name for name in step.needs if not name.startswith("data:")))
        steps.append((escape(step.name), after, state, _time(step), gigabytes(step.memory)))
    out.print(plain_table(("step", "after", "state", "time", "memory"), steps, left=3))
    out.print()
    stages = [(escape(step.name), *_outlook(step.outlook)) for step in shown if step.outlook is not None]
    if stages:
        out.print(plain_table(("stage", "examples", "steps", "trainable", "scale", "tokens to learn"), stages, left=1))
        out.print()
    _show_suggestions(out, plan.suggestions)
    for step in shown:
        if step.note and step.state not in ("cached", "to fetch"):
            out.print(Text(f"{step.name}: {step.note}"))


def show_total(out: Console, plan: Plan) -> None:
    """What is left to spend, and how that is known."""
    missing = [step for step in plan.steps if step.state == "to fetch"]
    if plan.seconds is not None and not all(step.finished for step in plan.steps):
        needs = f", at most about {gigabytes(plan.memory)} of memory" if plan.memory else ""
        left = f"about {duration(plan.seconds)}" if plan.seconds >= 1 else "less than a second"
        out.print(f"[bold]{left} to go{needs}[/]")
    for note in () if missing and plan.seconds is None else plan.notes:
        out.print(Text(note, style="dim"))


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    """Plain columns, without those that are empty; the first ``left`` are texts (the second may wrap), then numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for i in filled:
        table.add_column(columns[i], justify="left" if i < left else "right", no_wrap=i != 1 or left == 1)
    for row in rows:
        table.add_row(*(row[i] for i in filled))
    return table


def _outlook(outlook: Outlook) -> tuple[str, ...]:
    rank = "r from the examples" if outlook.rank is None else f"r {outlook.rank}"
    scale = f"{'' if outlook.scale is None else f'{outlook.scale:.3g} '}({rank}, {outlook.scaling})"
    counts = (outlook.examples.get("train"), outlook.steps, outlook.trainable)
    return (*map(count, counts), scale, count(outlook.supervised))


def count(value: int | None) -> str:
    """``12,345``; nothing of what is not known."""
    return "" if value is None else f"{value:,}"


def _time(step: PlannedStep) -> str:
    if step.state == "cached":
        return step.note or "–"
    if step.seconds is None:
        return ""
    if step.kind == "data":
        return duration(step.seconds)  # just measured
    return about(step.seconds)


def about(seconds: float) -> str:
    """An estimate: ``~ 3 min``."""
    return f"~ {duration(seconds)}" if seconds >= 0.5 else "< 1 s"


def gigabytes(value: float | None) -> str:
    """``1.2 GB``; nothing of what is not known."""
    return "" if value is None else f"{value / 1e9:.1f} GB"


def _show_suggestions(out: Console, suggestions: Mapping[str, Sequence[Suggestion]]) -> None:
    from lorchestra.recipe.suggestions import lines

    for line in lines(suggestions):
        indent = len(line) - len(line.lstrip())
        out.print(Padding(Text(line.strip()), (0, 0, 0, indent), expand=False))
    out.print()


def show_check(check: Check, suggestions: Mapping[str, Sequence[Suggestion]]) -> None:
    """Stage by stage: numbers, rendered examples with the supervised part marked; what they settle; warnings."""
    out = console()
    for stage in check.stages:
        _show_stage(out, stage)
    _show_suggestions(out, suggestions)
    if check.warnings:
        out.print("[bold yellow]warnings[/]")
        for warning in check.warnings:
            _indented(out, warning)
    else:
        out.print("[green]nothing to warn of[/]")


def _show_stage(out: Console, stage: StageCheck) -> None:
    out.print(f"[bold]{escape(stage.name)}[/] ({stage.task})")
    for source in stage.sources:
        for line in source.splitlines():
            _indented(out, line.strip())
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for name in ("", "train", "validation", "test"):
        table.add_column(name, justify="left" if not name else "right")
    parts = ("train", "validation", "test")
    for label, counts in (("examples", stage.counts), ("groups", stage.groups), ("tokens to learn", stage.supervised)):
        table.add_row(label, *(f"{counts[part]:,}" for part in parts))
    out.print(table)
    lengths = stage.lengths
    _indented(
        out,
        f"tokens an example: mean {lengths['mean']:.0f}, median {lengths['p50']:.0f}, 90 % {lengths['p90']:.0f}, "
        f"99 % {lengths['p99']:.0f}, most {lengths['max']:.0f}; cut to max_length: "
        f"{counted(stage.truncated, 'example')}, {counted(stage.cut_answers, 'answer')}",
    )
    _indented(
        out,
        f"repeated and left out: {stage.duplicates}; nearly repeated: {stage.near_duplicates}; held out but alike in "
        f"another part: {stage.leakage} ({stage.leakage_exact} with the same prompt)",
    )
    _indented(out, f"an answer ends with {stage.end_of_turn}")
    how = "in colour" if out.is_terminal else "in ⟦ ⟧"
    for number, (text, spans) in enumerate(stage.examples, start=1):
        out.print(f"  [dim]example {number}, what is learned {how}:[/]")
        out.print(_example(text, spans, colour=out.is_terminal))
    out.print()


def _example(text: str, spans: tuple[tuple[int, int], ...], colour: bool) -> Text:
    shown, at = Text(), 0
    for start, end in (*spans, (len(text), len(text))):
        shown.append(_clean(text[at:start]), style="dim" if colour else "")
        if end > start:
            marked = _clean(text[start:end])
            shown.append(marked if colour else f"⟦{marked}⟧", style="bold green" if colour else "")
        at = end
    indented = Text("\n").join(Text("    ").append_text(line) for line in shown.split("\n", allow_blank=True))
    indented.no_wrap = False
    return indented


def _clean(text: str) -> str:
    """Shortened, and without what could steer a terminal."""
    if len(text) > MOST:
        text = f"{text[: MOST // 2]} […] {text[-MOST // 2 :]}"
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
