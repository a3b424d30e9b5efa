"""``lorchestra doctor``: what this machine and installation can do."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from typing import Any

import typer

from lorchestra.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Show versions, device, number format, memory, cache directory and how sources are reached.

    **Example**

    `lorchestra doctor`
    """
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        typer.echo(f"{key:<14} {value}")


def _facts() -> dict[str, Any]:
    from importlib.metadata import version
    from importlib.util import find_spec

    import torch

    from lorchestra.base.load import choose_device, choose_dtype
    from lorchestra.base.locate import home

    device = choose_device("auto")
    directory = home()
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("lorchestra", "torch", "transformers", "peft", "accelerate")},
        "device": str(device),
        "dtype": str(choose_dtype(device, "auto")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cache": str(directory),
        "cache free": f"{shutil.disk_usage(existing).free / 1e9:.1f} GB",
        "hub": _shown(os.environ.get("HF_ENDPOINT", "https://huggingface.co (set HF_ENDPOINT for a mirror)")),
        "package index": _shown(os.environ.get("PIP_INDEX_URL", "as pip is set up")),
        "trackers": ", ".join(name for name in ("tensorboard", "wandb", "mlflow") if find_spec(name)) or "none",
    }
    if device.type == "cuda":
        facts["device"] = f"{device} ({torch.cuda.get_device_name(device)})"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    return facts


def _shown(address: str) -> str:
    """Without the password that it may hold."""
    return re.sub(r"//[^/@\s]+@", "//…@", address)
