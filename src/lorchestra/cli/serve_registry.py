"""``lorchestra serve --registry``: the registry that is followed, and what is told of it at the start."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.events import Reporter
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.engine import Engine
    from lorchestra.serve.following import Follower
    from lorchestra.serve.metrics import Metrics
    from lorchestra.serve.outcomes import Outcomes
    from lorchestra.serve.routing import Router
    from lorchestra.serve.versions import Versions

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

    Raises:
        UserError: it is no registry, or there is none at that place.
        RegistryError: it cannot be reached.
    """
    if not config.registry_url:
        return None
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.home import home
    from lorchestra.base.load import source_name
    from lorchestra.cli.models import base_directory
    from lorchestra.registry.canary.plan import parse_duration
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.snapshot import Snapshot
    from lorchestra.serve.versions import Versions, View

    assert config.base is not None  # checked
    registry = Registry.open(config.registry_url, actor=f"lorchestra-serve@{socket.gethostname()}")
    snapshot = Snapshot.read(registry.catalog)
    directory = base_directory(config.base, reporter)
    base = fingerprint(directory, source_name(directory), reporter)
    cache = Path(config.registry_cache) if config.registry_cache else home() / "versions"
    grace = parse_duration(config.registry_grace).total_seconds()
    made = Versions(registry, base, cache, grace)
    made.view = View(snapshot)
    return made


def followed(router: Router, engine: Engine, metrics: Metrics, *, prompts: bool) -> Followed | None:
    """What keeps the router's versions as the registry has them; ``None`` where there are none."""
    if router.versions is None:
        return None
    from lorchestra.serve.following import Follower
    from lorchestra.serve.metrics import RegistryMetrics
    from lorchestra.serve.outcomes import Outcomes

    told = RegistryMetrics(metrics)
    follower = Follower(router.versions, engine, told)
    follower.read()
    for name in router.hidden():
        log.warning("%s: the server's own name wins; the registry's adapter of that name is not served", name)
    return Followed(follower, Outcomes(follower, told, prompts=prompts))


def shown(found: Versions) -> str:
    """For the table at the start."""
    snapshot = found.view.snapshot
    aliases = sum(1 for _, alias, _ in snapshot.pointers() if alias)
    names = ", ".join(sorted(snapshot.names)[:12]) + (", …" if len(snapshot.names) > 12 else "")
    counts = f"{counted(len(snapshot.names), 'name')}, {counted(aliases, 'alias', 'aliases')}"
    return f"{found.registry.location.shown}: {counts}" + (f": {names}" if names else "")
