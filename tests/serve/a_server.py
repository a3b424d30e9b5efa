"""A server on the tiny model, for tests of its life: ``python -m tests.serve.a_server DIRECTORY GRACE [PEM KEY]``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.tenants import PlainEngine

from lorchestra.serve.adapter_files import served
from lorchestra.serve.app import HttpSettings, create_app
from lorchestra.serve.gateway import TenantGateway
from lorchestra.serve.lifecycle import listen, serve
from lorchestra.serve.metrics import Metrics
from lorchestra.serve.request_log import RequestLog
from lorchestra.serve.routing import Router


class SlowEngine(PlainEngine):
    """A token takes a while."""

    async def stream(self, call):
        async for chunk in super().stream(call):
            yield chunk
            await asyncio.sleep(0.1)


async def main() -> int:
    place, grace, *tls = sys.argv[1:]
    certificate, key = (Path(path) for path in tls) if tls else (None, None)
    engine = SlowEngine(make_tiny_model(), make_tiny_tokenizer())
    router = Router("base", [served("clinic", Path(place))])
    gateway = TenantGateway(engine, router, None, Metrics("base"), RequestLog.to("-"))
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    outcome = await serve(
        create_app(gateway, HttpSettings()),
        engine,
        gateway,
        listener,
        grace=float(grace),
        certificate=certificate,
        key=key,
        up=lambda: print(f"port {port}", file=sys.stderr, flush=True),
    )
    print(f"ended {outcome.signal.name if outcome.signal else None} cut {outcome.cut}", file=sys.stderr, flush=True)
    return 0


sys.exit(asyncio.run(main()))
