"""``lorchestra chat``: talk to a base with any adapters at any weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.cli.completion import models
from lorchestra.cli.options import Adapters, Device, Dtype, number, weighted
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.cli.models import Mounted
    from lorchestra.data.example import Message
    from lorchestra.data.render import Renderer
    from lorchestra.evaluate.answer import Sampling

HELP = "/weights NAME=WEIGHT … changes the mixture, /reset forgets the conversation, /exit leaves"


def chat(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="Model directory, org/name, GGUF file, or an adapter directory.", autocompletion=models
        ),
    ],
    adapter: Adapters = None,
    system: Annotated[str, typer.Option("--system", help="A system prompt.")] = "",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Answer this and exit. '-' reads standard input.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.1)] = 1.1,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model.

    `/weights a=0.5 b=1` changes the mixture, `/reset` forgets the conversation, `/exit` leaves. Lines of a pipe are
    questions, each answered in turn.

    **Examples**

    `lorchestra chat my-model`

    `lorchestra chat my-base -a general=0.3 -a clinic=0.5 --prompt "What lowers a fever?"`
    """
    members = [weighted(text) for text in adapter or []]
    import torch

    from lorchestra.cli.models import open_model
    from lorchestra.cli.progress import make_reporter
    from lorchestra.data.example import Message
    from lorchestra.data.render import Renderer
    from lorchestra.evaluate.answer import Sampling

    mounted = open_model(base, members, device=device, dtype=dtype, reporter=make_reporter())
    torch.manual_seed(seed)
    renderer = Renderer(mounted.base.tokenizer, max_length=None)
    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty)
    opening = [Message("system", system)] if system else []
    if prompt:
        text = sys.stdin.read() if prompt == "-" else prompt
        _answer(mounted, renderer, [*opening, Message("user", text)], sampling)
        return
    _converse(mounted, renderer, opening, sampling)


def _converse(mounted: Mounted, renderer: Renderer, opening: list[Message], sampling: Sampling) -> None:
    from lorchestra.data.example import Message

    terminal = sys.stdin.isatty()
    if terminal:
        _edit_lines()
        name = Path(mounted.base.directory).name
        typer.secho(f"{name}, {_mixture(mounted.weights)}. {HELP}", err=True, dim=True)
    turns = list(opening)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            turns = list(opening)
        elif line.startswith("/"):
            _command(line, mounted.weights)
        elif line:
            turns.append(Message("user", line))
            try:
                turns.append(Message("assistant", _answer(mounted, renderer, turns, sampling)))
            except KeyboardInterrupt:  # stops the answer, not the conversation
                typer.echo(" …")
                turns.pop()


def _edit_lines() -> None:
    """Arrow keys and history at the prompt, where Python was built with them."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it is what it takes)


def _command(line: str, weights: dict[str, float]) -> None:
    word, *parts = line.split()
    if word != "/weights":
        typer.secho(HELP, err=True, dim=True)
        return
    try:
        weights.update(_weights(parts, weights))
    except UserError as error:
        typer.secho(str(error), err=True, fg="red")
        return
    typer.secho(_mixture(weights), err=True, dim=True)


def _mixture(weights: Mapping[str, float]) -> str:
    return " + ".join(f"{weight:g}·{name}" for name, weight in weights.items()) or "no adapters"


def _weights(parts: list[str], known: Mapping[str, float]) -> dict[str, float]:
    chosen = {}
    for part in parts:
        name, sign, weight = part.rpartition("=")
        if not sign:
            raise UserError(f"{part!r}: write /weights NAME=WEIGHT, as in /weights clinic=0.5")
        if name not in known:
            raise UserError(f"no adapter {name!r} is mounted; mounted: {', '.join(known) or 'none'}")
        chosen[name] = number(weight, repr(part))
    return chosen


def _answer(mounted: Mounted, renderer: Renderer, turns: list[Message], sampling: Sampling) -> str:
    from lorchestra.evaluate.answer import answers

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with mounted.bank.using(mounted.weights):
        ids = renderer.prompt(turns)
        model, tokenizer = mounted.base.model, mounted.base.tokenizer
        text = answers(model, tokenizer, [ids], sampling, stop=renderer.end_of_turn, on_text=show)[0]
    sys.stdout.write("\n")
    return text
