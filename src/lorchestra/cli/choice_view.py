"""How the weights were chosen, on the terminal: reasons, and the candidates that no other beats in every domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

MOST = 8  # rows of the Pareto table


def show_choice(out: Console, search: Mapping[str, Any]) -> None:
    """Print what the report's ``search`` says of the choice."""
    selection = search["selection"]
    out.print(Text(f"weights, by {selection['goal']}", style="bold"))
    for reason in selection["reasons"]:
        out.print(Padding(Text(reason, style="dim"), (0, 0, 0, 2), expand=False))
    table = front_table(search)
    if table is not None:
        out.print()
        out.print(table)


def front_table(search: Mapping[str, Any]) -> Table | None:
    """The Pareto table, best first, with the chosen candidate; ``None`` with fewer than two domains."""
    selection, rows = search["selection"], search["candidates"]
    domains = list(selection["groups"])
    if len(domains) < 2:
        return None
    marks = {selection["minimum"]: "minimum", selection["chosen"]: "chosen"}
    shown = sorted(
        (k for k, row in enumerate(rows) if row["undominated"] or k in marks), key=lambda k: rows[k]["score"]
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("unbeaten on λ-validation")
    for name in ("score", *domains):
        table.add_column(escape(name) if name == "score" else f"{escape(name)}\nloss / base", justify="right")
    limited = selection["tolerance"] is not None
    if limited:
        table.add_column("over the\nlimit", justify="right")
    table.add_column("")
    for place, k in enumerate(shown):
        if place >= MOST and k not in marks:
            continue
        row = rows[k]
        weights = " + ".join(f"{weight:.3g}·{name}" for name, weight in row["weights"].items() if weight)
        cells = [f"{row['score']:.4f}", *(_ratio(row["ratios"][name]) for name in domains)]
        if limited:
            cells.append(f"{row['excess']:.4f}" if row["excess"] else "")
        name = f"{weights} ({row['origin']})" if weights else row["origin"]
        table.add_row(escape(name), *cells, marks.get(k, ""), style="green" if k == selection["chosen"] else None)
    return table


def _ratio(interval: Mapping[str, Any]) -> str:
    low, high = interval["low"], interval["high"]
    spread = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return escape(f"{interval['estimate']:.3f}{spread}")
