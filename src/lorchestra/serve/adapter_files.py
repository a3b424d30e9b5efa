"""A PEFT directory as something that is served: digest, parents, chat template, system prompt, sampling defaults.

Beside ``adapter_config.json`` and ``adapter_model.safetensors`` an adapter may bring

- ``chat_template.jinja``, as Hugging Face tools write it;
- ``serve.yaml``: ``system_prompt``, a text, and ``sampling``, a mapping by OpenAI's field names (``temperature``,
  ``max_tokens`` …). It is a file of its own because ``lorchestra.json`` is written anew with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorchestra.errors import AdapterError, UserError
from lorchestra.registry.reference import check_name
from lorchestra.serve.engine import Served
from lorchestra.serve.wire import check_defaults

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "lorchestra.json"
TEMPLATE, SERVING = "chat_template.jinja", "serve.yaml"
LARGEST = 1 << 20  # bytes of a template or serve.yaml


def served(name: str, directory: Path) -> Served:
    """What the server knows of an adapter, without its weights where ``lorchestra.json`` has their digest.

    The engine checks that digest when it loads them. Another tool's directory has none: its weights are read once.

    Raises:
        UserError: the name is none.
        AdapterError: the directory holds no adapter, or what lies beside it is wrong.
    """
    check_name(name)
    directory = directory.resolve()
    inside = next((path.parent for path in sorted(directory.glob(f"*/{CONFIG}"))), None)
    if inside and not (directory / CONFIG).is_file():
        raise AdapterError(
            f"adapter {name}: {directory} has no {CONFIG}, so it is not a PEFT adapter; did you mean {inside}?"
        )
    from lorchestra.adapter.peft_format import look

    try:
        look(directory)
    except AdapterError as error:
        raise AdapterError(f"adapter {name}: {error}") from error
    sidecar = _sidecar(directory, name)
    digest = str(sidecar.get("digest", ""))
    if not digest:
        from lorchestra.adapter.adapter import Adapter

        try:
            digest = Adapter.load(directory).digest
        except AdapterError as error:
            raise AdapterError(f"adapter {name}: {error}") from error
    system_prompt, defaults = _serving(directory, name)
    template = _text(directory / TEMPLATE, name)
    base = sidecar.get("base")
    weights = str(base.get("weights") or "") if isinstance(base, dict) else ""
    return Served(name, digest, directory, _parents(sidecar, name), template, system_prompt, defaults, base=weights)


def found_in(directory: Path) -> dict[str, Path]:
    """Name → PEFT directory, of those directly in ``directory``.

    Raises:
        UserError: it is no directory, holds none, or one's name is no name for an adapter.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; --adapters takes one that holds PEFT directories")
    if (directory / CONFIG).is_file():
        raise UserError(f"{directory} is an adapter itself; write --adapter NAME={directory}")
    found = {path.name: path for path in sorted(directory.iterdir()) if (path / CONFIG).is_file()}
    if not found:
        raise UserError(f"{directory} holds no PEFT directory (one with {CONFIG})")
    for name in found:
        try:
            check_name(name)
        except UserError as error:
            raise UserError(f"{error}; rename {found[name]}, or name it by --adapter NAME={found[name]}") from None
    return found


def _sidecar(directory: Path, name: str) -> Mapping[str, Any]:
    text = _text(directory / SIDECAR, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter {name}: {SIDECAR} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"adapter {name}: {SIDECAR} is damaged: it holds {type(value).__name__}")
    return value


def _parents(sidecar: Mapping[str, Any], name: str) -> dict[str, float]:
    try:
        parents = [
            (str(p["name"]), str(p["digest"]), float(p["coefficient"])) for p in sidecar.get("lineage", {})["parents"]
        ]
    except KeyError:
        return {}
    except (TypeError, ValueError) as error:
        raise AdapterError(f"adapter {name}: {SIDECAR} is damaged: {error}") from error
    names = [parent for parent, _, _ in parents]
    return {
        parent if names.count(parent) == 1 else f"{parent}@{digest[:19]}": coefficient
        for parent, digest, coefficient in parents
    }


def _serving(directory: Path, name: str) -> tuple[str | None, Mapping[str, Any]]:
    text = _text(directory / SERVING, name)
    if text is None:
        return None, {}
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    place = f"adapter {name}: {SERVING}"
    try:
        value = YAML(typ="safe", pure=True).load(text) or {}
    except (YAMLError, RecursionError) as error:
        raise AdapterError(f"{place} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict) or not value.keys() <= {"system_prompt", "sampling"}:
        got = f"{type(value).__name__}" if not isinstance(value, dict) else ", ".join(map(str, value))
        raise AdapterError(f"{place} is a mapping with system_prompt and sampling, and nothing else; got {got}")
    prompt, sampling = value.get("system_prompt"), value.get("sampling") or {}
    if not (prompt is None or isinstance(prompt, str)):
        raise AdapterError(f"{place}: system_prompt is a text, not {prompt!r}")
    if not isinstance(sampling, dict) or not all(isinstance(key, str) for key in sampling):
        raise AdapterError(f"{place}: sampling is a mapping, as in temperature: 0.2")
    check_defaults(sampling, name)
    return prompt, sampling


def _text(path: Path, name: str) -> str | None:
    """The file's text; ``None`` where there is no file."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST:
            raise AdapterError(
                f"adapter {name}: {path.name} has {path.stat().st_size:,} bytes; at most {LARGEST:,} may be"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"adapter {name}: {path.name} cannot be read: {error}") from error
