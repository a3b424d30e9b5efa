"""What a server keeps of its registry on this machine, so that it can start, and go on, while the registry is away.

    cache/registries/<registry and base>/snapshot.json   what the registry said last; its time: when that was last so
                                        /<id>.json       a version that may be served on this base, with its manifest

Nothing here is believed for longer than the grace, counted from when the registry was last seen, whoever starts or
stops meanwhile. The copies of the versions' files lie in the cache and are verified as ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.base.home import write_whole
from lorchestra.errors import LorchestraError
from lorchestra.registry.bases import BaseCheck
from lorchestra.registry.manifest import Manifest
from lorchestra.registry.snapshot import Line, Snapshot
from lorchestra.registry.sql.catalog import Version

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId

FORMAT = 1


class Kept:
    """What is kept of one registry for one base.

    Args:
        cache: directory of the copies.
        registry: how messages call it; its URL without secrets.
        base: of this server.
    """

    def __init__(self, cache: Path, registry: str, base: BaseId) -> None:
        key = json.dumps([registry, base.weights, base.tokenizer, base.template])
        self.directory = cache / "registries" / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._snapshot = self.directory / "snapshot.json"

    def keep(self, snapshot: Snapshot) -> None:
        """This is what the registry says now.

        Raises:
            OSError: the cache cannot be written.
        """
        write_whole(self._snapshot, json.dumps({"format": FORMAT, "snapshot": snapshot.as_dict()}))

    def seen(self) -> None:
        """The registry was there just now, and said what is kept.

        Raises:
            OSError: nothing is kept, or the cache cannot be written.
        """
        os.utime(self._snapshot)

    def last(self) -> tuple[Snapshot, float] | None:
        """What the registry said last, and how many seconds ago that was last known to hold; ``None`` if nothing is
        kept that can be read. A clock that went back makes it no younger than it is: then nothing is believed."""
        try:
            age = time.time() - self._snapshot.stat().st_mtime
            told = json.loads(self._snapshot.read_text(encoding="utf-8"))
            if told["format"] != FORMAT or age < 0:
                return None
            return Snapshot.from_dict(told["snapshot"]), age
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def note(self, version: Version, check: BaseCheck) -> None:
        """This version may be served on this base.

        Raises:
            OSError: the cache cannot be written.
        """
        told = {
            "format": FORMAT, "content": version.manifest.content.removeprefix("sha256:"),
            "manifest": version.manifest.canonical().decode(), "why": check.why, "drift": dict(check.drift),
        }  # fmt: skip
        write_whole(self._of(version.id), json.dumps(told))

    def noted(self, line: Line) -> tuple[Version, BaseCheck] | None:
        """What was noted of a version, if it is still the one that ``line`` tells of."""
        try:
            told: Mapping[str, Any] = json.loads(self._of(line.id).read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                return None
            manifest, check = Manifest.parse(told["manifest"]), BaseCheck(True, told["why"], told["drift"])
        except (OSError, ValueError, KeyError, TypeError, LorchestraError):
            return None
        if (manifest.reference, manifest.digest) != (line.reference, line.digest):
            return None
        return Version(manifest, line.id, "ready", None), check

    def forget(self, contents: set[str]) -> None:
        """Nothing is noted any more of the versions whose copies these were."""
        for file in self.directory.glob("[0-9]*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(file.read_text(encoding="utf-8"))["content"] in contents:
                    file.unlink()

    def _of(self, id: int) -> Path:
        return self.directory / f"{id}.json"
