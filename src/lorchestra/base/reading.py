"""Reading somebody else's files: what the disk or the file itself refuses becomes one sentence with advice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorchestra.errors import SourceError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, ``path`` (a file, or a directory with what is in it) is looked at or read.

    Raises:
        SourceError: it is not there, is a directory where a file was expected, may not be read, or is damaged.
    """
    try:
        yield
    except FileNotFoundError as error:
        gone = Path(error.filename or path)
        raise SourceError(f"cannot read {gone}: {absent(gone)}; mend the path, or fetch or copy it again") from error
    except IsADirectoryError as error:
        raise SourceError(f"cannot read {error.filename or path}: it is a directory, a file was expected") from error
    except OSError as error:
        raise SourceError(
            f"cannot read {error.filename or path}: {error.strerror or error}. Check its permissions; if they are "
            "right, the disk may be failing, and a copy from elsewhere is needed"
        ) from error
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8; of JSON that is nested without end
        raise SourceError(f"{path} is damaged: {error}; fetch or copy it again") from error


def absent(path: Path) -> str:
    """Why nothing is at ``path``, in words."""
    return f"it is a link to {path.readlink()}, which is not there" if path.is_symlink() else "there is no such file"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        SourceError: as :func:`reading` says, or it holds something else.
    """
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise SourceError(f"{path} should hold a JSON object; it holds {type(value).__name__}. Fetch or copy it again")
    return value
