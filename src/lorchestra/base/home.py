"""Where lorchestra keeps what it has fetched and made."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def home() -> Path:
    """``LORCHESTRA_HOME``, or ``lorchestra`` under the platform's cache directory. Not created here."""
    chosen = os.environ.get("LORCHESTRA_HOME")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("lorchestra", appauthor=False))


def write_whole(path: Path, text: str, synced: bool = False) -> None:
    """Write a small file so that ``path`` holds all of it or what it held before, whoever else writes it.

    Args:
        path: its directory is made.
        text: written as UTF-8, line ends as they are.
        synced: flush it to the disk before it gets its name.

    Raises:
        OSError: the directory cannot be written, or the disk is full. Nothing is left of the try.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            if synced:
                stream.flush()
                os.fsync(stream.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
