"""``lorchestra gate``: a small network that chooses the adapters' coefficients prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lorchestra.cli.completion import adapters, among, gates, models
from lorchestra.cli.options import (
    Device,
    Dtype,
    Field,
    Format,
    Json,
    Weighted,
    domains,
    either_dash,
    named_adapters,
    number,
    one_of,
    refuse_overwriting,
)
from lorchestra.cli.verbs import Verb, Verbs
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.bank import Bank
    from lorchestra.base.load import Base
    from lorchestra.data.render import Renderer
    from lorchestra.events import Reporter
    from lorchestra.gate.network import Activation, Gate
    from lorchestra.pipeline.gate_alone import Held

# The table is in gate/network.py, which imports torch; a test holds the two together.
ACTIVATIONS = ("softmax", "sigmoid", "linear")
NETWORK, TRAINING, DATA = "The network", "Training", "Data"

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": either_dash},
    help="A small network from the prompt to the adapters' coefficients: fit it, and see whether it is worth having.",
)

BaseModel = Annotated[
    str, typer.Argument(metavar="BASE", help="Model directory, org/name, GGUF file or pip: source.",
                        autocompletion=models),
]  # fmt: skip
Members = Annotated[
    list[str],
    typer.Argument(metavar="[NAME=]ADAPTER…", help="The gate's members.", autocompletion=adapters),
]
Domains = Annotated[
    list[str], typer.Option("--data", metavar="[NAME=]FILE", help="Examples of one domain. Repeat for several.")
]
Task = Annotated[
    str,
    typer.Option("--task", metavar="KIND", help="sft, dpo, or auto: dpo for preference pairs.", rich_help_panel=DATA,
                 autocompletion=among("auto", "sft", "dpo")),
]  # fmt: skip
Beta = Annotated[float, typer.Option("--beta", rich_help_panel=DATA, help="β of preference pairs.")]
Limit = Annotated[int | None, typer.Option("--limit", min=4, rich_help_panel=DATA, help="Examples of each source.")]
Length = Annotated[int, typer.Option("--max_length", min=8, rich_help_panel=DATA, help="Tokens an example.")]
System = Annotated[
    str | None, typer.Option("--system", rich_help_panel=DATA, help="System prompt where there is none.")
]


def fit(
    base: BaseModel,
    adapter: Members,
    data: Domains,
    output_dir: Annotated[Path, typer.Option("--output_dir", "-o", metavar="DIR", help="Where the gate goes.")],
    name: Annotated[
        str | None, typer.Option("--name", help="What it is asked for by.", show_default="the directory's name")
    ] = None,
    activation: Annotated[
        str,
        typer.Option("--activation", metavar="NAME", help="softmax, sigmoid or linear.", rich_help_panel=NETWORK,
                     autocompletion=among(*ACTIVATIONS)),
    ] = "softmax",
    layers: Annotated[
        int, typer.Option("--layers", min=0, rich_help_panel=NETWORK, help="Of the base that it reads; 0: embeddings.")
    ] = 0,
    last_token: Annotated[
        bool, typer.Option("--last_token", rich_help_panel=NETWORK, help="Read the last token's state too.")
    ] = False,
    hidden: Annotated[
        int, typer.Option("--hidden", min=0, rich_help_panel=NETWORK, help="Units of a hidden layer; 0: linear.")
    ] = 0,
    groups: Annotated[
        int, typer.Option("--groups", min=1, rich_help_panel=NETWORK, help="Of layers with their own coefficients.")
    ] = 1,
    top_k: Annotated[
        int | None, typer.Option("--top_k", min=1, rich_help_panel=NETWORK, help="Adapters that act at most.")
    ] = None,
    none: Annotated[
        bool, typer.Option("--none", rich_help_panel=NETWORK, help="The base competes in the softmax.")
    ] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", rich_help_panel=NETWORK, help="Above 1 draws coefficients together.")
    ] = 1.0,
    epochs: Annotated[
        float, typer.Option("--epochs", min=0, rich_help_panel=TRAINING, help="End to end; 0 keeps the warm start.")
    ] = 2.0,
    learning_rate: Annotated[float, typer.Option("--learning_rate", rich_help_panel=TRAINING, help="Of Adam.")] = 1e-3,
    batch_size: Annotated[
        int, typer.Option("--batch_size", min=1, rich_help_panel=TRAINING, help="Examples a step.")
    ] = 8,
    entropy: Annotated[
        float, typer.Option("--entropy", min=0, rich_help_panel=TRAINING, help="Spreads every prompt's weight.")
    ] = 0.0,
    balance: Annotated[
        float, typer.Option("--balance", min=0, rich_help_panel=TRAINING, help="Spreads the load over the adapters.")
    ] = 0.01,
    validation_share: Annotated[
        float,
        typer.Option("--validation_share", min=0.05, max=0.9, rich_help_panel=TRAINING, help="Held out to stop by."),
    ] = 0.2,
    static: Annotated[
        str | None,
        typer.Option("--static", metavar="A=λ+B=λ", rich_help_panel=TRAINING,
                     help="Begin from these weights if they are better than the warm start."),
    ] = None,
    keep_prompts: Annotated[
        bool, typer.Option("--keep_prompts", help="Keep beginnings of training prompts, to explain choices by.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the split, the order and the network.")] = 0,
    task: Task = "auto",
    beta: Beta = 0.1,
    limit: Limit = None,
    max_length: Length = 1024,
    system: System = None,
    format: Format = "auto",
    field: Field = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a gate over adapters, base and adapters frozen, on a few hundred examples of several domains.

    DIR receives gate.safetensors and gate.json. The gate runs on these adapters and this base alone.

    **Examples**

    `lorchestra gate fit my-base clinic=./clinic law=./law --data notes.jsonl --data law=contracts.jsonl -o chooser`

    `lorchestra gate fit my-base clinic law finance --data a.jsonl --data b.jsonl --data c.jsonl --layers 4 --top_k 1
    --none -o chooser`
    """
    sources = named_adapters(adapter)
    refuse_overwriting(output_dir, [Weighted(source, 1.0) for source in sources.values()])
    one_of("--activation", activation, ACTIVATIONS)
    _check(task, beta)
    specs = domains(data, format, field, system)
    from dataclasses import asdict, replace

    from lorchestra.cli.gate_view import show_fitted
    from lorchestra.cli.progress import make_reporter
    from lorchestra.data.split import SplitSpec
    from lorchestra.gate.fit import fit as fit_gate
    from lorchestra.gate.settings import FitSettings
    from lorchestra.gate.store import CONFIG, save
    from lorchestra.pipeline.gate_alone import read_domains
    from lorchestra.pipeline.single import check_place

    check_place(output_dir, "gate", CONFIG)

    settings = FitSettings(
        cast("Activation", activation), layers, last_token, hidden, groups, top_k, none, temperature, epochs,
        learning_rate, batch_size,
        entropy=entropy, balance=balance, keep_prompts=keep_prompts, seed=seed,
    )  # fmt: skip
    start = _static(static, list(sources)) if static else None
    reporter = make_reporter()
    members, directory = _members_and_base(base, sources, reporter)
    train, validation = read_domains(
        {name: tuple(replace(spec, limit=limit) for spec in of) for name, of in specs.items()},
        _renderer(directory, max_length),
        SplitSpec(1 - validation_share, validation_share, 0.0, seed),
        task=task, relative_to=Path.cwd(), reporter=reporter,
    )  # fmt: skip
    loaded, bank = _mounted(directory, members, device, dtype, reporter)
    for line in _cut(train, max_length):
        reporter.say(f"warning: {line}")
    learn, held = ([e for of in part.values() for e in of.examples()] for part in (train, validation))
    fitted = fit_gate(
        bank, tuple(members), learn, held, settings, name=name or output_dir.resolve().name, pad_id=loaded.pad_id,
        betas=_betas(train, beta), start=start, reporter=reporter,
    )  # fmt: skip
    told = {
        **fitted.as_dict(),
        "settings": asdict(settings),
        "data": {domain: sorted(of.digests) for domain, of in train.items()},
        "examples": {"train": len(learn), "validation": len(held)},
    }
    save(fitted.gate, output_dir, told)
    if as_json:
        about = {"gate": fitted.gate.spec.name, "digest": fitted.gate.digest, "output_dir": str(output_dir)}
        typer.echo(json.dumps({**about, **told}, indent=2, ensure_ascii=False))
        return
    show_fitted(fitted, told, output_dir)


