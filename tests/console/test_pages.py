"""The page and its files: addresses, caches, languages; and laws of the files themselves."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import chain

import pytest

from lorchestra.console.pages import assets, language_of, version
from lorchestra.registry.canary.guards import GUARDS
from lorchestra.registry.sql.audit import ACTIONS
from lorchestra.serve.config import ServeConfig

STATIC = files("lorchestra.console").joinpath("static")
SCRIPTS = {file.name: file.read_text(encoding="utf-8") for file in STATIC.iterdir() if file.name.endswith(".js")}


def test_the_page_names_its_files_by_their_digest_and_they_are_kept_for_ever(shared):
    page = shared.gateway.get("/console/")
    assert page.headers["cache-control"] == "no-cache"
    names = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(names) == 4
    for name in names:
        assert name.startswith(f"assets/{version()}/")
        answer = shared.gateway.get(f"/console/{name}")
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        again = shared.gateway.client.get(f"/console/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    again = shared.gateway.client.get("/console/", headers={"if-none-match": f'"other", W/{page.headers["etag"]}'})
    assert again.status_code == 304


@pytest.mark.parametrize(
    "path",
    ["assets/0000000000000000/app.js", "assets/{}/index.html", "assets/{}/../../app.py", "static/app.js", "app.py",
     "assets/{}/%2e%2e/%2e%2e/app.py", "assets/{}/..%2f..%2fapp.py"],
)  # fmt: skip
def test_nothing_else_is_served(shared, path):
    assert shared.gateway.get("/console/" + path.format(version())).status_code == 404


def test_without_the_slash_it_leads_there(shared):
    answer = shared.gateway.get("/console")
    assert (answer.status_code, answer.headers["location"]) == (308, "console/")


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-GB,en;q=0.9,zh;q=0.8", "en"), ("de-DE,zh-TW;q=0.4", "zh"),
        ("zh;q=0", "en"), ("de", "en"), ("*", "en"), ("zh;q=oops", "en"), (",;,q=", "en"), ("z" * 100_000, "en"),
    ],
)  # fmt: skip
def test_the_language_is_the_browsers(shared, header, language):
    assert language_of(header) == language
    if len(header) < 1000:
        page = shared.gateway.client.get("/console/", headers={"accept-language": header})
        assert f'<html lang="{language}"' in page.text
        assert page.headers["vary"] == "accept-language"


def test_every_file_of_the_package_that_scripts_import_is_there():
    for name, text in SCRIPTS.items():
        for other in re.findall(r'from "\./([\w.]+)"', text):
            assert other in assets(), f"{name} imports {other}"


def test_no_text_becomes_markup_and_nothing_comes_from_elsewhere():
    """Values reach the page as text nodes and attributes alone; and there is no inline script, style or event."""
    markup = re.compile(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|srcdoc|\beval\(|new Function")
    for name, text in SCRIPTS.items():
        assert not markup.search(text), name
        elsewhere = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not elsewhere, name
        assert 'setAttribute("style"' not in text
    page = STATIC.joinpath("index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    assert "url(" not in STATIC.joinpath("console.css").read_text(encoding="utf-8")


PAIR = re.compile(r'(?:^|[\s{])"?([a-z][\w -]*?)"?: \["((?:[^"\\]|\\.)+)", "((?:[^"\\]|\\.)+)"\]')


def words():
    found = {key: (english, chinese) for key, english, chinese in PAIR.findall(SCRIPTS["words.js"])}
    assert len(found) > 200, "the words were found"
    return found


def test_every_word_that_is_used_is_there_in_both_languages_with_the_same_places():
    known = words()
    rest = "\n".join(text for name, text in SCRIPTS.items() if name != "words.js")
    used = set(re.findall(r'\bt\("([^"]+)"', rest))
    families = {
        "a_": ACTIONS, "guard_": GUARDS, "v_": ("better", "worse", "unclear", "other test", "one only"),
        "theme_": ("auto", "light", "dark"), "": ("running", "promoted", "aborted", "rolled-back", "ready", "revoked",
        "holds", "unsure", "broken", "operator", "viewer", "lower", "higher", "stable", "candidate"),
    }  # fmt: skip
    used |= {prefix + word for prefix, members in families.items() for word in members}
    assert used - set(known) == set()
    named = set(chain.from_iterable(re.findall(r'"([^"\s]+)"', rest)))
    assert [key for key in known if key not in used and f'"{key}"' not in rest and key not in named] == []
    for key, pair in known.items():
        places = [set(re.findall(r"\{(\w+)\}", text)) for text in pair]
        assert places[0] == places[1], key


def schemes():
    text = STATIC.joinpath("console.css").read_text(encoding="utf-8")
    light = re.search(r"^:root \{(.*?)^\}", text, re.S | re.M)[1]
    dark = re.search(r'^:root\[data-theme="dark"\] \{(.*?)^\}', text, re.S | re.M)[1]
    system = re.search(r'not\(\[data-theme="light"\]\) \{(.*?)^\}', text, re.S | re.M)[1]
    values = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in (light, dark, system)]
    assert values[1] == values[2], "dark is dark, whoever chose it"
    return values[:2]


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_stands_out_from_what_it_is_on_by_4_5_to_1():
    """WCAG 2.2, 1.4.3."""
    pairs = [(ink, ground) for ink in ("ink", "soft", "accent", "bad") for ground in ("paper", "card", "well")]
    pairs += [("accent-ink", "accent"), ("accent", "accent-well"), ("good", "good-well"), ("bad", "bad-well"),
              ("danger-ink", "danger"), ("danger", "card"), ("ink", "bad-well"), ("ink", "accent-well"),
              ("paper", "ink"), ("soft", "accent-well")]  # fmt: skip
    for scheme in schemes():
        for ink, ground in pairs:
            light, dark = sorted((luminance(scheme[ink]), luminance(scheme[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, scheme[ink], ground, scheme[ground])


@pytest.mark.parametrize(
    ("settings", "there"),
    [
        ({}, True), ({"host": "0.0.0.0"}, False), ({"host": "0.0.0.0", "keys": "k"}, True), ({"console": False}, False),
        ({"host": "0.0.0.0", "console": True}, True),
    ],
)  # fmt: skip
def test_the_console_is_there_by_itself_only_where_not_everybody_could_use_it(settings, there):
    assert ServeConfig(**settings).has_console is there
