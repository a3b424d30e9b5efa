"""``serve`` as a person types it: its mistakes, its keys, and that help needs no torch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "prometheus_client")


@pytest.mark.parametrize(
    "words", [["serve", "--help"], ["serve", "keys", "--help"], ["serve", "keys", "add", "--help"]]
)
def test_help_shows_an_example_and_imports_nothing_heavy(words):
    code = (
        "import sys; sys.argv = ['lorchestra', *sys.argv[1:]]\n"
        "from lorchestra.cli import main\n"
        "try: main()\n"
        f"finally: print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in told
    assert "Usage: " in told
    assert "--" in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], ["no base"]),
        (["b", "--host", "0.0.0.0"], ["--insecure-no-keys", "serve keys add"]),
        (["b", "--adapter", "clinic"], ["write --adapter NAME=DIR"]),
        (["b", "-a", "x=1", "-a", "x=2"], ["'x' is given twice"]),
        (["b", "-a", "x=nowhere"], ["adapter x: ", "nowhere is no directory; an adapter is a directory with"]),
        (["b", "-a", "../x=nowhere"], ["no name for an adapter"]),
        (["b", "--adapters", "nowhere"], ["nowhere is no directory"]),
        (["b", "--keys", "keys.yaml"], ["there is no keys file keys.yaml"]),
        (["b", "--config", "nowhere.yaml"], ["no configuration file"]),
        (["b", "--port", "70000"], ["port: expected at most 65535"]),
        (["b", "--engine", "vlm"], ["did you mean 'vllm'"]),
        (["b", "--memory", "much"], ["memory: expected a size in MB or GB, as in 512MB or 4GB, got 'much'"]),
        (["b", "--max-body", "8"], ["max_body: expected a size in MB"]),
        (["b", "--body-seconds", "0"], ["body_seconds: expected more than 0"]),
        (["b", "--cors-origin", "example.org"], ["an origin without a path"]),
        (["b", "--enable-load"], ["--lora-root"]),
        (["b", "--enable-load", "--lora-root", "nowhere"], ["no directory"]),
        (["b", "--ssl-certfile", "nowhere.pem"], ["TLS"]),
        (["b", "--alias", "x=cliniq"], ["there is no adapter cliniq"]),
        (["./nowhere", "--port", "0"], ["nowhere"]),
    ],
)
def test_a_mistake_is_told_before_anything_slow(lorchestra, words, says):
    lorchestra("serve", *words).refused(*says)


def test_a_port_that_is_taken(lorchestra, tiny_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        lorchestra("serve", tiny_dir, "--port", taken.getsockname()[1]).refused("cannot listen at 127.0.0.1")


def test_two_adapters_of_one_name(lorchestra, make_adapter, tmp_path):
    make_adapter(tmp_path / "all" / "clinic", 1)
    make_adapter(tmp_path / "clinic", 2)
    lorchestra("serve", "b", "-a", "clinic=clinic", "--adapters", "all").refused("two adapters are called 'clinic'")


def test_keys_are_made_listed_and_revoked(lorchestra, tmp_path):
    made = lorchestra("serve", "keys", "add", "acme", "--adapters", "clinic,audit", "--rpm", 60, "--concurrency", 4)
    assert made.code == 0
    secret = made.out.strip()
    assert secret.startswith("lo-")
    assert secret not in (tmp_path / "keys.yaml").read_text()
    ops = lorchestra("serve", "keys", "add", "ops", "--adapters", "all", "--role", "operator")
    assert ops.code == 0
    listed = lorchestra("serve", "keys", "list")
    assert "acme" in listed.out
    assert "audit, clinic" in listed.out
    told = json.loads(lorchestra("serve", "keys", "list", "--json").out)
    assert [(key["name"], key["adapters"], key["role"]) for key in told] == [
        ("acme", ["audit", "clinic"], "user"),
        ("ops", "all", "operator"),
    ]
    assert "sha256" not in told[0]
    assert lorchestra("serve", "keys", "remove", "acme").code == 0
    assert [key["name"] for key in json.loads(lorchestra("serve", "keys", "list", "--json").out)] == ["ops"]


def test_a_key_that_may_use_the_base_alone_is_remarked_on(lorchestra):
    assert "the base alone" in lorchestra("serve", "keys", "add", "bare").err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["add", "acme", "--role", "root"], ["there are user, viewer, operator"]),
        (["add", "../acme"], ["no name"]),
        (["add", "acme", "--adapters", "clinic,../x"], ["no name"]),
        (["add", "acme", "--rpm", "0"], ["--rpm"]),
        (["add"], ["NAME"]),
        (["list"], ["there is no keys file"]),
        (["remove", "acme"], ["there is no keys file"]),
        (["revoke", "acme"], ["revoke"]),
    ],
)
def test_mistakes_with_keys(lorchestra, words, says):
    lorchestra("serve", "keys", *words).refused(*says)


def test_tab_completes_adapters_engines_and_what_is_done_with_keys(lorchestra, make_adapter, tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapters" / "clinic", 1)

    def offered(words):
        monkeypatch.setenv("_LORCHESTRA_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"lorchestra {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
        return lorchestra().out.split()

    assert "embedded" in offered("serve --engine e")
    assert "clinic=adapters/clinic" in offered("serve --adapter clinic=ad")
    assert "remove" in offered("serve keys re")
