"""``lorchestra chat``: talk to a base with any adapters at any weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.cli.options import Adapters, Device, Dtype, weighted
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.cli.models import Mounted
    from lorchestra.data.example import Message
    from lorchestra.data.render import Renderer
    from lorchestra.evaluate.answer import Sampling


def chat(
    base: Annotated[str, typer.Argument(help="Model directory, org/name, GGUF file, or an adapter directory.")],
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

    `/reset` forgets the conversation, `/weights a=0.5 b=1` changes the mixture, `/exit` leaves.

    **Examples**

    `lorchestra chat my-model`

    `lorchestra chat my-base -a general=0.3 -a clinic=0.5 --prompt "What lowers a fever?"`
    """
    members = [weighted(text) for text in adapter or []]
    import torch

    from lorchestra.cli.models import open_model
    from lorchestra.data.example import Message
    from lorchestra.data.render import Renderer
    from lorchestra.evaluate.answer import Sampling

    mounted = open_model(base, members, device=device, dtype=dtype)
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

    weights = mounted.weights
    turns = list(opening)
    if sys.stdin.isatty():
        mixture = " + ".join(f"{w:g}·{n}" for n, w in weights.items()) or "no adapters"
        typer.secho(f"{Path(mounted.base.directory).name}, {mixture}. /reset, /weights, /exit", err=True, dim=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            turns = list(opening)
        elif line.startswith("/weights"):
            try:
                weights.update(_weights(line.removeprefix("/weights").split(), weights))
            except UserError as error:
                typer.secho(str(error), err=True, fg="red")
        elif line:
            turns.append(Message("user", line))
            turns.append(Message("assistant", _answer(mounted, renderer, turns, sampling)))


def _weights(parts: list[str], known: dict[str, float]) -> dict[str, float]:
    chosen = {}
    for part in parts:
        member = weighted(part)
        if member.source not in known:
            raise UserError(f"no adapter {member.source!r} is mounted; mounted: {', '.join(known) or 'none'}")
        chosen[member.source] = member.weight
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
