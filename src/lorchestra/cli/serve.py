"""``lorchestra serve``: one base in memory, an OpenAI API in front, an adapter for each request that names one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_group

from lorchestra.cli import serve_console, serve_engine, serve_gates, serve_keys, serve_registry, serve_vllm
from lorchestra.cli.completion import adapters as adapter_directories
from lorchestra.cli.completion import among, models
from lorchestra.cli.options import PLAIN_DTYPES, Device
from lorchestra.cli.verbs import Verb
from lorchestra.errors import Interrupted, LorchestraError, UserError, counted

if TYPE_CHECKING:
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.engine import Engine

TENANTS, NETWORK, ENGINE, LOGS = "Tenants", "Network", "Engine", "Logs"


class ServeVerb(Verb):
    """``serve BASE …``, but ``serve keys …`` manages keys (a base in a directory ``keys`` is ``./keys``)."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args[:1] == ["keys"]:
            return get_group(serve_keys.app).make_context(f"{info_name} keys", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def _named(incomplete: str) -> list[str]:
    """``NAME=DIR``, the directory completed."""
    name, sign, path = incomplete.partition("=")
    return [f"{name}={found}" for found in adapter_directories(path)] if sign else []


def serve(
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE",
            help="Model directory, org/name, hf:…, pip:… or GGUF file.",
            autocompletion=models,
            show_default="of --config",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME=DIR", help="An adapter. Repeat.", autocompletion=_named),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", metavar="DIR", help="All PEFT directories in it, by their names. Repeat."),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", metavar="NAME=MODEL", help="Another name of an adapter, mixture or the base. Repeat."),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="NAME=DIR", help="A gate, which chooses adapters for each prompt. Repeat."),
    ] = None,
    auto: Annotated[
        bool | None,
        typer.Option("--auto/--no-auto", help="A model 'auto': whichever adapter a prompt is for.", show_default="no"),
    ] = None,
    registry: serve_registry.Url = None,
    registry_cache: serve_registry.Cache = None,
    registry_cache_size: serve_registry.CacheSize = None,
    registry_grace: serve_registry.Grace = None,
    console: Annotated[
        bool | None,
        typer.Option(
            "--console/--no-console",
            help="A page at /console.",
            show_default="with keys, or on this machine",
            rich_help_panel=serve_registry.PANEL,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What requests call the base.", show_default="of its source")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings in YAML; flags win over it.")
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option("--keys", metavar="FILE", help="API keys: see `lorchestra serve keys`.", rich_help_panel=TENANTS),
    ] = None,
    insecure_no_keys: Annotated[
        bool | None,
        typer.Option("--insecure-no-keys", help="Listen beyond this machine without keys.", rich_help_panel=TENANTS),
    ] = None,
    enable_load: Annotated[
        bool | None,
        typer.Option(
            "--enable-load", help="Operators load and unload adapters while it runs.", rich_help_panel=TENANTS
        ),
    ] = None,
    lora_root: Annotated[
        list[str] | None,
        typer.Option(
            "--lora-root", metavar="DIR", help="They may be loaded from below here. Repeat.", rich_help_panel=TENANTS
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(show_default="127.0.0.1", rich_help_panel=NETWORK)] = None,
    port: Annotated[int | None, typer.Option(show_default="8000", rich_help_panel=NETWORK)] = None,
    ssl_certfile: Annotated[
        str | None, typer.Option("--ssl-certfile", metavar="PEM", help="TLS: certificate.", rich_help_panel=NETWORK)
    ] = None,
    ssl_keyfile: Annotated[
        str | None, typer.Option("--ssl-keyfile", metavar="PEM", help="TLS: its key.", rich_help_panel=NETWORK)
    ] = None,
    max_body: Annotated[
        str | None,
        typer.Option(
            "--max-body",
            metavar="8MB",
            help="At most so much in a request.",
            show_default="8MB",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    body_seconds: Annotated[
        float | None,
        typer.Option(
            "--body-seconds", help="In which a request has to be here.", show_default="60", rich_help_panel=NETWORK
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", metavar="URL", help="Pages from here may call. Repeat.", rich_help_panel=NETWORK),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for what runs, at SIGTERM.", show_default="30", rich_help_panel=NETWORK),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="embedded: our own; vllm: by vLLM.",
            show_default="vllm where it and CUDA are there",
            autocompletion=among("auto", "embedded", "vllm"),
            rich_help_panel=ENGINE,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch", help="Sequences at a time.", show_default="the engine's", rich_help_panel=ENGINE),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Positions of one.", show_default="the base's", rich_help_panel=ENGINE),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="4GB", help="For adapters.", show_default="the engine's", rich_help_panel=ENGINE
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache", metavar="4GB", help="For keys and values.", show_default="the engine's", rich_help_panel=ENGINE
        ),
    ] = None,
    kernel: Annotated[
        bool | None,
        typer.Option("--kernel", help="Compile a kernel for this CPU: adapters cost less.", rich_help_panel=ENGINE),
    ] = None,
    vllm_url: Annotated[
        list[str] | None,
        typer.Option("--vllm-url", metavar="URL", help="A vLLM that runs already. Repeat.", rich_help_panel=ENGINE),
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option(
            "--vllm-python",
            metavar="FILE",
            help="Python of vLLM's environment.",
            show_default="this one",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    print_command: Annotated[
        bool,
        typer.Option("--print-command", help="Only print how vLLM is started elsewhere.", rich_help_panel=ENGINE),
    ] = False,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PLAIN_DTYPES)}.",
            show_default="auto",
            autocompletion=among(*PLAIN_DTYPES),
            rich_help_panel=ENGINE,
        ),
    ] = None,
    request_log: Annotated[
        str | None,
        typer.Option(
            "--request-log",
            metavar="FILE",
            help="A line of JSON a request. '-': standard output. '': none.",
            show_default="-",
            rich_help_panel=LOGS,
        ),
    ] = None,
    log_prompts: Annotated[
        bool | None, typer.Option("--log-prompts", help="With prompts and answers.", rich_help_panel=LOGS)
    ] = None,
) -> None:
    """Serve a base and its adapters by OpenAI's API: each request names an adapter, none waits for another's.

    `model` is the base, an adapter, an alias, a mixture (`general=0.3+clinic=0.5`), a gate, or `auto`.

    **Examples**

    `lorchestra serve my-base --adapter clinic=runs/clinic/final/adapter`

    `lorchestra serve my-base --adapters departments/ --host 0.0.0.0 --keys keys.yaml`

    `lorchestra serve my-base --registry /srv/adapters --auto`

    `lorchestra serve my-base --adapters departments/ --gate triage=gates/triage`

    `lorchestra serve keys add acme --adapters clinic,audit --rpm 60 --concurrency 4`
    """
    from lorchestra.cli.progress import make_reporter
    from lorchestra.serve.config import ServeConfig

    flags = {
        "base": base, "adapters": _pairs(adapter, "--adapter NAME=DIR"), "adapters_dirs": adapters or [],
        "aliases": _pairs(alias, "--alias NAME=MODEL"), "name": name, "keys": keys,
        "gates": _pairs(gate, "--gate NAME=DIR"), "auto": auto,
        "registry": registry, "registry_cache": registry_cache, "registry_cache_size": registry_cache_size,
        "registry_grace": registry_grace,
        "insecure_no_keys": insecure_no_keys, "enable_load": enable_load, "lora_roots": lora_root or [],
        "host": host, "port": port, "console": console,
        "ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile, "cors_origins": cors_origin or [], "grace": grace,
        "max_body": max_body, "body_seconds": body_seconds,
        "engine": engine, "vllm_urls": vllm_url or [],
        "vllm_python": vllm_python, "max_batch": max_batch, "max_length": max_length, "memory": memory,
        "cache": cache, "kernel": kernel,
        "device": None if device == "auto" else device, "dtype": dtype, "request_log": request_log,
        "log_prompts": log_prompts,
    }  # fmt: skip
    settings = (ServeConfig.load(config) if config else ServeConfig()).with_flags(flags)
    if print_command:
        if settings.base is None or settings.engine == "embedded":
            raise UserError("--print-command is for vLLM; write lorchestra serve BASE --engine vllm --print-command")
        typer.echo(serve_vllm.command(settings, make_reporter()))
        return
    settings.check()
    _run(settings)


