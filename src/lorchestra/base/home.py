"""Where lorchestra keeps what it has fetched and made."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``LORCHESTRA_HOME``, or ``lorchestra`` under the platform's cache directory. Not created here."""
    chosen = os.environ.get("LORCHESTRA_HOME")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("lorchestra", appauthor=False))
