"""Weights for a part of the modules, as the command line and its files write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorchestra.cli.options import number
from lorchestra.errors import UserError
from lorchestra.fusion.groups import Rule

FORM = "write 'PATTERN: NAME=WEIGHT …', as in 'layers.0-9: general=0.3 clinic=0'"


def rules_of(texts: list[str], file: Path | None) -> list[Rule]:
    """The rules of ``--weights_file``, then those of ``--weights_for``, in their order: later ones win.

    Raises:
        UserError: one that cannot be read; it says where.
    """
    return [*(_from_file(file) if file else ()), *(_from_text(text) for text in texts)]


def _from_text(text: str) -> Rule:
    pattern, colon, rest = text.partition(":")
    words = rest.replace(",", " ").split()
    if not (colon and pattern.strip() and words):
        raise UserError(f"--weights_for {text!r}: {FORM}")
    weights = {}
    for word in words:
        name, sign, value = word.rpartition("=")
        if not sign:
            raise UserError(f"--weights_for {text!r}: {word!r} has no weight; {FORM}")
        weights[name] = number(value, f"--weights_for {text!r}")
    return Rule(pattern.strip(), weights)


def _from_file(file: Path) -> list[Rule]:
    """YAML or JSON: ``{member: {pattern: weight}}``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, YAMLError) as error:
        raise UserError(f"--weights_file {file} cannot be read: {error}") from error
    form = "it should map each adapter to patterns and weights, as in 'general: {layers.0-9: 0.3, q_proj: 0.1}'"
    if not isinstance(values, dict):
        raise UserError(f"--weights_file {file} holds {type(values).__name__}; {form}")
    rules = []
    for name, patterns in values.items():
        if not isinstance(patterns, dict) or not patterns:
            raise UserError(f"--weights_file {file}: {name!r} has {patterns!r}; {form}")
        rules += [Rule(str(pattern), {str(name): _weight(value, file, pattern)}) for pattern, value in patterns.items()]
    return rules


def _weight(value: Any, file: Path, pattern: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"--weights_file {file}: {pattern!r} has {value!r}, which is not a number")
    return float(value)
