"""One file over HTTP, resumably: a killed or broken download goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lorchestra.events import Task

BLOCK = 1 << 18
Meter = Callable[[int | None], AbstractContextManager[Task]]


def download(
    client: Any,
    url: str,
    final: Path,
    *,
    sha256: str = "",
    same: bool = False,
    headers: dict[str, str] | None = None,
    retries: int = 5,
    meter: Meter,
    say: Callable[[str], None],
) -> None:
    """Fetch ``url`` into ``final``, by way of ``<final>.part``.

    Args:
        client: an ``httpx2.Client`` that follows redirects.
        url: of the file.
        final: appears whole, or not at all.
        sha256: what the file must have; empty if that is not known.
        same: the URL, or the name, stands for one content: a part may be continued without asking for its ETag.
        headers: of the request.
        retries: of a broken connection or a failing server.
        meter: total bytes → the task that counts them.
        say: hears of every retry.

    Raises:
        httpx2.HTTPError: it cannot be fetched.
        DamagedError: it does not have ``sha256``; the part is removed.
        OSError: it cannot be written.
    """
    import httpx2

    part = final.with_name(final.name + ".part")
    tag = final.with_name(final.name + ".etag")
    for attempt in range(retries + 1):
        try:
            _continue(client, url, part, tag, same or bool(sha256), headers or {}, meter)
            break
        except httpx2.HTTPError as error:
            refused = isinstance(error, httpx2.HTTPStatusError) and error.response.status_code < 500
            if refused or attempt == retries:
                raise
            say(f"{final.name}: {reason(error)}; trying again")
            time.sleep(min(0.25 * 2**attempt, 8))
    if sha256:
        with part.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise DamagedError(f"{final.name} was damaged on its way: sha256 is {found}, it should be {sha256}")
    part.rename(final)
    tag.unlink(missing_ok=True)


class DamagedError(Exception):
    """What arrived is not what was announced."""


def reason(error: Exception) -> str:
    """One line for a failed request."""
    import httpx2

    if isinstance(error, httpx2.HTTPStatusError):
        return f"HTTP {error.response.status_code} {error.response.reason_phrase}".strip()
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _continue(client: Any, url: str, part: Path, tag: Path, same: bool, headers: dict[str, str], meter: Meter) -> None:
    """Stream into ``part``, from its end if the server still has the same file."""
    known = tag.read_text(encoding="utf-8") if tag.exists() else ""
    start = part.stat().st_size if part.exists() and (known or same) else 0
    ranged = {"Range": f"bytes={start}-"} if start else {}
    if start and not same:
        ranged["If-Range"] = known
    with client.stream("GET", url, headers={**headers, **ranged, "Accept-Encoding": "identity"}) as response:
        if response.status_code == 416 and start:
            if response.headers.get("Content-Range", "").endswith(f"/{start}"):
                return  # all of it is here
            part.unlink()  # it is not the file that it was
            _continue(client, url, part, tag, same, headers, meter)
            return
        response.raise_for_status()
        if response.status_code != 206:
            start = 0
        strong = response.headers.get("ETag", "")
        tag.write_text("" if strong.startswith("W/") else strong, encoding="utf-8")
        length = response.headers.get("Content-Length")
        counted = start
        with part.open("ab" if start else "wb") as stream, meter(start + int(length) if length else None) as task:
            try:
                task.advance(start)
                for block in response.iter_bytes(BLOCK):
                    stream.write(block)
                    counted += len(block)
                    task.advance(len(block))
            except BaseException:
                task.advance(-counted)  # another try counts again from what is in the part
                raise
            stream.flush()
            os.fsync(stream.fileno())
