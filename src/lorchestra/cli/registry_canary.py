"""``lorchestra registry canary``: try a version on a share of the users, watched, and taken back by itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorchestra.cli.options import Json, either_dash, number
from lorchestra.cli.registry_options import Ref, Where, Why, aliases, named, opened, printed
from lorchestra.cli.verbs import Verb, Verbs
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.registry.canary.guards import Counts, Reading
    from lorchestra.registry.canary.watching import Rollout, Status

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": either_dash},
    help=(
        "Try a version on a growing share of the users of an alias. Guards compare it with the version that is there; "
        "a worse one is taken back by itself."
    ),
)

Target = Annotated[
    str,
    typer.Argument(metavar="NAME[@ALIAS]", help="clinic (its production), or clinic@staging.", autocompletion=aliases),
]
OFF = "none"


@app.command(cls=Verb)
def start(
    target: Target,
    ref: Ref,
    steps: Annotated[str, typer.Option("--steps", metavar="%,%,…", help="Users, in percent, growing.")] = (
        "1,5,25,50,100"
    ),
    hold: Annotated[str, typer.Option("--hold", metavar="TIME", help="Of each step: 90s, 10m, 1h30m.")] = "10m",
    max_error_increase: Annotated[
        str, typer.Option(metavar="POINTS", help="How much higher its error rate may be, in points of a hundred.")
    ] = "1",
    max_latency_increase: Annotated[
        str, typer.Option(metavar="%", help="How much longer its mean latency may be.")
    ] = "25",
    max_score_drop: Annotated[
        str, typer.Option(metavar="SCORE", help="How much lower its mean score may be, of scores from 0 to 1.")
    ] = "0.05",
    max_error_rate: Annotated[
        str, typer.Option(metavar="%", help="That it may have at all, whatever the other does.")
    ] = "50",
    min_requests: Annotated[int, typer.Option(min=0, help="It answers so many in each step before the next.")] = 100,
    alpha: Annotated[float, typer.Option(help="Chance that a version no worse than allowed is taken back.")] = 0.05,
    promote_at_end: Annotated[
        bool, typer.Option("--promote-at-end", help="Move the alias when the last step is over, without asking.")
    ] = False,
    why: Why = "",
    registry: Where = "",
) -> None:
    """Let REF answer the first share of the users. A guard of `none` is left out.

    The alias stays where it is until the promotion. Servers that use the registry split the traffic, count, and go on.

    **Examples**

    `lorchestra registry canary start clinic clinic@v3 --steps 1,5,25,100 --hold 10m --why "notes of 2025"`

    `lorchestra registry canary start clinic@staging clinic@v3 --max-score-drop none --max-error-increase 0.5`
    """
    from lorchestra.registry.canary.guards import Guards
    from lorchestra.registry.canary.plan import Plan, parse_duration
    from lorchestra.registry.canary.rollout import start as begin

    name, alias = _target(target, "canary start")
    shares = tuple(
        number(part, f"--steps {steps!r}: write percents, as in 1,5,25,100") / 100 for part in steps.split(",")
    )
    guards = Guards(
        alpha=alpha,
        max_error_increase=_allowed("--max-error-increase", max_error_increase, 100),
        max_latency_increase=_allowed("--max-latency-increase", max_latency_increase, 100),
        max_score_drop=_allowed("--max-score-drop", max_score_drop, 1),
        max_error_rate=_allowed("--max-error-rate", max_error_rate, 100),
        min_requests=min_requests,
    )
    plan = Plan(shares, parse_duration(hold), promote_at_end)
    with opened(registry) as held:
        begun = begin(held, name, ref, alias=alias, plan=plan, guards=guards, why=why)
    typer.echo(f"{begun.candidate.reference} answers {_percent(begun.share)} of the users of {begun}")
    if begun.share >= 1 and len(begun.plan.steps) == 1:
        typer.echo("note: with nobody left to compare it with, only --max-error-rate guards it", err=True)


@app.command(cls=Verb)
def status(target: Target, registry: Where = "", as_json: Json = False) -> None:
    """Both versions in this step: counts, differences with intervals that hold at every look, and what happens next.

    **Example**

    `lorchestra registry canary status clinic`
    """
    from lorchestra.registry.canary.rollout import status as look

    name, alias = _target(target, "canary status")
    with opened(registry) as held:
        seen = look(held, name, alias)
    if as_json:
        printed(_told(seen))
        return
    _shown(seen)


@app.command(cls=Verb)
def promote(
    target: Target,
    force: Annotated[bool, typer.Option("--force", help="Though a guard is broken.")] = False,
    why: Why = "",
    registry: Where = "",
) -> None:
    """Move the alias to the version that is tried, whatever step it is in, and end the canary.

    **Example**

    `lorchestra registry canary promote clinic --why "two days without complaints"`
    """
    from lorchestra.registry.canary.rollout import promote as finish

    name, alias = _target(target, "canary promote")
    with opened(registry) as held:
        moved = finish(held, name, alias, why=why, force=force)
    typer.echo(f"{moved.name}@{moved.alias} → {moved.version.reference}")


@app.command(cls=Verb)
def abort(target: Target, why: Why = "", registry: Where = "") -> None:
    """End the canary: everybody is answered by the version that the alias leads to. Nothing asks: it burns.

    **Example**

    `lorchestra registry canary abort clinic --why "answers in French"`
    """
    from lorchestra.registry.canary.rollout import abort as stop

    name, alias = _target(target, "canary abort")
    with opened(registry) as held:
        ended = stop(held, name, alias, why=why)
    typer.echo(f"the canary of {ended} is over: {ended.stable.reference} answers everybody")


def _target(text: str, what: str) -> tuple[str, str]:
    return named(text if "@" in text else f"{text}@production", what)


def _allowed(option: str, text: str, parts: float) -> float | None:
    if text == OFF:
        return None
    value = number(text, f"{option} is a number or {OFF!r}") / parts
    if value < 0:
        raise UserError(f"{option} {text}: how much worse it may be is at least 0, or {OFF!r}")
    return value


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _told(seen: Status) -> dict[str, Any]:
    rollout = seen.rollout
    return {
        "name": rollout.name, "alias": rollout.alias, "state": rollout.state, "stable": rollout.stable.reference,
        "candidate": rollout.candidate.reference, "share": rollout.share, "step": rollout.step,
        "plan": rollout.plan.to_json(), "guards": rollout.guards.to_json(), "started": rollout.started,
        "stepped": rollout.stepped, "ended": rollout.ended or None, "by": rollout.by, "why": rollout.why,
        "arms": {arm: asdict(counts) for arm, counts in seen.arms.items()},
        "readings": [asdict(reading) for reading in seen.readings], "action": seen.action, "next": seen.next,
        "steps": rollout.evidence["steps"],
    }  # fmt: skip


def _shown(seen: Status) -> None:
    from rich.table import Table

    from lorchestra.cli.terminal import console

    out, rollout = console(markup=False), seen.rollout
    out.print(_heading(rollout))
    arms = Table("", "version", "users", "requests", "errors", "latency", "score", box=None)
    stable, candidate = seen.arms["stable"], seen.arms["candidate"]
    arms.add_row("stable", rollout.stable.reference, _percent(round(1 - rollout.share, 6)), *_arm(stable))
    arms.add_row("candidate", rollout.candidate.reference, _percent(rollout.share), *_arm(candidate))
    out.print(arms)
    if seen.readings:
        guards = Table("guard", "worse by", "interval", "allowed", "", box=None)
        for reading in seen.readings:
            guards.add_row(*_guard(reading))
        out.print(guards)
    out.print(f"next: {seen.next}" if rollout.state == "running" else seen.next, soft_wrap=True)


def _heading(rollout: Rollout) -> str:
    steps = len(rollout.plan.steps)
    why = f" ({rollout.why})" if rollout.why and rollout.state == "running" else ""
    step = f"step {rollout.step + 1} of {steps}"
    return f"{rollout}: {rollout.state}, {step}, started {rollout.started} by {rollout.by}{why}"


def _arm(counts: Counts) -> list[str]:
    import math

    return [
        f"{counts.requests:,}",
        f"{counts.errors:,}" + (f" ({100 * counts.errors / counts.requests:.2f} %)" if counts.requests else ""),
        f"{math.exp(counts.latency_sum / counts.latency_n):.3g} s" if counts.latency_n else "–",
        f"{counts.score_sum / counts.score_n:.3f} (of {counts.score_n:,})" if counts.score_n else "–",
    ]


def _guard(reading: Reading) -> list[str]:
    from lorchestra.registry.canary.guards import GUARDS, shown

    form = GUARDS[reading.guard].form
    interval = f"[{shown(reading.low, form, '−∞')}, {shown(reading.high, form, '∞')}]"
    return [reading.guard, shown(reading.worse, form, "–"), interval, shown(reading.allowed, form), reading.state]
