"""``lorchestra serve --engine vllm``: the engine in front of vLLM, or the command that starts a vLLM elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorchestra.events import Reporter
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.engine import Engine, Observer
    from lorchestra.serve.vllm_process import Launch


def _launch(config: ServeConfig, directory: Path) -> Launch:
    from lorchestra.serve.vllm_process import Launch

    return Launch.read(
        directory,
        config.vllm_arguments,
        python=config.vllm_python or sys.executable,
        max_length=config.max_length,
        dtype=config.dtype,
    )


def command(config: ServeConfig, reporter: Reporter) -> str:
    """What to type where vLLM is to run, for ``--vllm-url``."""
    from lorchestra.cli.models import base_directory
    from lorchestra.serve.vllm_process import printed

    assert config.base is not None  # checked
    return printed(_launch(config, base_directory(config.base, reporter).resolve()))


def engine(config: ServeConfig, directory: Path, observer: Observer, reporter: Reporter) -> Engine:
    """Not yet started."""
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.load import source_name
    from lorchestra.serve.fair import FairQueue
    from lorchestra.serve.vllm import VllmEngine

    made = VllmEngine(
        _launch(config, directory),
        fingerprint(directory, source_name(directory), reporter),
        urls=config.vllm_urls,
        api_key=os.environ.get("VLLM_API_KEY"),  # vLLM's own name for it
        root=Path(config.vllm_adapters) if config.vllm_adapters else None,
        concurrency=config.max_batch or 256,
        observer=observer,
    )
    made.turns.queue = FairQueue(config.queue_per_tenant, config.queue)
    return made
