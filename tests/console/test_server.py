"""``lorchestra serve --registry`` with its console, as a process of its own: from the command line to an answer."""

from __future__ import annotations

import json

import httpx2
import pytest
from tests.console.world import Browser
from tests.serve.real_server import make_adapter, make_base, make_keys, serving
from tests.serve.registry_world import until

from lorchestra.registry.registry import Registry

pytestmark = pytest.mark.slow


def test_the_console_of_a_real_server(tmp_path):
    base = make_base(tmp_path / "base")
    with Registry.open(str(tmp_path / "registry"), create=True) as registry:
        for seed in (1, 2):
            registry.push(make_adapter(seed, 4).save(tmp_path / f"a{seed}"), "clinic")
        registry.promote("clinic@v1", why="first")
    secrets = make_keys(tmp_path / "keys.yaml", {"uma": ["clinic"]})
    arguments = ("--registry", str(tmp_path / "registry"), "--registry-cache", str(tmp_path / "cache"))
    with serving(base, tmp_path / "server", *arguments, "--keys", str(tmp_path / "keys.yaml")) as server:
        assert f"{server.url}/console/" in server.stderr.read_text()
        assert "<html" in httpx2.get(f"{server.url}/console/").text
        assert "/console" not in httpx2.get(f"{server.url}/openapi.json").text
        browser = Browser(server.url)
        assert browser.login(secrets["uma"]).status_code == 403
        assert browser.login(secrets["operator"]).status_code == 200
        assert browser.post("promote", {"reference": "clinic@v2", "why": "better"}).status_code == 200

        def by():
            body = {"model": "clinic", "prompt": "Fever?", "max_tokens": 6}
            answer = browser.post("ask", body)
            assert answer.status_code == 200, answer.text
            told = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
            assert told[-1] == {"end": True}
            return answer.headers["x-lorchestra-model"]

        until(lambda: by() == "clinic@v2", 10)
        (row,) = [row for row in browser.get("usage").json()["rows"] if row["model"] == "clinic@v2"]
        assert row["tenant"] == "operator"
        assert row["requests"] >= 1
    with serving(base, tmp_path / "without", "--no-console") as server:
        assert httpx2.get(f"{server.url}/console/").status_code == 404
