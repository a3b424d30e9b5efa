"""``lorchestra serve``: the engine that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorchestra.cli import serve_vllm
from lorchestra.errors import UserError

if TYPE_CHECKING:
    from lorchestra.events import Reporter
    from lorchestra.serve.config import ServeConfig
    from lorchestra.serve.engine import Engine, Observer


def engine(config: ServeConfig, observer: Observer, reporter: Reporter) -> tuple[Engine, int | None]:
    """The engine that was asked for, not yet started, and the length of its sequences."""
    from lorchestra.cli.models import base_directory
    from lorchestra.serve.vllm_process import default_engine

    assert config.base is not None  # checked
    directory = base_directory(config.base, reporter)
    if (default_engine() if config.engine == "auto" else config.engine) == "vllm":
        if config.gates or config.auto:
            raise UserError(
                "gates and auto choose by the base's own states, which vLLM does not give; serve them with --engine "
                "embedded, or leave --gate and --auto out"
            )
        return serve_vllm.engine(config, directory, observer, reporter), config.max_length
    return _embedded(config, directory, observer, reporter)


def _embedded(
    config: ServeConfig, directory: Path, observer: Observer, reporter: Reporter
) -> tuple[Engine, int | None]:
    from lorchestra.serve.config import size_of
    from lorchestra.serve.embedded.answers import TextEngine
    from lorchestra.serve.embedded.core import MOST, Limits, Setup
    from lorchestra.serve.embedded.engine import ContinuousEngine, Room

    if config.engine_process:
        from lorchestra.serve.embedded.process import loaded
    else:
        from lorchestra.serve.embedded.local import loaded
    limits = Limits(
        max_batch=config.max_batch or MOST,
        max_length=config.max_length,
        adapter_memory=size_of(config.memory) if config.memory else None,
        cache_memory=size_of(config.cache) if config.cache else None,
        kernel=config.kernel,
    )
    setup = Setup(directory, config.base or "", config.device, config.dtype, limits)
    core, tokenizer = loaded(setup, reporter)
    tokens = ContinuousEngine(core, Room(config.queue_per_tenant, config.queue), observer)
    return TextEngine(tokens, tokenizer, core.end_ids, core.rows), core.max_length
