"""``lorchestra serve --registry``: the registry that is followed, and what is told of it at the start."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.events import Reporter
    from lorchestra.registry.mistakes import NoRegistryError, RegistryError
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.engine import Engine
    from lorchestra.serve.following import Follower
    from lorchestra.serve.metrics import Metrics, RegistryMetrics
    from lorchestra.serve.outcomes import Outcomes
    from lorchestra.serve.routing import Router
    from lorchestra.serve.versions import Versions

PANEL = "Registry"
Url = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help="Serve what is in it, too.",
        show_default="LORCHESTRA_REGISTRY",
        rich_help_panel=PANEL,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--registry-cache",
        metavar="DIR",
        help="Copies of its versions.",
        show_default="under LORCHESTRA_HOME",
        rich_help_panel=PANEL,
    ),
]
CacheSize = Annotated[
    str | None,
    typer.Option(
        "--registry-cache-size",
        metavar="SIZE",
        help="At most so much of them, as in 20GB.",
        show_default="20GB",
        rich_help_panel=PANEL,
    ),
]
Grace = Annotated[
    str | None,
    typer.Option(
        "--registry-grace",
        metavar="1h",
        help="Go on so long while it is away.",
        show_default="1h",
        rich_help_panel=PANEL,
    ),
]
log = logging.getLogger("lorchestra.serve.registry")


@dataclass(frozen=True)
class Followed:
    """What follows the registry, and what tells it."""

    follower: Follower
    outcomes: Outcomes

    def start(self) -> None:
        """Begin, on the running event loop."""
        self.follower.start()
        self.outcomes.start()

    async def stop(self) -> None:
        """Tell the registry what was counted last, and let go of it."""
        await self.outcomes.stop()
        await self.follower.stop()
        self.follower.registry.close()


def versions(config: ServeConfig, reporter: Reporter) -> Versions | None:
    """The versions that are to be served, as the registry has them now; ``None`` where there is none.

    While it is away, as this machine has kept it, for what is left of the grace.

    Raises:
        UserError: it is no registry, or there is none at that place.
        RegistryError: it cannot be reached, and nothing is kept that could be served.
    """
    if not config.registry_url:
        return None
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.home import home
    from lorchestra.base.load import source_name
    from lorchestra.cli.models import base_directory
    from lorchestra.registry.canary.plan import parse_duration
    from lorchestra.registry.mistakes import NoRegistryError, RegistryError
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.snapshot import Snapshot
    from lorchestra.serve.config import size_of
    from lorchestra.serve.versions import Versions, View

    assert config.base is not None  # checked
    url, actor = config.registry_url, f"lorchestra-serve@{socket.gethostname()}"
    cache = Path(config.registry_cache) if config.registry_cache else home() / "versions"
    away: RegistryError | NoRegistryError | None = None
    try:
        registry = Registry.open(url, actor=actor)
        snapshot = Snapshot.read(registry.catalog)
    except (RegistryError, NoRegistryError) as error:
        if isinstance(error, NoRegistryError) and not (cache / "registries").is_dir():
            raise
        registry, snapshot, away = Registry.later(url, actor=actor), Snapshot(), error
    directory = base_directory(config.base, reporter)
    base = fingerprint(directory, source_name(directory), reporter)
    grace = parse_duration(config.registry_grace).total_seconds()
    most = size_of(config.registry_cache_size) if config.registry_cache_size else None
    made = Versions(registry, base, cache, grace, most)
    if away is None:
        made.view = View(snapshot)
    else:
        _resume(made, away)
    return made


def _resume(versions: Versions, away: RegistryError | NoRegistryError) -> None:
    """Go on from what is kept of a registry that is away.

    Raises:
        RegistryError, NoRegistryError: nothing is, or it is too old, or no version is here with it.
    """
    from lorchestra.registry.canary.plan import duration
    from lorchestra.registry.mistakes import NoRegistryError
    from lorchestra.serve.versions import View

    grace, last = timedelta(seconds=versions.grace), versions.kept.last()
    why = f"{str(away).rstrip('.')}. "
    if last is None and isinstance(away, NoRegistryError):
        raise away
    if last is None:
        raise type(away)(
            f"{why}Nor does {versions.cache} hold what it said last for this base, so nothing can be served"
        )
    snapshot, age = last
    seen = f"what {versions.cache} holds of it was last seen to hold {duration(timedelta(seconds=age))} ago"
    if age > versions.grace:
        raise type(away)(
            f"{why}And {seen}, which is not believed for longer than {duration(grace)} (--registry-grace). Bring the "
            "registry back first"
        )
    pointed = {line.id: line for _, _, line in snapshot.pointers() if line.revoked is None}
    here = [line for line in pointed.values() if versions.kept.noted(line)]
    if not here:
        raise type(away)(f"{why}And no version that it points at is in {versions.cache}, so nothing can be served")
    versions.view, versions.seen = View(snapshot), versions.clock() - age
    log.error(
        "%sServing without it, by what it said %s ago, for another %s: %s of %s, and no revocation since",
        why, duration(timedelta(seconds=age)), duration(grace - timedelta(seconds=age)), len(here),
        counted(len(pointed), "version"),
    )  # fmt: skip


def followed(router: Router, engine: Engine, metrics: Metrics, *, prompts: bool) -> Followed | None:
    """What keeps the router's versions as the registry has them; ``None`` where there are none."""
    if router.versions is None:
        return None
    from lorchestra.serve.outcomes import Outcomes

    found, told = follower(router, engine, metrics)
    return Followed(found, Outcomes(found, told, prompts=prompts))


def follower(router: Router, engine: Engine, metrics: Metrics) -> tuple[Follower, RegistryMetrics]:
    """Who keeps the router's versions as the registry has them, or as this machine kept them while that is away."""
    from lorchestra.serve.following import Follower
    from lorchestra.serve.metrics import RegistryMetrics

    assert router.versions is not None  # whoever asks has looked
    told = RegistryMetrics(metrics)
    found = Follower(router.versions, engine, told, router.hidden)
    if router.versions.registry.catalog.checked:
        found.read()
    else:
        found.resume()
    return found, told


def shown(found: Versions) -> str:
    """For the table at the start."""
    snapshot = found.view.snapshot
    aliases = sum(1 for _, alias, _ in snapshot.pointers() if alias)
    names = ", ".join(sorted(snapshot.names)[:12]) + (", …" if len(snapshot.names) > 12 else "")
    counts = f"{counted(len(snapshot.names), 'name')}, {counted(aliases, 'alias', 'aliases')}"
    return f"{found.registry.location.shown}: {counts}" + (f": {names}" if names else "")
