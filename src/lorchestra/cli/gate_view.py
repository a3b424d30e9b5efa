"""What ``gate fit`` and ``gate eval`` print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lorchestra.cli.terminal import console
from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.gate.fit import Fitted

EXCERPT = 70  # characters of a prompt


def show_fitted(fitted: Fitted, told: Mapping[str, Any], out: Path) -> None:
    """Losses on the validation examples, who gets what, and what comes next."""
    screen = console(markup=False)
    gate, counts = fitted.gate, told["examples"]
    best = min(fitted.history, key=lambda check: check.validation)
    screen.print(
        f"{counted(len(told['data']), 'domain')}, {counted(counts['train'], 'example')} to learn from, "
        f"{counts['validation']:,} to stop by; mean over domains of loss / base loss there:"
    )
    table = Table(box=None, show_header=False)
    for name, ratio in fitted.validation.items():
        began = f"(began {fitted.begun} at {fitted.history[0].validation:.4f}; best after step {best.step})"
        table.add_row(name, f"{ratio:.4f}", began if name == "gate" else "")
    screen.print(table)
    screen.print(_coefficients(fitted.loads.coefficients, gate.members))
    screen.print(fitted.loads.sentence)
    screen.print(f"{gate.digest[:19]}… in {out}")


def show_judged(told: Mapping[str, Any]) -> None:
    """Losses with intervals, the verdict, coefficients, and some prompts."""
    screen = console(markup=False)
    evaluation = told["evaluation"]
    several = len(evaluation["domains"]) > 1
    table = Table("nats a token", *evaluation["domains"], "all: loss / base loss", box=None)
    for model in evaluation["models"]:
        rows = {(row["domain"], row["metric"]): row for row in evaluation["rows"] if row["model"] == model}
        cells = [_interval(rows.get((domain, "nll"))) for domain in evaluation["domains"]]
        whole = [row for (_, metric), row in rows.items() if metric == "loss_ratio"]
        table.add_row(model, *cells, _interval(whole[0] if whole else None))
    screen.print(f"95 % intervals; static is {_mixture(told['static'])}")
    screen.print(table)
    screen.print(_coefficients(told["coefficients"], list(told["static"])))
    for name, found in told["routing_accuracy"].items():
        if name != "all" or several:
            where = "all of these" if name == "all" else f"{name} ({told['oracle'][name]})"
            screen.print(f"routed as the oracle would, {where}: {_interval(found)}")
    for prompt in told["prompts"]:
        screen.print(f"{prompt['domain']}: {_short(prompt['prompt'])}")
        screen.print(f"    {_mixture(prompt['coefficients'])}")
        for near in prompt["nearest"]:
            text = _short(near["prompt"]) or near["digest"][:19] + "…"
            screen.print(f"    near {near['similarity']:.2f}  {near['domain']}: {text}")
    screen.print(told["sentence"])
    for note in told["notes"]:
        screen.print(note)
    for name, reads in told["sealed_test"].items():
        screen.print(f"Examples of {name} belong to a sealed test, which has been read {reads}×, this time included.")


def _coefficients(by_domain: Mapping[str, Mapping[str, float]], members: Any) -> Table:
    table = Table("mean coefficient", *members, box=None)
    for domain, found in by_domain.items():
        table.add_row(domain, *(f"{found[name]:.2f}" for name in members))
    return table


def _interval(row: Mapping[str, float] | None) -> str:
    if row is None:
        return ""
    low, high = ("?" if row[end] is None else f"{row[end]:.3f}" for end in ("low", "high"))
    return f"{row['estimate']:.3f} ({low} to {high})"


def _mixture(weights: Mapping[str, float]) -> str:
    acting = [f"{name}={weight:.3g}" for name, weight in weights.items() if round(weight, 3)]
    return " + ".join(acting) or "the base"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"
