"""Prototypes beside the adapters of a run: by them ``model: auto`` of a server knows what an adapter is for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.data.render import Rendered
from lorchestra.errors import UserError
from lorchestra.events import Reporter
from lorchestra.gate import prototypes
from lorchestra.gate.features import features

MOST = 512  # training prompts, evenly among all


def write_prototypes(
    model: Any, adapter: Adapter, items: Sequence[Rendered], directory: Path, reporter: Reporter
) -> None:
    """Of a stage: from its weights and its training prompts, beside the adapter in ``directory``.

    Texts without a prompt tell nothing of prompts, and a model whose layers cannot be told apart shows no features:
    then there is no such file, which is said.
    """
    prompts = [item.prompt for item in items if item.prompt]
    chosen = prompts[:: max(1, -(-len(prompts) // MOST))]
    if not chosen:
        return
    try:
        with reporter.task("prototypes", len(chosen), "prompt") as task:
            x = features(model, chosen, prototypes.FEATURES)
            task.advance(len(chosen))
        prototypes.save(prototypes.of_prompts(adapter, x), directory)
    except UserError as error:
        reporter.say(f"note: no prototypes are written, a server knows this adapter by its weights: {error}")


def combine_prototypes(adapter: Adapter, parts: Mapping[str, Path], directory: Path) -> None:
    """Of a fusion: it is for the prompts that its members are for. Nothing, unless all stages among them have some;
    what an earlier adapter left there goes.

    Args:
        adapter: the fused one.
        parts: stage → directory of its adapter; those that count.
        directory: of the fused adapter.
    """
    (directory / prototypes.FILE).unlink(missing_ok=True)  # not written over: it may be a hard link
    found = [prototypes.load(part, Adapter.load(part).digest) for part in parts.values()]
    known = [one for one in found if one is not None and one.prompts]
    if known and len(known) == len(found):
        prototypes.save(prototypes.combined(adapter, known), directory)


def copy_prototypes(source: Path, target: Path) -> None:
    """Where there are some; what an earlier adapter left at ``target`` goes."""
    (target / prototypes.FILE).unlink(missing_ok=True)
    if (source / prototypes.FILE).is_file():
        shutil.copyfile(source / prototypes.FILE, target / prototypes.FILE)
