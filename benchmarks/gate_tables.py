"""The tables of ``benchmarks/gate.py``, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All parts that were measured."""
    return "\n".join(line for part, write in TABLES.items() if part in found for line in (*write(found[part]), ""))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _accuracy(part: Mapping[str, Any]) -> list[str]:
    layers = list(next(iter(part["rows"].values())))
    lines = [
        f"{part['test']:,} prompts of {len(part['domains'])} domains, learnt from {part['train']}; 95 % intervals",
        "",
        _row("the prompt's own adapter is asked first, by", *(f"l = {k}" for k in layers)),
        "|---" * (len(layers) + 1) + "|",
    ]
    for name, row in part["rows"].items():
        lines.append(_row(name, *(_share(row[k]) if k in row else "" for k in layers)))
    return lines


def _share(cell: Mapping[str, Any]) -> str:
    nobody = f", {cell['nobody']:.3f} nobody" if cell["nobody"] else ""
    return f"{cell['accuracy']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]{nobody}"


def _losses(part: Mapping[str, Any]) -> list[str]:
    from lorchestra.evaluate.verdict import ALL

    evaluation = part["verdict"]["evaluation"]
    domains = evaluation["domains"]
    at = {(row["model"], row["domain"], row["metric"]): row for row in evaluation["rows"]}
    apart = {(d["b"], d["domain"], d["metric"]): d for d in evaluation["differences"]}
    lines = [
        f"sealed test, up to {part['items']} items a domain; gate with l = {part['layers']}; "
        f"static: {' + '.join(f'{value:.3g}·{name}' for name, value in part['static'].items())}",
        "",
        _row("nats a token", *domains, "loss / base's", "gate − it"),
        "|---" * (len(domains) + 3) + "|",
    ]
    for model in evaluation["models"]:
        cells = [_value(at.get((model, name, "nll"))) for name in domains]
        whole = at.get((model, ALL, "loss_ratio"))
        lines.append(_row(model, *cells, _value(whole), _signed(apart.get((model, ALL, "loss_ratio")))))
    return [*lines, "", part["verdict"]["sentence"]]


def _value(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['estimate']:.3f}"


def _signed(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['estimate']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def _cost(part: Mapping[str, Any]) -> list[str]:
    layers = [name for name in next(iter(part["lengths"].values())) if name != "prefill"]
    lines = [
        f"features of one prompt over its prefill, {part['layers_of_the_base']} layers; medians of {part['rounds']}",
        "",
        _row("tokens", "prefill, ms", *(f"l = {k}" for k in layers)),
        "|---" * (len(layers) + 2) + "|",
    ]
    for length, row in part["lengths"].items():
        cells = [f"{row[k]['share']:.3f} ({row[k]['bound']:.3f} allowed)" for k in layers]
        lines.append(_row(length, f"{1000 * row['prefill']['seconds']:.1f}", *cells))
    return lines


def _choice(part: Mapping[str, Any]) -> list[str]:
    lines = [
        f"choosing among adapters, {part['features']} features; {part['rounds']} × {part['prompts']} prompts",
        "",
        _row("adapters", "ms: p50", "p99", "making the router, ms"),
        "|---|---|---|---|",
    ]
    for count, row in part["rows"].items():
        lines.append(_row(count, *(f"{1000 * row[key]:.2f}" for key in ("p50", "p99", "made"))))
    return lines


TABLES = {"accuracy": _accuracy, "losses": _losses, "cost": _cost, "choice": _choice}
