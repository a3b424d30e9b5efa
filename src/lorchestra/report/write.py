"""``report.json`` and ``report.html``: what a run did and what came of it, in one file that needs no network.

The page is made of ``report.json`` alone. Every text in it (names, prompts, answers, recipes) is somebody else's and
is escaped; a content security policy allows no request and no script but the page's own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lorchestra.base.home import write_whole
from lorchestra.errors import StorageError

# Characters that HTML or UTF-8 cannot hold; one for one, so that the spans of supervised text stay true.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render_report(data: Mapping[str, Any]) -> str:
    """The report as one HTML document; the same data gives the same text.

    Args:
        data: what ``report.json`` holds. A section that is missing, ``None`` or empty is left out of the page.
    """
    from lorchestra.report.view import page

    return document("report.html.j2", page(clean(data)))


def document(template: str, view: Mapping[str, Any]) -> str:
    """A whole page: ``template`` of this package, filled from ``view``, with the style sheet and the script in it."""
    environment, style, script = _template()
    # The policy names the script by what stands between its tags, line breaks included.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    filled = environment.get_template(template)
    return str(filled.render(**view, style_sheet=Markup(style), script_text=Markup(script), script_digest=digest))


def clean(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` as JSON would give it back, without characters that a page cannot hold."""
    cleaned: dict[str, Any] = _printable(_plain(data))
    return cleaned


def write_report(data: Mapping[str, Any], directory: Path, name: str = "report") -> Path:
    """Write ``report.json`` and ``report.html`` (or another name) into ``directory``; each appears whole or not at all.

    Numbers that are not finite are written as ``null``: JSON has none.

    Returns:
        The path of the page.

    Raises:
        StorageError: the directory cannot be made or written, or the disk is full.
    """
    plain = _plain(data)
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    page = directory / f"{name}.html"
    _put(directory / f"{name}.json", text + "\n")
    _put(page, render_report(plain))
    return page


def _put(path: Path, text: str) -> None:
    try:
        # A lone surrogate (half a character, as broken data has them) cannot be written as UTF-8.
        write_whole(path, text.encode("utf-8", "replace").decode("utf-8"), synced=True)
    except OSError as error:
        raise StorageError(
            f"the report cannot be written to {path}: {error.strerror or error}. The run's steps are kept; free "
            "space or make the directory writable, then run the recipe again"
        ) from error


def _plain(value: Any) -> Any:
    """As JSON would give it back: text keys, lists, ``None`` for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return _UNPRINTABLE.sub("\ufffd", value) if isinstance(value, str) else value


@functools.cache
def _template() -> tuple[Any, str, str]:
    """The Jinja environment, the style sheet and the script; all three are files of this package."""
    import jinja2

    from lorchestra.report.view import FILTERS

    loader = jinja2.PackageLoader("lorchestra", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters.update(FILTERS)
    style, script = (loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    return environment, style, script
