"""Standard output: a terminal's width and colours there; elsewhere whole lines, nothing wrapped, nothing padded."""

from __future__ import annotations

import io
import re
import sys
from typing import IO, Any, cast

from rich.console import Console

UNWRAPPED = 100_000  # columns


def console(**settings: Any) -> Console:
    """A console for what a verb prints."""
    found = Console(highlight=False, **settings)
    if found.is_terminal:
        return found
    return Console(highlight=False, width=UNWRAPPED, color_system=None, file=cast(IO[str], _Unpadded()), **settings)


class _Unpadded(io.TextIOBase):
    """Passes text on to standard output without the blanks that fill up a table's last column."""

    def write(self, text: str) -> int:
        sys.stdout.write(re.sub(r"[ \t]+(?=\n)", "", text))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()
