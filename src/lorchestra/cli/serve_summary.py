"""What ``lorchestra serve`` tells once it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorchestra.cli import serve_registry
from lorchestra.errors import counted

if TYPE_CHECKING:
    from lorchestra.registry.access import KeysFile
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.routing import Router


def summary(config: ServeConfig, router: Router, keys: KeysFile | None, port: int) -> None:
    """What runs, told once on standard error: standard output is for the request log."""
    from rich.console import Console
    from rich.table import Table

    out = Console(stderr=True, highlight=False, markup=False)
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    known = [key.name for key in keys.current().keys] if keys else []
    names = [adapter.name for adapter in router.adapters]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("base", f"{router.base} ({config.base})")
    table.add_row("adapters", f"{counted(len(names), 'adapter')}: {shown}" if names else "none")
    if strangers := _of_another_base(config, router):
        table.add_row("refused", f"{', '.join(strangers)}: trained on another base than this one")
    if router.versions:
        table.add_row("registry", serve_registry.shown(router.versions))
    if config.aliases:
        table.add_row("aliases", ", ".join(f"{alias} → {meaning}" for alias, meaning in config.aliases.items()))
    if config.gates or config.auto:
        table.add_row("gates", ", ".join([*config.gates, *(["auto"] if config.auto else [])]))
    table.add_row(
        "keys", f"{counted(len(known), 'key')} in {config.keys}" if keys else "none: everybody may do everything"
    )
    if config.enable_load:
        table.add_row("loading", f"by operators, from {', '.join(config.lora_roots)}")
    if config.cors_origins:
        table.add_row("CORS", ", ".join(config.cors_origins))
    if config.log_prompts:
        table.add_row("log", "with prompts and answers")
    if config.has_console:
        table.add_row("console", f"{scheme}://{host}:{port}/console/")
    out.print(table)
    out.print(f"ready at {scheme}://{host}:{port}/v1")


def _of_another_base(config: ServeConfig, router: Router) -> list[str]:
    """Adapters that say so; the first request for one would find it out."""
    told = [adapter for adapter in router.adapters if adapter.base]
    if not told or config.base is None:
        return []
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.cli.models import base_directory
    from lorchestra.events import SILENT

    ours = fingerprint(base_directory(config.base, SILENT), reporter=SILENT).weights
    return [adapter.name for adapter in told if adapter.base != ours]
