"""The verbs, in the order in which a user meets them."""

from __future__ import annotations

from typing import Annotated

import typer

from lorchestra.cli import (
    chat,
    diagnose,
    doctor,
    evaluate,
    export,
    finetune,
    fuse,
    gate,
    init,
    inspect,
    merge,
    registry,
    run,
    search,
    serve,
    sweep,
)
from lorchestra.cli.options import either_dash
from lorchestra.cli.verbs import Verb, Verbs

app = typer.Typer(
    name="lorchestra",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": either_dash},
    help=(
        "From a few hundred examples to your own language model: train LoRA adapters in stages on a frozen base, "
        "fuse them exactly, and deliver a model with an honest verdict.\n\n"
        "Start with `lorchestra init` (a recipe for your own files), or `lorchestra ft` (one stage from the command "
        "line). `lorchestra VERB --help` shows examples."
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lorchestra {version('lorchestra')}")
        raise typer.Exit


@app.callback()
def lorchestra(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that come before the verb."""


RECIPES, COMMANDS, ADAPTERS = "Recipes", "Train from the command line", "Adapters and models"
app.command("run", cls=Verb, rich_help_panel=RECIPES)(run.run)
app.command("plan", cls=Verb, rich_help_panel=RECIPES)(run.plan)
app.command("check", cls=Verb, rich_help_panel=RECIPES)(run.check)
app.command("init", cls=Verb, rich_help_panel=RECIPES)(init.init)
app.command("sweep", cls=Verb, rich_help_panel=RECIPES)(sweep.sweep)
app.command("ft", cls=Verb, rich_help_panel=COMMANDS)(finetune.ft)
app.command("sft", cls=Verb, rich_help_panel=COMMANDS, help="The same as `ft`.")(finetune.ft)
app.command("dpo", cls=Verb, rich_help_panel=COMMANDS)(finetune.dpo)
app.command("merge-lora", cls=Verb, rich_help_panel=ADAPTERS)(merge.merge_lora)
app.command("merge", cls=Verb, rich_help_panel=ADAPTERS)(merge.merge)
app.command("fuse", cls=Verb, rich_help_panel=ADAPTERS)(fuse.fuse)
app.command("inspect", cls=Verb, rich_help_panel=ADAPTERS)(inspect.inspect)
app.command("diagnose", cls=Verb, rich_help_panel=ADAPTERS)(diagnose.diagnose)
app.command("export", cls=Verb, rich_help_panel=ADAPTERS)(export.export)
app.command("search", cls=Verb, rich_help_panel=ADAPTERS)(search.search)
app.add_typer(gate.app, name="gate", rich_help_panel=ADAPTERS)
app.command("chat", cls=Verb, rich_help_panel=ADAPTERS)(chat.chat)
app.command("eval", cls=Verb, rich_help_panel=ADAPTERS)(evaluate.evaluate)
app.command("serve", cls=serve.ServeVerb, rich_help_panel=ADAPTERS)(serve.serve)
app.add_typer(registry.app, name="registry", rich_help_panel=ADAPTERS)
app.command("doctor", cls=Verb, rich_help_panel=ADAPTERS)(doctor.doctor)
