"""A base with adapters mounted, as ``chat``, ``eval`` and ``merge`` need it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.base.load import Base, load_base, prepare_base
from lorchestra.base.locate import locate
from lorchestra.cli.options import Weighted, distinct
from lorchestra.cli.progress import make_reporter
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


def load_adapter(source: str, reporter: Reporter) -> Adapter:
    """An adapter from a directory, ``hf:`` or ``pip:``."""
    return Adapter.load(locate(source, relative_to=Path.cwd(), reporter=reporter))


def base_of(adapter: Path) -> str:
    """The base that an adapter directory names.

    Raises:
        SourceError: it names none.
    """
    name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise SourceError(f"{adapter} is an adapter that does not name its base; give the base, and it with --adapter")
    return str(name)


def resolve_base(base: str, members: list[Weighted]) -> tuple[str, list[Weighted]]:
    """Where the base argument is itself an adapter directory: its base, and the adapter as a member."""
    path = Path(base)
    if path.is_dir() and is_adapter(path):
        return base_of(path), [Weighted(base, 1.0), *members]
    return base, members


def open_model(base: str, members: list[Weighted], *, device: str, dtype: str) -> Mounted:
    """Load the base and mount every member."""
    reporter = make_reporter()
    base, members = resolve_base(base, members)
    named = distinct(members)
    adapters = {name: load_adapter(member.source, reporter) for name, member in named.items()}
    loaded = load_base(prepare_base(base, relative_to=Path.cwd(), reporter=reporter), device=device, dtype=dtype)
    bank = Bank(loaded.model, loaded.id)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    return Mounted(loaded, bank, {name: member.weight for name, member in named.items()})
