"""A base with adapters mounted, as ``chat`` and ``eval`` need it; adapters by name, as ``merge`` and ``fuse`` do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.belonging import base_remarks
from lorchestra.adapter.lineage import BaseId
from lorchestra.bank import Bank
from lorchestra.base.load import Base, load_base, prepare_base
from lorchestra.base.locate import locate
from lorchestra.cli.options import Weighted, distinct
from lorchestra.errors import SourceError
from lorchestra.events import Reporter


@dataclass(frozen=True)
class Mounted:
    """A loaded base, its bank, and the coefficients that the command line asked for."""

    base: Base
    bank: Bank
    weights: dict[str, float]


def is_adapter(directory: Path) -> bool:
    """Whether ``directory`` holds a PEFT adapter (and not a whole model)."""
    return (directory / "adapter_config.json").exists() and not (directory / "config.json").exists()


def load_adapters(members: list[Weighted], reporter: Reporter) -> tuple[dict[str, Adapter], dict[str, float]]:
    """Name → adapter (from a directory, ``hf:`` or ``pip:``), and name → weight.

    Raises:
        UserError: an adapter is given twice.
        SourceError, AdapterError: one cannot be found or read.
    """
    named = distinct(members)
    adapters = {
        name: Adapter.load(locate(member.source, relative_to=Path.cwd(), reporter=reporter))
        for name, member in named.items()
    }
    return adapters, {name: member.weight for name, member in named.items()}


def open_model(base: str, members: list[Weighted], *, device: str, dtype: str, reporter: Reporter) -> Mounted:
    """Load the base and mount every member. A base that is itself an adapter brings its own base and is a member.

    Raises:
        SourceError, AdapterError, UserError: what cannot be found, read or combined.
    """
    itself = is_adapter(locate(base, relative_to=Path.cwd(), reporter=reporter))
    if itself:
        members = [Weighted(base, 1.0), *members]
    adapters, weights = load_adapters(members, reporter)
    directory = base_of(base, next(iter(adapters.values())), reporter) if itself else base_directory(base, reporter)
    loaded = load_base(directory, device=device, dtype=dtype, reporter=reporter)
    for line in remarks(adapters, weights, loaded.id):
        reporter.say(line)
    bank = Bank(loaded.model, loaded.id)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    return Mounted(loaded, bank, weights)


def base_directory(base: str, reporter: Reporter) -> Path:
    """The Hugging Face directory of a base, fetched and converted if need be."""
    return prepare_base(base, relative_to=Path.cwd(), reporter=reporter)


def base_of(source: str, adapter: Adapter, reporter: Reporter) -> Path:
    """The directory of the base that an adapter names.

    Raises:
        SourceError: it names none, or it is not there.
    """
    if not adapter.base.name:
        raise SourceError(f"{source} is an adapter that does not name its base; give the base, and it with --adapter")
    try:
        return base_directory(adapter.base.name, reporter)
    except SourceError as error:
        raise SourceError(
            f"{source} is an adapter, and its base cannot be had: {error}\n"
            f"If the base is elsewhere now, give it first: BASE --adapter {source}"
        ) from error


def remarks(adapters: Mapping[str, Adapter], weights: Mapping[str, float], base: BaseId | None = None) -> list[str]:
    """What a user should know about this mixture: contexts that are missing, templates that differ, unknown bases."""
    from lorchestra.fusion.search import context_warnings

    return [*(f"warning: {line}" for line in context_warnings(adapters, weights)), *base_remarks(adapters, base)]
