"""The page itself: files of the package, under an address that has their digest in it."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FOREVER = "public, max-age=31536000, immutable"
_MARK = "{assets}"


class Asset(NamedTuple):
    """A file: its bytes, its kind, and what tells it from any other."""

    content: bytes
    kind: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """Name → file, all but the page."""
    found = {}
    for file in sorted(files(__package__).joinpath("static").iterdir(), key=lambda one: one.name):
        kind = KINDS.get("." + file.name.rpartition(".")[2])
        if kind and file.name != "index.html":
            content = file.read_bytes()
            found[file.name] = Asset(content, f"{kind}; charset=utf-8", _etag(content))
    return found


@cache
def version() -> str:
    """Of all files together: it is in their addresses, so that a browser never mixes two releases."""
    told = "".join(f"{name} {asset.etag}\n" for name, asset in assets().items())
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@cache
def page(language: str) -> Asset:
    """The page in ``en`` or ``zh``."""
    text = files(__package__).joinpath("static", "index.html").read_text(encoding="utf-8")
    text = text.replace(_MARK, f"assets/{version()}").replace('<html lang="en"', f'<html lang="{language}"')
    return Asset(text.encode(), "text/html; charset=utf-8", _etag(text.encode()))


def language_of(header: str) -> str:
    """``zh`` where a browser's Accept-Language likes it better than English, else ``en``."""
    liked: dict[str, float] = {}
    for part in header[:1000].split(","):
        found = re.fullmatch(r"\s*([a-zA-Z]{1,8}|\*)(?:-[a-zA-Z0-9-]+)?\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?))?\s*", part)
        if found:
            name, weight = found[1].lower(), float(found[2] or 1)
            liked[name] = max(liked.get(name, 0.0), weight)
    return "zh" if liked.get("zh", 0.0) > liked.get("en", 0.0) else "en"


async def index(request: Request) -> Response:
    """The page, in the browser's language."""
    found = page(language_of(request.headers.get("accept-language", "")))
    return _answer(request, found, "no-cache", {"vary": "accept-language"})


async def asset(request: Request) -> Response:
    """One of its files; under an old address there is none, so that nobody keeps the new ones there for ever."""
    found = assets().get(request.path_params["name"])
    if found is None or request.path_params["version"] != version():
        return Response(status_code=404)
    return _answer(request, found, FOREVER, {})


def _answer(request: Request, found: Asset, keep: str, more: dict[str, str]) -> Response:
    headers = {"etag": found.etag, "cache-control": keep, **more}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if found.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.kind)


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'
