"""``lorchestra registry hub push|pull``: to the Hugging Face hub, and from there."""

from __future__ import annotations

from typing import Annotated

import typer

from lorchestra.cli.registry_options import Ref, Where, Why, names, opened, short
from lorchestra.cli.verbs import Verb, Verbs

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Versions to the Hugging Face hub or its mirror (HF_ENDPOINT, HF_TOKEN), and adapters from there.",
)


@app.command(cls=Verb)
def push(
    ref: Ref,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository, made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    branch: Annotated[str, typer.Option("--branch", metavar="NAME", help="On which branch.")] = "",
    registry: Where = "",
) -> None:
    """Upload a version: its files, its manifest, and a card with base, lineage and metrics.

    The manifest tells settings and names of data too. Weights are safetensors alone.

    **Example**

    `lorchestra registry hub push clinic@production acme/clinic-lora --private`
    """
    from lorchestra.registry.transport.hub import push as upload

    with opened(registry) as held:
        typer.echo(upload(held, ref, repository, private=private, branch=branch))


@app.command(cls=Verb)
def pull(
    source: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="The repository.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called here.", autocompletion=names)],
    why: Why = "",
    registry: Where = "",
) -> None:
    """Fetch an adapter and push it here. It is checked like any directory; pickled weights are not fetched.

    **Example**

    `lorchestra registry hub pull acme/clinic-lora@main clinic`
    """
    from lorchestra.cli.progress import make_reporter
    from lorchestra.registry.transport.hub import pull as fetch

    with opened(registry) as held:
        version = fetch(held, source, name, why=why, reporter=make_reporter())
        typer.echo(f"{version.reference} ({short(version.manifest.digest)})")
