"""``lorchestra serve keys``: make, list and revoke the keys of a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorchestra.cli.completion import among
from lorchestra.cli.options import Json
from lorchestra.cli.verbs import Verb, Verbs
from lorchestra.errors import UserError

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="API keys of a server. A file holds their hashes alone; a server that runs sees changes within a second.",
)

File = Annotated[Path, typer.Option("--keys", metavar="FILE", help="The keys file, YAML or JSON.")]
DEFAULT = Path("keys.yaml")


@app.command(cls=Verb)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant.")],
    adapters: Annotated[
        str,
        typer.Option("--adapters", metavar="a,b", help="Adapters it may use, or 'all'. The base may be used anyway."),
    ] = "",
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests a minute.", show_default="no limit")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time.", show_default="no limit")] = None,
    role: Annotated[
        str,
        typer.Option(
            help="user; viewer: looks at the console; operator: changes it, loads adapters, reads metrics.",
            autocompletion=among("user", "viewer", "operator"),
        ),
    ] = "user",
    keys: File = DEFAULT,
) -> None:
    """Make a key and print it. It is not kept anywhere: whoever loses it gets another.

    **Example**

    `lorchestra serve keys add acme --adapters clinic,audit --rpm 60 --concurrency 4`
    """
    from lorchestra.registry.access import ALL, ROLES, add_key

    wanted = next((one for one in ROLES if one == role), None)
    if wanted is None:
        raise UserError(f"role {role!r}: there are {', '.join(ROLES)}")
    allowed = [part.strip() for part in adapters.split(",") if part.strip()]
    secret = add_key(
        keys,
        name,
        adapters="all" if allowed == [ALL] else allowed,
        role=wanted,
        rpm=rpm,
        concurrency=concurrency,
    )
    if not allowed:
        typer.echo(f"note: {name} may use the base alone; --adapters names more", err=True)
    typer.echo(f"the key of {name}, shown this once ({keys} holds its hash):", err=True)
    typer.echo(secret)


@app.command("list", cls=Verb)
def list_keys(keys: File = DEFAULT, as_json: Json = False) -> None:
    """Whose keys there are, and what they may do.

    **Example**

    `lorchestra serve keys list`
    """
    from lorchestra.registry.access import read_keys

    known = read_keys(keys).keys
    if as_json:
        told = [key.model_dump(exclude={"sha256"}) for key in known]
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    from lorchestra.cli.terminal import console

    table = Table("name", "role", "adapters", "a minute", "at a time", "made", box=None)
    for key in known:
        table.add_row(
            key.name,
            key.role,
            "all" if key.adapters == "all" else ", ".join(key.adapters) or "–",
            str(key.rpm or "–"),
            str(key.concurrency or "–"),
            key.created or "–",
        )
    console(markup=False).print(table)


@app.command(cls=Verb)
def remove(name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant.")], keys: File = DEFAULT) -> None:
    """Revoke a key.

    **Example**

    `lorchestra serve keys remove acme`
    """
    from lorchestra.registry.access import remove_key

    remove_key(keys, name)
    typer.echo(f"the key of {name} is revoked", err=True)
