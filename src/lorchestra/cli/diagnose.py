"""``lorchestra diagnose``: what adapters are and how they meet, before they are fused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli import terminal
from lorchestra.cli.completion import adapters, models
from lorchestra.cli.options import Device, Dtype, Field, Format, Json, fields_of, named_adapters
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.events import Reporter
    from lorchestra.fusion.diagnose import Diagnosis


def diagnose(
    adapter: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ADAPTER…", help="PEFT directories, or hf:org/name.", autocompletion=adapters),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="BASE", help="For ‖ΔW‖/‖W‖, and for --data.", show_default=False, autocompletion=models
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=FILE", help="An adapter's own data: what the others do on it. Repeat."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A page with heat maps, diagnosis.html.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Examples of each --data.", rich_help_panel="Data")] = 32,
    max_length: Annotated[
        int, typer.Option("--max_length", min=8, help="Tokens an example.", rich_help_panel="Data")
    ] = 1024,
    format: Format = "auto",
    field: Field = None,
    every_entry: Annotated[
        bool, typer.Option("--every_entry", help="Count signs on all of ΔW, however large the model.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Compare adapters: sizes, energy at rank, cosines, subspaces, sign conflicts; and say in words what follows.

    Nothing is written but the page that `-o` asks for. One adapter alone works too.

    **Examples**

    `lorchestra diagnose adapters/terms adapters/notes adapters/style`

    `lorchestra diagnose terms=adapters/terms notes=adapters/notes --base models/my-base --data terms=terms.jsonl
    --data notes=notes.jsonl -o diagnosis.html`
    """
    sources = named_adapters(adapter)
    owners = _data(data or [], sources, base)
    if output is not None and output.is_dir():
        raise UserError(f"-o {output} is a directory; give a file name, as in -o {output / 'diagnosis.html'}")
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.belonging import base_remarks
    from lorchestra.base.locate import locate
    from lorchestra.cli.progress import make_reporter
    from lorchestra.fusion.account import account
    from lorchestra.fusion.diagnose import diagnose as measure
    from lorchestra.fusion.methods import common_base
    from lorchestra.fusion.reading import read

    reporter = make_reporter()
    adapters = {
        name: Adapter.load(locate(source, relative_to=Path.cwd(), reporter=reporter))
        for name, source in sources.items()
    }
    common_base(adapters)
    for line in base_remarks(adapters):
        reporter.say(line)
    weights, named = _base_norms(base, adapters, reporter) if base else ({}, common_base(adapters).name)
    activation, tokens = (
        _activation(base, adapters, owners, limit, max_length, format, field, device, dtype, reporter)
        if base and owners
        else ({}, {})
    )
    entries = _entries(adapters) if every_entry else None
    found = measure(adapters, weights=weights, activation=activation, tokens=tokens, entries=entries, reporter=reporter)
    reading = read(found)
    told = {"base": named, **account(found, reading)}
    if output is not None:
        _write(told, output)
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    _show(found, told)
    for remark in reading:
        typer.echo(f"• {remark.text}")
    if output is not None:
        typer.echo(f"page: {output}")


def _data(texts: Sequence[str], sources: Mapping[str, str], base: str | None) -> dict[str, str]:
    """Adapter → its data."""
    out: dict[str, str] = {}
    for text in texts:
        name, sign, source = text.partition("=")
        if not sign or not source.strip():
            raise UserError(f"--data {text!r}: write NAME=FILE, with the adapter whose data it is")
        if name not in sources:
            raise UserError(f"--data {text!r}: no adapter is called {name!r}; there are {', '.join(sources)}")
        if name in out:
            raise UserError(f"--data for {name!r} is given twice; one file for each adapter")
        out[name] = source.strip()
    if out and not base:
        raise UserError("--data needs --base: the adapters are compared on what the base's modules receive")
    return out


