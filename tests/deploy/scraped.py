"""A server that follows a registry, on the tiny model, after traffic of every kind; and what Prometheus makes of it."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.real_server import make_adapter, make_base, make_keys, serving

from lorchestra.registry.canary.plan import Plan
from lorchestra.registry.canary.rollout import start
from lorchestra.registry.registry import Registry

MEMORY = "0.1MB"  # room for two or three of the adapters, which take 30 to 59 kB each
OTHERS = ("audit", "intake", "notes", "triage")
PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Watched:
    """A server with metrics.

    Args:
        url: of it.
        operator: the key that may read them.
        traffic: once of every kind.
    """

    url: str
    operator: str
    traffic: Callable[[], None]

    def page(self) -> str:
        """What ``/metrics`` shows."""
        headers = {"authorization": f"Bearer {self.operator}"}
        return httpx2.get(f"{self.url}/metrics", headers=headers).raise_for_status().text

    def labels(self) -> dict[str, set[str]]:
        """Series → the labels it has."""
        found: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(self.page()):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


@contextmanager
def watched(place: Path) -> Iterator[Watched]:
    """The server, until the block ends."""
    base, registry = make_base(place / "base"), place / "registry"
    names = ("clinic", "broken", *OTHERS)
    with Registry.open(str(registry), create=True, actor="test") as held:
        for seed, name in enumerate(names):
            make_adapter(seed, 8).save(place / name)
            held.push(place / name, name, alias="production")
        make_adapter(99, 8).save(place / "clinic-2")
        held.push(place / "clinic-2", "clinic")
        start(held, "clinic", "clinic@v2", plan=Plan((0.5,)))
        files = held.resolve("broken").manifest.files
        for path in registry.glob("blobs/**/*"):
            if path.is_file() and files["adapter_model.safetensors"].sha256.removeprefix("sha256:") == path.name:
                path.chmod(0o644)
                path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    keys = make_keys(place / "keys.yaml", {"acme": names})
    flags = ["--registry", str(registry), "--registry-cache", str(place / "cache")]
    flags += ["--keys", str(place / "keys.yaml"), "--memory", MEMORY, "--request-log", ""]
    with serving(base, place / "server", *flags) as server:
        yield Watched(server.url, keys["operator"], lambda: _traffic(server.url, keys["acme"]))


def _traffic(url: str, key: str) -> None:
    with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE) as client:
        for user in range(8):  # both arms of the canary, and streams
            _completion(client, "clinic", user=str(user), stream=bool(user % 2))
        for name in OTHERS:  # more than there is room for
            _completion(client, name)
        assert _completion(client, "nobody") == 404
        assert _completion(client, "broken") == 400
        assert _completion(client, "clinic", temperature=-1) == 400
        client.headers["authorization"] = "Bearer wrong"
        assert _completion(client, "clinic") == 401


def _completion(client: httpx2.Client, model: str, **more: object) -> int:
    bias = {"2": -100.0}  # it shall not end before it is to
    body = {"model": model, "prompt": "Fever", "max_tokens": 4, "logit_bias": bias, **more}
    response = client.post("/v1/completions", json=body)
    response.read()
    return response.status_code


def free_port() -> int:
    """One at which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def prometheus(program: str, config: Path, place: Path) -> Iterator[str]:
    """A Prometheus that is up; its URL."""
    place.mkdir()
    address = f"127.0.0.1:{free_port()}"
    words = [program, f"--config.file={config}", f"--storage.tsdb.path={place / 'series'}"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen([*words, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                if httpx2.get(f"http://{address}/-/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError((place / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)