def evaluate(
    base: BaseModel,
    gate: Annotated[
        Path, typer.Argument(metavar="GATE", help="Directory of a gate, from gate fit.", autocompletion=gates)
    ],
    adapter: Members,
    data: Domains,
    static: Annotated[
        str | None,
        typer.Option("--static", metavar="A=λ+B=λ", help="The weights to beat.", show_default="equal, Σ = 1"),
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Prompts of each domain to explain.")] = 2,
    task: Task = "auto",
    beta: Beta = 0.1,
    limit: Limit = None,
    max_length: Length = 1024,
    system: System = None,
    format: Format = "auto",
    field: Field = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Judge a gate on held-out examples: beside the base, each adapter, static weights, and an oracle.

    The oracle is told the domain, and takes the adapter that was best there when the gate was fitted: give the domains
    the same names. Losses have 95 % intervals, differences are paired item by item.

    **Examples**

    `lorchestra gate eval my-base chooser clinic=./clinic law=./law --data notes=new-notes.jsonl --data law=new.jsonl`

    `lorchestra gate eval my-base chooser clinic law --data new.jsonl --static clinic=0.7+law=0.3 --show 5 --json`
    """
    sources = named_adapters(adapter)
    _check(task, beta)
    specs = domains(data, format, field, system)
    from dataclasses import asdict, replace

    from lorchestra.cli.gate_view import show_judged
    from lorchestra.cli.progress import make_reporter
    from lorchestra.data.split import SplitSpec
    from lorchestra.evaluate.metrics import flat
    from lorchestra.gate.store import fitted, load
    from lorchestra.pipeline.gate_alone import enter_sealed, judge_alone, read_domains

    reporter = make_reporter()
    of = load(gate).members  # a gate that is none is told before a base is loaded, and so are adapters beside it
    beside = [name for name in sources if name not in of]
    if beside and len(sources) > len(of):
        raise UserError(f"the gate chooses among {', '.join(of)}; leave out {', '.join(beside)}")
    weights = _static(static, list(sources)) if static else dict.fromkeys(sources, 1 / len(sources))
    members, directory = _members_and_base(base, sources, reporter)
    held, _ = read_domains(
        {name: tuple(replace(spec, limit=limit) for spec in of) for name, of in specs.items()},
        _renderer(directory, max_length), SplitSpec(1.0, 0.0, 0.0),
        task=task, relative_to=Path.cwd(), reporter=reporter,
    )  # fmt: skip
    loaded, bank = _mounted(directory, members, device, dtype, reporter)
    chosen = load(gate, {name: found.digest for name, found in members.items()}, loaded.id)
    fit_told = fitted(gate)
    for line in [*_cut(held, max_length), *_seen(held, members, fit_told, chosen)]:
        reporter.say(f"warning: {line}")
    sealed = enter_sealed(held, chosen)
    best = fit_told.get("loads", {}).get("best", {})
    judged = judge_alone(
        bank, chosen, held, pad_id=loaded.pad_id, static=weights,
        oracle={domain: best[domain] for domain in held if domain in best},
        betas=_betas(held, beta), shown=show, reporter=reporter,
    )  # fmt: skip
    told = {
        "gate": chosen.spec.name,
        "digest": chosen.digest,
        **judged.verdict.as_dict(),
        "static": weights,
        "oracle": judged.oracle,
        "coefficients": judged.coefficients,
        "routing_accuracy": {name: flat(found) for name, found in judged.accuracy.items()},
        "prompts": [asdict(choice) for choice in judged.choices],
        "sealed_test": sealed,
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    show_judged(told)


app.command("fit", cls=Verb)(fit)
app.command("eval", cls=Verb)(evaluate)


def _check(task: str, beta: float) -> None:
    one_of("--task", task, ("auto", "sft", "dpo"))
    if not beta > 0:
        raise UserError(f"--beta {beta:g} is not above 0")


def _static(text: str, members: list[str]) -> dict[str, float]:
    """Member → λ of ``a=0.7+b=0.3``; those that are not named have 0."""
    out = dict.fromkeys(members, 0.0)
    for part in text.split("+"):
        name, _, value = part.rpartition("=")
        if name.strip() not in members:
            raise UserError(f"--static {text!r}: write NAME=λ+NAME=λ; there are {', '.join(members)}")
        out[name.strip()] = number(value, f"--static {text!r}: write NAME=λ+NAME=λ")
    return out


def _members_and_base(base: str, sources: Mapping[str, str], reporter: Reporter) -> tuple[dict[str, Adapter], Path]:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.base.load import prepare_base
    from lorchestra.base.locate import locate

    members = {
        name: Adapter.load(locate(source, relative_to=Path.cwd(), reporter=reporter))
        for name, source in sources.items()
    }
    return members, prepare_base(base, relative_to=Path.cwd(), reporter=reporter)


def _renderer(directory: Path, max_length: int) -> Renderer:
    from lorchestra.base.load import load_tokenizer
    from lorchestra.data.render import Renderer

    return Renderer(load_tokenizer(directory), max_length)


def _mounted(
    directory: Path, members: Mapping[str, Adapter], device: str, dtype: str, reporter: Reporter
) -> tuple[Base, Bank]:
    from lorchestra.adapter.belonging import base_remarks, check_base
    from lorchestra.bank import Bank
    from lorchestra.base.load import load_base

    loaded = load_base(directory, device=device, dtype=dtype, reporter=reporter)
    check_base(members, loaded.id)
    for line in base_remarks(members, loaded.id):
        reporter.say(line)
    bank = Bank(loaded.model, loaded.id)
    for name, adapter in members.items():
        bank.load(name, adapter)
    return loaded, bank


def _betas(data: Mapping[str, Held], beta: float) -> dict[str, float]:
    return {name: beta for name, held in data.items() if held.domain.kind == "dpo"}


def _cut(data: Mapping[str, Held], max_length: int) -> list[str]:
    found = {name: held.truncated for name, held in data.items() if held.truncated}
    return [
        f"{count} of {len(data[name].domain.items)} examples of {name} cut to --max_length {max_length}"
        for name, count in found.items()
    ]


def _seen(data: Mapping[str, Held], members: Mapping[str, Adapter], told: Mapping[str, Any], gate: Gate) -> list[str]:
    """Data that an adapter or the gate has learned from: what has been seen looks better than what is new."""
    learned = {name: set(adapter.lineage.data.values()) for name, adapter in members.items()}
    learned[f"gate {gate.spec.name}"] = {digest for of in told.get("data", {}).values() for digest in of}
    return [
        f"{who} was trained on the source of {name}; give held-out examples"
        for name, held in data.items()
        for who, digests in learned.items()
        if held.digests & digests
    ]
