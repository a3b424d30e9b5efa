"""Chromium, driven by Playwright; a page that says afterwards what went wrong in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDED = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("LORCHESTRA_TESTS_SKIP_NOTHING"),
        reason="no Chromium here (Debian: apt-get install chromium); CI has one",
    ),
]


@contextmanager
def chromium() -> Iterator:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tab(browser, address: str, *, width=1280, height=900, locale="en-GB", colours="light", trouble=None):
    """A page of its own, at ``address``; what its console and its policy complained about is in ``page.trouble``."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, locale=locale, color_scheme=colours, timezone_id="Europe/Berlin"
    )
    context.add_init_script(
        "window.violations = []; document.addEventListener('securitypolicyviolation', "
        "e => window.violations.push(`${e.violatedDirective} ${e.blockedURI}`));"
    )
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.trouble = []
    expected = trouble or (lambda text: False)
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("console", lambda said: page.trouble.append(said.text)
            if said.type in ("error", "warning") and not expected(said.text) else None)  # fmt: skip
    page.goto(address)
    try:
        yield page
        assert page.evaluate("window.violations") == []
        assert page.trouble == []
    finally:
        context.close()


def enter(page, secret: str) -> None:
    """Log in."""
    page.get_by_label("API key", exact=False).fill(secret) if page.locator("html[lang=en]").count() else page.locator(
        "input[name=key]"
    ).fill(secret)
    page.locator("form button[type=submit]").click()
    page.locator("nav.tabs").wait_for()
