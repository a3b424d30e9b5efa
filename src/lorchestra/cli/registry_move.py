"""``lorchestra registry alias|unalias|promote|rollback|revoke|reinstate|accept|derive``: what is said of versions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.completion import among, models
from lorchestra.cli.options import number
from lorchestra.cli.registry_options import (
    Ref,
    Where,
    Why,
    Yes,
    aliases,
    confirmed,
    named,
    names,
    opened,
    references,
)
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import AliasState

Alias = Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="clinic@production.", autocompletion=aliases)]
Needed = Annotated[str, typer.Option("--why", metavar="TEXT", help="For the history; needed.")]
Base = Annotated[
    str,
    typer.Option("--base", metavar="BASE", help="A model directory or hf:org/name.", autocompletion=models),
]


def alias(target: Alias, ref: Ref, why: Why = "", registry: Where = "") -> None:
    """Point an alias at a version. Servers follow within a second.

    **Example**

    `lorchestra registry alias clinic@staging clinic@v3`
    """
    name, word = named(target, "alias")
    with opened(registry) as held:
        _moved(None, held.alias(name, word, ref, why))


def unalias(target: Alias, why: Why = "", yes: Yes = False, registry: Where = "") -> None:
    """Take an alias away; the version stays.

    **Example**

    `lorchestra registry unalias clinic@staging --yes`
    """
    name, word = named(target, "unalias")
    with opened(registry) as held:
        now = _at(held, name, word)
        if now is not None:
            confirmed(f"take {target} away, which leads to {now.version.reference}?", yes)
        held.unalias(name, word, why)
        typer.echo(f"{target} leads nowhere")


def promote(
    ref: Ref,
    to: Annotated[str, typer.Option("--to", metavar="ALIAS", help="Which alias.")] = "production",
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="GATE",
            help="loss<=1.2, not-worse:loss (on the same sealed test), requires:data. Repeat.",
            autocompletion=among("not-worse:", "requires:data", "requires:lineage", "requires:sealed"),
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Though a gate refuses; needs --why.")] = False,
    why: Why = "",
    registry: Where = "",
) -> None:
    """Move an alias to a version that passes every gate; else nothing moves, and each gate says why.

    **Examples**

    `lorchestra registry promote clinic@v3 --gate "loss<=1.2" --gate not-worse:loss`

    `lorchestra registry promote clinic@v3 --to staging`
    """
    from lorchestra.registry.gates import parse_gate

    gates = [parse_gate(text) for text in gate or ()]
    with opened(registry) as held:
        version = held.resolve(ref)
        before = _at(held, version.manifest.name, to)
        _moved(before, held.promote(version.reference, to, gates, why, force))


def rollback(
    target: Annotated[
        str, typer.Argument(metavar="NAME[@ALIAS]", help="clinic, or clinic@staging.", autocompletion=aliases)
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="REF", help="Not the one before, but this.", autocompletion=references)
    ] = "",
    why: Why = "",
    registry: Where = "",
) -> None:
    """Move an alias back to the version it led to before. Nothing asks: this is for when it burns.

    **Examples**

    `lorchestra registry rollback clinic --why "answers in French"`

    `lorchestra registry rollback clinic@staging --to clinic@v1`
    """
    name, word = named(target if "@" in target else f"{target}@production", "rollback")
    with opened(registry) as held:
        before = _at(held, name, word)
        _moved(before, held.rollback(name, word, why, to))


def revoke(ref: Ref, why: Needed = "", yes: Yes = False, registry: Where = "") -> None:
    """Take a version out of use at once: servers refuse it, and end what it is answering.

    **Example**

    `lorchestra registry revoke clinic@v2 --why "trained on the sealed test"`
    """
    _needs_reason(why, "a revocation")
    with opened(registry) as held:
        version = held.resolve(ref)
        leading = [f"{a.name}@{a.alias}" for a in held.aliases(version.manifest.name) if a.version.id == version.id]
        served = f" {', '.join(leading)} will fail until moved." if leading else ""
        confirmed(f"revoke {version.reference}?{served}", yes)
        held.revoke(version.reference, why)
        typer.echo(f"{version.reference} is revoked")
        if leading:
            typer.echo(
                f"note: {', '.join(leading)} still leads there; `lorchestra registry rollback` moves it", err=True
            )


def reinstate(ref: Ref, why: Needed = "", registry: Where = "") -> None:
    """Take a revocation back.

    **Example**

    `lorchestra registry reinstate clinic@v2 --why "it was v3 that was wrong"`
    """
    _needs_reason(why, "taking a revocation back")
    with opened(registry) as held:
        typer.echo(f"{held.reinstate(ref, why).reference} is ready")


def accept(
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help="tokenizer or template.", autocompletion=among("tokenizer", "template")),
    ],
    base: Base,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="This adapter alone.", autocompletion=names)] = "",
    why: Needed = "",
    registry: Where = "",
) -> None:
    """Put on record that adapters may be used with the tokenizer or chat template of a base, though it changed.

    **Example**

    `lorchestra registry accept template --base models/my-base --name clinic --why "the system prompt moved"`
    """
    if kind not in ("tokenizer", "template"):
        raise UserError(f"{kind!r} cannot be accepted; tokenizer and template can. For weights there is `derive`")
    _needs_reason(why, "accepting a changed " + kind)
    with opened(registry) as held:
        identity = _identity(base)
        held.accept(name, "tokenizer" if kind == "tokenizer" else "template", identity, why)
        typer.echo(f"the {kind} of {identity.name} is accepted for {name or 'every adapter'}")


def derive(
    base: Base,
    derived: Annotated[
        str,
        typer.Option("--derived", metavar="MODEL", help="What was made of it.", autocompletion=models),
    ],
    method: Annotated[
        str,
        typer.Option("--method", help="awq, fp8, nf4, gguf, …", autocompletion=among("awq", "fp8", "nf4", "gguf")),
    ],
    drift: Annotated[
        list[str], typer.Option("--drift", metavar="NAME=VALUE", help="What was measured: kl=0.004. Repeat.")
    ],
    why: Needed = "",
    registry: Where = "",
) -> None:
    """Put on record that a model was made from a base (quantised, say), and how far from it it is.

    Adapters of the base may then be served on it.

    **Example**

    `lorchestra registry derive --base models/my-base --derived models/my-base-awq --method awq --drift kl=0.004
    --why "the GPUs have 24 GB"`
    """
    _needs_reason(why, "a derived base")
    measured = dict(_drift(text) for text in drift)
    with opened(registry) as held:
        parent, child = _identity(base), _identity(derived)
        held.derive(parent.weights, child, method, measured, why)
        typer.echo(f"{child.name} is derived from {parent.name} by {method}")


def _needs_reason(why: str, what: str) -> None:
    if not why.strip():
        raise UserError(f"{what} needs a reason, for the history: add --why TEXT")


def _at(held: Registry, name: str, alias: str) -> AliasState | None:
    return next((state for state in held.aliases(name) if state.alias == alias), None)


def _moved(before: AliasState | None, after: AliasState) -> None:
    if before and before.version.id == after.version.id:
        typer.echo(f"{after.name}@{after.alias} leads to {after.version.reference} already")
        return
    was = f" (was {before.version.reference})" if before else ""
    typer.echo(f"{after.name}@{after.alias} → {after.version.reference}{was}")


def _drift(text: str) -> tuple[str, float]:
    context = f"--drift {text!r}: write NAME=VALUE, as in kl=0.004"
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise UserError(context)
    return name.strip(), number(value, context)


def _identity(source: str) -> BaseId:
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.load import prepare_base, source_name
    from lorchestra.cli.progress import make_reporter

    reporter: Any = make_reporter()
    directory = prepare_base(source, relative_to=Path.cwd(), reporter=reporter)
    return fingerprint(directory, source_name(directory), reporter)
