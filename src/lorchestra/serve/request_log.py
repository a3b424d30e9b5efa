"""One line of JSON a request: who asked whom, for how much, what became of it. Prompts only where asked for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from lorchestra.serve.engine import Target

_log = logging.getLogger(__name__)


class RequestLog:
    """Writes lines, each of them whole.

    Args:
        out: where to; ``None`` for nowhere.
        prompts: log prompts and answers too. They may hold anything that a tenant's users typed.
    """

    def __init__(self, out: TextIO | None, prompts: bool = False) -> None:
        self.out, self.prompts = out, prompts

    @classmethod
    def to(cls, place: str, prompts: bool = False) -> RequestLog:
        """``-`` is standard output, empty is nowhere, anything else a file that lines are added to.

        Raises:
            OSError: the file cannot be written.
        """
        if place in ("", "-"):
            return cls(sys.stdout if place else None, prompts)
        path = Path(place).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path.open("a", encoding="utf-8", buffering=1), prompts)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; a place that takes no more is told of once, and then left alone."""
        if self.out is None:
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self.out.write(json.dumps({"time": time, **line}, ensure_ascii=True, default=str) + "\n")
            self.out.flush()
        except OSError as error:
            self.out = None
            _log.error("the request log cannot be written any more: %s", error)


def members_of(target: Target) -> Sequence[Mapping[str, Any]]:
    """The adapters of a request as a log line has them; of a registry with the version, and with the coefficients of
    groups of layers where these differ.
    """
    return [
        {"adapter": adapter.name, "key": adapter.key, "digest": adapter.digest, "coefficient": coefficient}
        | ({"version": adapter.reference} if adapter.reference else {})
        | ({"layers": {group: found[i] for group, found in target.layers.items()}} if target.layers else {})
        for i, (adapter, coefficient) in enumerate(target.members)
    ]
