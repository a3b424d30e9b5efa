"""``lorchestra eval``: a base and a mixture of adapters on your own data, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.completion import among, models
from lorchestra.cli.in_flags import in_flags
from lorchestra.cli.options import Adapters, Device, Dtype, Field, Format, Json, fields_of, listed, weighted
from lorchestra.errors import DataError, UserError, counted

if TYPE_CHECKING:
    from lorchestra.cli.models import Mounted
    from lorchestra.data.load import Loaded
    from lorchestra.evaluate.metrics import Difference, Row
    from lorchestra.evaluate.score import Kind
    from lorchestra.events import Reporter

NAMES = {
    "nll": "nats a token",
    "accuracy": "accuracy",
    "accuracy_normalised": "accuracy, per token",
    "preference_accuracy": "preference accuracy",
    "preference_accuracy_normalised": "preference accuracy, per token",
}


def evaluate(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="Model directory, org/name, GGUF file, or an adapter directory.", autocompletion=models
        ),
    ],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help="Files, hf: or pip: sources, with commas.")],
    adapter: Adapters = None,
    task: Annotated[
        str,
        typer.Option(
            "--task", help="sft, dpo, or auto: dpo for preference pairs.", autocompletion=among("auto", "sft", "dpo")
        ),
    ] = "auto",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples of each source.")] = None,
    max_length: Annotated[int, typer.Option("--max_length", min=8, help="Tokens an example.")] = 2048,
    system: Annotated[str | None, typer.Option("--system", help="System prompt where there is none.")] = None,
    format: Format = "auto",
    field: Field = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Score answers: negative log-likelihood, multiple-choice accuracy, preference accuracy; with 95 % intervals.

    With adapters, base and mixture stand side by side, and their difference is paired item by item.

    **Examples**

    `lorchestra eval my-adapter --data held-out.jsonl`

    `lorchestra eval my-base -a general=0.3 -a clinic=0.5 --data pairs.jsonl --json`
    """
    members = [weighted(text) for text in adapter or []]
    if task not in ("auto", "sft", "dpo"):
        raise UserError(f"--task {task!r} is unknown; there are auto, sft, dpo")
    from lorchestra.base.load import positions
    from lorchestra.cli.models import open_model
    from lorchestra.cli.progress import make_reporter
    from lorchestra.data.load import DataSpec
    from lorchestra.data.render import Renderer
    from lorchestra.evaluate.metrics import differences, metrics
    from lorchestra.evaluate.score import make_domain, score

    reporter = make_reporter()
    specs = [
        DataSpec(source, format=format, fields=fields_of(field), limit=limit, system=system)
        for source in listed([data])
    ]
    kind, read = _examples(specs, task, reporter)
    examples = [example for loaded in read for example in loaded.examples]
    mounted = open_model(base, members, device=device, dtype=dtype, reporter=reporter)
    longest = min(max_length, positions(mounted.base.model.config) or max_length)
    domain = make_domain("data", kind, examples, Renderer(mounted.base.tokenizer, longest))
    cut = sum(item.truncated > 0 for item in domain.items)
    if cut:
        why = f"--max_length {longest}" if longest == max_length else f"the {longest} positions of the model"
        reporter.say(f"warning: {cut} of {len(domain.items)} examples cut to {why}")
    sources = _known_as(specs, read, kind) if mounted.weights else set()
    for name in mounted.weights:
        if sources & set(mounted.bank.member(name).lineage.data.values()):
            reporter.say(
                f"warning: {name} was trained on examples of this very source; what it has seen looks better than new "
                "questions will. Give held-out examples"
            )
    sealed = _sealed(examples, data, mounted)
    mixture = " + ".join(f"{weight:g}·{name}" for name, weight in mounted.weights.items())
    scores = {}
    for name, weights in {"base": {}, **({mixture: mounted.weights} if mixture else {})}.items():
        with (
            mounted.bank.using(weights),
            reporter.task(f"score {name}", len(domain.items), "example") as progress,
        ):
            scores[name] = score(mounted.base.model, domain, mounted.base.pad_id, progress.advance)
    rows = [row for name, found in scores.items() for row in metrics(name, data, found)]
    changes = differences(mixture, "base", data, scores[mixture], scores["base"]) if mixture else []
    told = {
        "data": data,
        "task": kind,
        "examples": len(domain.items),
        "groups": len(set(domain.groups)),
        "gold_tokens": int(scores["base"].gold_tokens.sum()),
        "truncated": cut,
        "weights": mounted.weights,
        "sealed_test": sealed,
        "rows": [row.as_dict() for row in rows],
        "differences": [change.as_dict() for change in changes],
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    _show(rows, changes, told)


def _examples(specs: Sequence[Any], task: str, reporter: Reporter) -> tuple[Kind, list[Loaded]]:
    """What all sources' examples are scored as, and the sources as they were read."""
    from lorchestra.data.load import load_examples

    with in_flags({}):
        found = [
            load_examples(spec, "dpo" if task == "dpo" else "sft", relative_to=Path.cwd(), reporter=reporter)
            for spec in specs
        ]
    examples = [example for loaded in found for example in loaded.examples]
    pairs = sum(example.rejected is not None for example in examples)
    if task == "auto" and 0 < pairs < len(examples):
        raise UserError("--data mixes preference pairs with other examples; evaluate them one at a time, or --task sft")
    kind: Kind = "dpo" if task == "dpo" or (task == "auto" and pairs) else "sft"
    return kind, found


def _known_as(specs: Sequence[Any], read: Sequence[Loaded], kind: Kind) -> set[str]:
    """What a lineage may know the sources as, however many of their examples were trained on or are scored here."""
    from lorchestra.data.load import digests, load_examples

    found: set[str] = set()
    for spec, loaded in zip(specs, read, strict=True):
        whole = loaded
        if spec.limit is not None:
            with suppress(DataError):  # beyond --limit a source may hold anything
                whole = load_examples(replace(spec, limit=None), kind, relative_to=Path.cwd())
        found.update(digests(whole.examples))
    return found


def _sealed(examples: Sequence[Any], data: str, mounted: Mounted) -> dict[str, int] | None:
    """Enters the reading of examples that belong to a sealed test of this machine; how many, and how often read."""
    from lorchestra.adapter.digest import json_digest
    from lorchestra.evaluate.ledger import Ledger, item_digest

    ledger = Ledger.here()
    items = ledger.sealed([item_digest(example) for example in examples])
    if not items:
        return None
    weights = [(mounted.bank.member(name).digest, weight) for name, weight in sorted(mounted.weights.items())]
    reader = json_digest(["eval", mounted.base.id.weights, weights])
    return {"items": len(items), "reads": ledger.enter(items, data, reader)}


def _show(rows: Sequence[Row], changes: Sequence[Difference], told: dict[str, Any]) -> None:
    from rich.table import Table

    from lorchestra.cli.terminal import console

    models = list(dict.fromkeys(row.model for row in rows))
    table = Table("", *models, *(["difference"] if changes else []), box=None)
    for metric in dict.fromkeys(row.metric for row in rows):
        cells = [str(next(r for r in rows if r.model == m and r.metric == metric).interval) for m in models]
        for change in changes:
            if change.metric == metric:
                cells.append(f"{change.interval} {_said(change)}")
        table.add_row(NAMES[metric], *cells)
    out = console(markup=False)
    out.print(
        f"{counted(told['examples'], 'example')} in {counted(told['groups'], 'group')}, "
        f"{counted(told['gold_tokens'], 'answer token')}; "
        "95 % intervals"
    )
    out.print(table)
    if sealed := told["sealed_test"]:
        out.print(
            f"{sealed['items']:,} of these examples belong to a sealed test, which has been read {sealed['reads']}×, "
            "this time included."
        )


def _said(change: Difference) -> str:
    if change.interval.low == change.interval.high == 0:
        return "the same"
    return {True: "better", False: "worse", None: "cannot be told"}[change.better]