def _pairs(texts: Sequence[str] | None, form: str) -> dict[str, str]:
    """``NAME=VALUE``, the name before the first ``=``."""
    out: dict[str, str] = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not sign or not name or not value:
            raise UserError(f"{text!r}: write {form}")
        if name in out:
            raise UserError(f"{name!r} is given twice ({out[name]} and {value}); give each a name of its own")
        out[name] = value
    return out


def _run(config: ServeConfig) -> None:
    """Everything that can be wrong is looked at before anything slow is begun."""
    import asyncio
    import logging

    from lorchestra.cli.progress import make_reporter
    from lorchestra.cli.serve_summary import summary
    from lorchestra.registry.access import KeysFile
    from lorchestra.serve.adapter_files import found_in, served
    from lorchestra.serve.app import HttpSettings, create_app
    from lorchestra.serve.config import base_name, size_of
    from lorchestra.serve.gateway import TenantGateway
    from lorchestra.serve.lifecycle import check_tls, listen
    from lorchestra.serve.lifecycle import serve as live
    from lorchestra.serve.metrics import Metrics
    from lorchestra.serve.request_log import RequestLog
    from lorchestra.serve.routing import Router

    assert config.base is not None  # checked
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    certificate = Path(config.ssl_certfile) if config.ssl_certfile else None
    key = Path(config.ssl_keyfile) if config.ssl_keyfile else None
    if certificate:
        check_tls(certificate, key)
    keys = KeysFile(Path(config.keys)) if config.keys else None
    places = {name: Path(path) for name, path in config.adapters.items()}
    for directory in config.adapters_dirs:
        for name, path in found_in(Path(directory)).items():
            if name in places:
                raise UserError(f"two adapters are called {name!r} ({places[name]} and {path}); rename one of them")
            places[name] = path
    reporter = make_reporter()
    gates = serve_gates.gates(config, reporter)
    versions = serve_registry.versions(config, reporter)
    serve_gates.add_members(config, gates, places, versions)
    roots = [Path(root) for root in config.lora_roots]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--lora-root {root} is no directory")
    log = RequestLog.to(config.request_log, config.log_prompts)
    adapters = [served(name, path) for name, path in places.items()]
    called = config.name or base_name(config.base)
    log = serve_console.counted(config, log, called)
    router = Router(
        called, adapters, config.aliases, most_members=config.max_mixture, roots=roots, versions=versions, gates=gates
    )
    listener = listen(config.host, config.port)

    running: list[Engine] = []
    metrics = Metrics(called, config.metrics_adapters, lambda: running[0].resident() if running else ())
    engine, router.max_length = serve_engine.engine(config, metrics, reporter)
    running.append(engine)
    followed = serve_registry.followed(router, engine, metrics, prompts=config.log_prompts)
    choosing = serve_gates.choosing(config, router, engine, gates)

    async def main() -> Any:
        follower, outcomes = (followed.follower, followed.outcomes) if followed else (None, None)
        gateway = TenantGateway(
            engine, router, keys, metrics, log, may_load=config.enable_load, choosing=choosing, follower=follower,
            outcomes=outcomes,
        )  # fmt: skip
        settings = HttpSettings(
            config.enable_load,
            tuple(config.cors_origins),
            size_of(config.max_body),
            config.body_seconds,
            registry=followed is not None,
        )
        try:
            return await live(
                serve_console.mounted(create_app(gateway, settings), gateway, keys, log, called, followed),
                engine,
                gateway,
                listener,
                grace=config.grace,
                certificate=certificate,
                key=key,
                up=up,
            )
        finally:
            if followed:
                await followed.stop()

    def up() -> None:
        if followed:
            followed.start()
        # What is there stays there. Python's collector would look through all of it now and then, and every answer
        # would wait meanwhile: 180 ms for 417,000 objects.
        gc.collect()
        gc.freeze()
        summary(config, router, keys, listener.getsockname()[1])

    outcome = asyncio.run(main())
    if outcome.cut:
        raise LorchestraError(f"stopped before {counted(outcome.cut, 'request')} had an answer")
    if outcome.signal is not None and outcome.signal.name == "SIGINT":
        raise Interrupted("stopped; what ran was answered")
