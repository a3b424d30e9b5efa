"""``lorchestra serve --registry`` as a person types it: mistakes, and the real server on the tiny base."""

from __future__ import annotations

import httpx2
import pytest
import torch
from tests.serve.gates_world import coefficients, gate_of, write_adapters
from tests.serve.real_server import Reference, make_adapter, make_base, serving
from tests.serve.registry_world import until

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.fingerprint import fingerprint
from lorchestra.gate import store
from lorchestra.registry.registry import Registry


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["b", "--registry", "nowhere"], ["there is no registry at"]),
        (["b", "--registry", "mysql://host/db"], ["is no kind of registry"]),
        (["b", "--registry", "postgresql://me:secret@/db"], ["blobs="]),
        (["b", "--registry", "nowhere", "--registry-grace", "soon"], ["'soon' is no duration"]),
    ],
)
def test_a_mistake_is_told_before_anything_slow(lorchestra, words, says):
    said = lorchestra("serve", *words)
    said.refused(*says)
    assert "secret" not in said.err


def test_the_environment_names_a_registry_and_an_empty_flag_none(lorchestra, monkeypatch):
    monkeypatch.setenv("LORCHESTRA_REGISTRY", "nowhere")
    lorchestra("serve", "b").refused("there is no registry at")
    lorchestra("serve", "./nothing", "--registry", "", "--port", "0").refused("nothing")


@pytest.mark.slow
@pytest.mark.parametrize("process", ["true", "false"])
def test_a_promotion_changes_the_answers_of_the_real_server(tmp_path, process):
    base = make_base(tmp_path / "base")
    identity = fingerprint(base)
    adapters = {f"clinic@v{k}": Adapter(make_adapter(k, 4).modules, identity) for k in (1, 2)}
    config = tmp_path / "serve.yaml"
    config.write_text(f"registry: registry\nregistry_cache: cache\nengine_process: {process}\n")
    with Registry.open(str(tmp_path / "registry"), create=True) as registry:
        for k, adapter in enumerate(adapters.values(), 1):
            registry.push(adapter.save(tmp_path / f"a{k}"), "clinic")
        registry.promote("clinic@v1")
        with serving(base, tmp_path / "out", "--config", str(config)) as server:
            client = httpx2.Client(base_url=server.url, timeout=120)

            def ask(model="clinic"):
                body = {"model": model, "prompt": "hello", "max_tokens": 6, "temperature": 0, "logprobs": 0}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return answer.headers["x-lorchestra-model"], answer.json()["choices"][0]["logprobs"]

            reference = Reference(adapters)
            prompt = reference.tokenizer("hello")["input_ids"]
            for version in ("clinic@v1", "clinic@v2"):
                until(lambda v=version: ask()[0] == v)
                for model in ("clinic", version):
                    by, told = ask(model)
                    ids = [*prompt, *reference.ids(told["tokens"])]
                    exact = reference.logprobs([(version, 1.0)], ids, {})[len(prompt) - 1 : -1]
                    found = exact.gather(1, torch.tensor(ids[len(prompt) :])[:, None])[:, 0]
                    assert by == version
                    torch.testing.assert_close(torch.tensor(told["token_logprobs"]).double(), found, atol=1e-3, rtol=0)
                registry.promote("clinic@v2")
            registry.revoke("clinic@v2", why="leaks")
            ask_again = {"model": "clinic", "prompt": "hello", "max_tokens": 1}
            until(lambda: client.post("/v1/completions", json=ask_again).status_code == 404)
        assert "registry" in server.stderr.read_text()
        assert (tmp_path / "cache").is_dir()


@pytest.mark.slow
def test_a_gate_answers_with_its_members_in_the_registry(tmp_path):
    base = make_base(tmp_path / "base")
    directories = write_adapters(tmp_path / "adapters")
    gate = gate_of(directories, base=fingerprint(base, "tiny"), temperature=8.0)
    place = store.save(gate, tmp_path / "gate")
    with Registry.open(str(tmp_path / "registry"), create=True) as registry:
        for name in "ab":
            registry.push(directories[name], f"ward-{name}")
        words = ["--registry", str(tmp_path / "registry"), "--registry-cache", str(tmp_path / "cache")]
        words += ["--gate", f"triage={place}", "--adapter", f"c={directories['c']}"]
        with serving(base, tmp_path / "out", *words) as server:
            client = httpx2.Client(base_url=server.url, timeout=120)
            answer = client.post("/v1/completions", json={"model": "triage", "prompt": "hello", "max_tokens": 4})
    assert answer.status_code == 200
    assert set(coefficients(answer.headers["x-lorchestra-coefficients"])) == {"ward-a@v1", "ward-b@v1", "c"}
