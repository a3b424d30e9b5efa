"""What the lower rooms say of a recipe's keys, told with the flags that the user typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lorchestra.errors import LorchestraError

_HINT = re.compile(r"fields: \{(.+?)\}(?=[.;,]?(?:\s|$))")


@contextmanager
def in_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """What goes wrong inside is told with flags.

    Args:
        flags: key of the recipe (``lora.rank``, ``stages.0.data``) → flag without dashes. A key stands for all that
            is under it.
    """
    try:
        yield
    except LorchestraError as error:
        error.args = (translated(str(error), flags),)
        raise


def translated(message: str, flags: Mapping[str, str]) -> str:
    """``recipe: lora.rank: …`` is ``--lora_rank: …``; ``fields: {prompt: ask}`` is ``--field prompt=ask``."""
    for key, flag in flags.items():
        message = re.sub(rf"^recipe: {re.escape(key)}(?:\.\S+)?: ", f"--{flag}: ", message, flags=re.MULTILINE)
    for name, flag in _spellings(flags).items():  # not quoted, no flag already, no part of something longer
        message = re.sub(rf"(?<![\w./'-]){re.escape(name)}(?![\w/'])", f"--{flag}", message)
    message = _HINT.sub(lambda found: _mapped(found[1]), message)
    message = re.sub(r"(?<!\S)fields\.(\w+): ", r"--field \1: ", message)
    message = re.sub(r"(?:^--\w+: )?(?<!\S)fields: ", "--field: ", message, flags=re.MULTILINE)
    return message.replace("and fields; keep one of them (fields say", "and --field; keep one of them (--field says")


def _spellings(flags: Mapping[str, str]) -> dict[str, str]:
    """A key as it may stand in a sentence (``train.batch_size``, ``batch_size``) → flag; plain words are too common."""
    names = {name: flag for key, flag in flags.items() for name in (key, key.rpartition(".")[2])}
    return {name: flag for name, flag in names.items() if "_" in name or "." in name}


def _mapped(text: str) -> str:
    """``prompt: <column>, completion: …`` as ``--field prompt=<column> --field completion=…``, quoted for a shell."""
    pairs = (pair.partition(": ") for pair in text.split(", "))
    return " ".join(f"--field {shlex.quote(f'{part}={column}')}" for part, _, column in pairs)
