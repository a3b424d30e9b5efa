"""What the verbs of ``lorchestra registry`` share: which registry, which version, and asking before what cannot be
undone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.progress import amount
from lorchestra.errors import LorchestraError, UserError, counted

if TYPE_CHECKING:
    from lorchestra.registry.manifest import Metric
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Measured, Version

VARIABLE = "LORCHESTRA_REGISTRY"
MANY = 200  # words that Tab offers at most


def _asked(context: typer.Context, make: Callable[[Registry], list[str]], incomplete: str) -> list[str]:
    """Words from the registry that the command line names so far; none where there is none to ask."""
    url = context.params.get("registry") or os.environ.get(VARIABLE, "")
    if not url:
        return []
    try:
        with opened(url) as registry:
            words = make(registry)
    except (LorchestraError, OSError):
        return []  # Tab has nothing to say; the command itself will
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete)][:MANY]


def names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of adapters."""
    return _asked(ctx, lambda registry: registry.names(), incomplete)


def aliases(ctx: typer.Context, incomplete: str) -> list[str]:
    """``clinic@production``."""
    return _asked(ctx, lambda registry: [f"{a.name}@{a.alias}" for a in registry.aliases()], incomplete)


def references(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names; and where one is written already, its aliases and versions."""
    name, sign, _ = incomplete.partition("@")

    def make(registry: Registry) -> list[str]:
        if not sign:
            return registry.names()
        found = [f"{name}@{a.alias}" for a in registry.aliases(name)]
        return found + [line.reference for line in registry.summaries(name, limit=MANY)]

    return _asked(ctx, make, incomplete)


Where = Annotated[
    str,
    typer.Option(
        "--registry",
        metavar="URL",
        envvar=VARIABLE,
        help="A directory, sqlite:///… or postgresql://…?blobs=…",
        show_default=False,
    ),
]
Ref = Annotated[
    str,
    typer.Argument(metavar="REF", help="name, name@v2, name@production or name@sha256:…", autocompletion=references),
]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="For the history.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def opened(url: str, *, create: bool = False) -> Registry:
    """The registry that ``--registry`` or the environment names; a context manager.

    Raises:
        UserError: neither names one.
    """
    if not url:
        raise UserError(
            f"no registry is named. Add --registry DIR to the command, or set {VARIABLE}, for example "
            f"export {VARIABLE}=$HOME/adapters; `lorchestra registry init DIR` makes a new one"
        )
    from lorchestra.registry.registry import Registry

    return Registry.open(url, create=create)


def confirmed(question: str, yes: bool) -> None:
    """Go on only if somebody says so.

    Raises:
        UserError: nobody can be asked, and ``--yes`` is not there.
        typer.Exit: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody can be asked here; add --yes to do it. Nothing was changed")
    if not typer.confirm(question, err=True):
        typer.echo("nothing was changed", err=True)
        raise typer.Exit(1)


def printed(value: Any) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def told(version: Version, aliases: list[str]) -> dict[str, Any]:
    """A version as JSON: what is in its manifest, and what is said of it now."""
    revoked = version.revoked
    return {
        "reference": version.manifest.reference,
        "state": version.state,
        "revoked": None if revoked is None else {"at": revoked.at, "by": revoked.by, "why": revoked.why},
        "aliases": aliases,
        "manifest_digest": version.manifest.manifest_digest,
        "manifest": version.manifest.model_dump(mode="json"),
    }


def aliases_of(registry: Registry, name: str = "") -> dict[int, list[str]]:
    """Version's id → the aliases that point at it."""
    found: dict[int, list[str]] = {}
    for state in registry.aliases(name):
        found.setdefault(state.version.id, []).append(state.alias)
    return found


def metric(value: Metric | Measured) -> str:
    """``1.21 [1.18, 1.24]``."""
    interval = "" if value.low is None or value.high is None else f" [{value.low:.4g}, {value.high:.4g}]"
    return f"{value.value:.4g}{interval}"


def short(digest: str) -> str:
    """``3f2a90c1b7de``."""
    return digest.removeprefix("sha256:")[:12]


def named(text: str, what: str) -> tuple[str, str]:
    """``NAME@ALIAS``.

    Raises:
        UserError: it names no alias.
    """
    from lorchestra.registry.reference import parse_reference

    reference = parse_reference(text)
    if not reference.alias:
        raise UserError(f"{what} {text!r}: write NAME@ALIAS, as in clinic@production")
    return reference.name, reference.alias


def size(count: float) -> str:
    """``512 bytes``, ``53.2 kB``, ``12.5 MB``, ``1.25 GB``."""
    if count < 1000:
        return counted(int(count), "byte")
    return f"{count / 1e3:.1f} kB" if count < 1e6 else amount(count)
