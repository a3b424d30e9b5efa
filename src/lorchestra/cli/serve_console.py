"""``lorchestra serve --console``: the page at ``/console``, put on the server's app."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from lorchestra.cli.serve_registry import Followed
    from lorchestra.registry.access import KeysFile
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.gateway import TenantGateway
    from lorchestra.serve.request_log import RequestLog

App = TypeVar("App")  # FastAPI's: what an app is made of is the server's business


def counted(config: ServeConfig, log: RequestLog, base: str) -> RequestLog:
    """The request log; with a console it counts what each tenant uses, too."""
    if not config.has_console:
        return log
    from lorchestra.console.usage import Usage

    return Usage(log, base)


def mounted(
    app: App, gateway: TenantGateway, keys: KeysFile | None, log: RequestLog, base: str, followed: Followed | None
) -> App:
    """The app, with the console where the log counts."""
    from lorchestra.console.app import Console, mount
    from lorchestra.console.usage import Usage

    if isinstance(log, Usage):
        mount(cast(Any, app), Console(gateway, keys, log, base, followed.follower if followed else None))
    return app
