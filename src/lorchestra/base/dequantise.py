"""A quantised base as ordinary weights: asked for outright, made once, kept.

Dequantising restores no information: the weights are those that the quantised model computes with, in a format that
something can be added to (float32, so that the merge rounds once).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorchestra.base.fingerprint import fingerprint
from lorchestra.base.home import home
from lorchestra.base.lock import locked
from lorchestra.base.safetensors_file import entries, weight_files
from lorchestra.errors import SourceError
from lorchestra.events import SILENT, Reporter

# Format of what is kept; raise it when the conversion changes.
VERSION = 1
_PLAIN = {"F64", "F32", "F16", "BF16"}


def quantisation(directory: Path) -> str:
    """The quantisation method that ``config.json`` names (``fp8``, ``bitsandbytes``, …); empty for a plain model."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{directory / 'config.json'} cannot be read: {error}") from error
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    return str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) and settings else ""


def dequantised(directory: Path, reporter: Reporter = SILENT) -> Path:
    """A plain copy of a quantised model directory, by transformers' own means; kept beside converted GGUF files.

    The whole model passes through memory. A directory that is not quantised is returned as it is.

    Raises:
        SourceError: a method that cannot be turned back here, or whose library is missing, or a damaged model.
    """
    method = quantisation(directory)
    if not method:
        return directory
    if method not in METHODS:
        raise SourceError(
            f"{directory} is quantised by {method}, which cannot be turned back into weights here (there are "
            f"{', '.join(METHODS)}, and GGUF files). Use the unquantised model that it was made from"
        )
    weights = fingerprint(directory).weights.removeprefix("sha256:")
    final = home() / "bases" / f"{directory.name}-{weights[:16]}-{method}-v{VERSION}"
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final.with_name(final.name + ".lock"), f"the dequantised {directory.name}", reporter.say):
        if not final.exists():
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            with reporter.task(f"dequantise {directory.name}", None, "model") as task:
                _convert(directory, method, partial)
                task.advance()
            partial.rename(final)
    return final


def _convert(directory: Path, method: str, out: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    _whole(directory)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    try:
        model = METHODS[method](directory, settings)
        model.save_pretrained(out, save_original_format=False)  # the original format is the quantised one
        AutoTokenizer.from_pretrained(directory, trust_remote_code=False).save_pretrained(out)
    except ImportError as error:
        raise SourceError(f"{directory} is quantised by {method}, whose library is not installed: {error}") from error
    except Exception as error:  # a foreign directory: transformers and the method's library raise anything
        raise SourceError(
            f"{directory} ({method}) cannot be dequantised: {error!r}. Use the unquantised model"
        ) from error
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    left = [f"{e.name} ({e.dtype})" for file in weight_files(out) for e in entries(file) if e.dtype not in _PLAIN]
    if left:
        raise SourceError(f"{directory} ({method}): transformers left {left[0]} as it was; use the unquantised model")
    note = {"schema": 1, "made_by": f"dequantise {method}", "name": directory.name}
    (out / "lorchestra.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _whole(directory: Path) -> None:
    """Whether every float8 weight has its scales: without them transformers fills in numbers of its own, unasked."""
    found = [entry for file in weight_files(directory) for entry in entries(file)]
    names = {entry.name for entry in found}
    for entry in found:
        if entry.dtype.startswith("F8_") and not {f"{entry.name}_scale_inv", f"{entry.name}_scale"} & names:
            raise SourceError(f"{directory} is damaged: {entry.name} is stored in {entry.dtype} without its scales")


def _at_load(directory: Path, settings: Mapping[str, Any]) -> Any:
    """Methods whose configuration knows ``dequantize``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    config.quantization_config = {**settings, "dequantize": True}
    return AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        device_map={"": "cpu"},
        use_safetensors=True,
        trust_remote_code=False,
    )


def _afterwards(directory: Path, settings: Mapping[str, Any]) -> Any:
    """Methods whose loaded model knows ``dequantize``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map={"": "cpu"}, use_safetensors=True, trust_remote_code=False
    )
    return model.dequantize(dtype=torch.float32)


METHODS: Mapping[str, Callable[[Path, Mapping[str, Any]], Any]] = {
    "fp8": _at_load,
    "compressed-tensors": _at_load,
    "bitsandbytes": _afterwards,
}
