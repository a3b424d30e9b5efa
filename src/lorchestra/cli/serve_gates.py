"""``lorchestra serve --gate`` and ``--auto``: what chooses the adapters of an answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorchestra.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorchestra.events import Reporter
    from lorchestra.gate.network import Gate
    from lorchestra.serve.choosing import Choosing
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.engine import Engine
    from lorchestra.serve.routing import Router
    from lorchestra.serve.versions import Versions

BESIDE = "adapters"  # in a gate's directory, where a run delivers its members with it


def gates(config: ServeConfig, reporter: Reporter) -> dict[str, Gate]:
    """Name → gate, each checked against the base.

    Raises:
        UserError: one cannot be served.
    """
    if not config.gates:
        return {}
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.load import source_name
    from lorchestra.cli.models import base_directory
    from lorchestra.registry.reference import check_name
    from lorchestra.serve.choosing import read_gate

    assert config.base is not None  # checked
    directory = base_directory(config.base, reporter)
    base = fingerprint(directory, source_name(directory), reporter)
    found = {}
    for name, path in config.gates.items():
        check_name(name)
        if name == config.name or name in config.adapters:
            raise UserError(f"{name!r} is a gate and something else here; give each a name of its own")
        found[name] = read_gate(name, Path(path), base, config.max_mixture)
    return found


def add_members(
    config: ServeConfig, gates: Mapping[str, Gate], places: dict[str, Path], versions: Versions | None
) -> None:
    """Serve the adapters that lie in a gate's own directory, where none of that name was given.

    Those whose weights the registry has are its own: what is revoked there must not go on from here.
    """
    for name, gate in gates.items():
        for member in gate.spec.adapters:
            place = Path(config.gates[name]) / BESIDE / member.name
            followed = versions is not None and versions.view.snapshot.holding(member.digest)
            if member.name not in places and place.is_dir() and not followed:
                places[member.name] = place


def choosing(config: ServeConfig, router: Router, engine: Engine, gates: Mapping[str, Gate]) -> Choosing | None:
    """What chooses; ``None`` where nothing does.

    Raises:
        UserError: a gate's member is not here.
    """
    if not gates and not config.auto:
        return None
    from lorchestra.cli.models import base_directory
    from lorchestra.events import SILENT
    from lorchestra.serve.auto import Auto
    from lorchestra.serve.choosing import Choosing

    assert config.base is not None  # checked
    auto = Auto(engine, base_directory(config.base, SILENT), config.auto_top_k) if config.auto else None
    return Choosing(router, engine, gates, auto, config.auto_gate or "")