def _base_norms(base: str, adapters: Mapping[str, Adapter], reporter: Reporter) -> tuple[dict[str, float], str]:
    from lorchestra.adapter.belonging import check_base
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.load import prepare_base, source_name
    from lorchestra.fusion.base_norms import weight_norms

    directory = prepare_base(base, relative_to=Path.cwd(), reporter=reporter)
    identity = fingerprint(directory, source_name(directory))
    check_base(adapters, identity)
    shapes = {path: update.shape for adapter in adapters.values() for path, update in adapter.modules.items()}
    transposed = frozenset().union(*(adapter.transposed for adapter in adapters.values()))
    return weight_norms(directory, shapes, transposed, reporter), identity.name


def _activation(
    base: str, adapters: Mapping[str, Adapter], owners: Mapping[str, str], limit: int, max_length: int, format: str,
    field: list[str] | None, device: str, dtype: str, reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    """Adapter whose data it is → module → adapter → effect; and how many tokens that is over."""
    from lorchestra.base.load import load_base, prepare_base
    from lorchestra.data.load import DataSpec, load_examples
    from lorchestra.data.render import Renderer
    from lorchestra.evaluate.activation import activation_norms

    specs = {
        name: DataSpec(source, format=format, fields=fields_of(field), limit=limit) for name, source in owners.items()
    }
    examples = {
        name: load_examples(spec, "sft", relative_to=Path.cwd(), reporter=reporter).examples
        for name, spec in specs.items()
    }
    loaded = load_base(
        prepare_base(base, relative_to=Path.cwd(), reporter=reporter), name=base, device=device, dtype=dtype
    )
    renderer = Renderer(loaded.tokenizer, max_length)
    found, tokens = {}, {}
    for name, of_owner in examples.items():
        items = [renderer.sft(example) for example in of_owner]
        with reporter.task(f"activations on {name}'s data", len(items), "example") as task:
            found[name], tokens[name] = activation_norms(loaded.model, adapters, items, loaded.pad_id, task.advance)
    return found, tokens


def _entries(adapters: Mapping[str, Adapter]) -> int:
    shapes = {path: update.shape for adapter in adapters.values() for path, update in adapter.modules.items()}
    return sum(m * n for m, n in shapes.values())


def _write(told: Mapping[str, Any], output: Path) -> None:
    from datetime import UTC, datetime
    from importlib.metadata import version

    from lorchestra.base.home import write_whole
    from lorchestra.pipeline.cache import storage
    from lorchestra.report.diagnosis import render_diagnosis

    made = {"created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "lorchestra": version("lorchestra")}
    with storage(output):
        write_whole(output, render_diagnosis({**told, **made}))


def _show(found: Diagnosis, told: Mapping[str, Any]) -> None:
    from rich.table import Table

    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    console = terminal.console(markup=False)
    table = Table("adapter", "‖ΔW‖", "‖ΔW‖/‖W‖", "modules", "rank", "effective", "90 %", "99 %", box=None)
    for name, row in told["adapters"].items():
        table.add_row(
            name, f"{row['norm']:.4g}", text(row["relative"], ".2%"), str(len(row["modules"])), str(row["rank"]),
            f"{row['effective_rank']:.1f}", str(row["rank_90"]), str(row["rank_99"]),
        )  # fmt: skip
    console.print(table)
    if found.pairs:
        console.print()
        table = Table("pair", "cosine", "rows", "chance", "columns", "chance", "signs", "by product", box=None)
        for pair in told["pairs"]:
            row = pair["overall"]
            figures = [
                text(row["cosine"], ".3f"), text(row["row_overlap"], ".2f"), text(row["row_chance"], ".2f"),
                text(row["column_overlap"], ".2f"), text(row["column_chance"], ".2f"),
                text(row["sign_conflict"], ".1%"), text(row["sign_conflict_weighted"], ".1%"),
            ]  # fmt: skip
            table.add_row(f"{pair['a']}, {pair['b']}", *figures)
        console.print(table)
        tiles = told["tiles"]
        if tiles["sampled"]:
            console.print(f"signs counted on {tiles['seen']:,} of {tiles['total']:,} tiles of 256 × 256 entries")
    if told["activation"]:
        console.print()
        table = Table("on the data of", *found.names, "tokens", box=None)
        for owner, row in told["activation"].items():
            shares = [text(row["overall"].get(name, 1.0), ".2f") for name in found.names]
            table.add_row(owner, *shares, f"{row['tokens']:,}")
        console.print(table)
    console.print()
