"""A server with a registry and a console, over real HTTP; and a browser's manners without a browser."""

from __future__ import annotations

from pathlib import Path

import httpx2
from tests.serve.registry_world import Gateway, write

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.console.app import Console, mount
from lorchestra.console.usage import Usage
from lorchestra.registry.access import KeysFile, add_key
from lorchestra.registry.manifest import Metric
from lorchestra.registry.registry import Registry

EVIL = "<img src=x onerror=\"document.title='stolen'\">"


def loss(value, n=400):
    return {"loss": Metric(value=value, low=value - 0.04, high=value + 0.04, n=n, split="sealed",
                           sealed="sha256:" + "7" * 64)}  # fmt: skip


def stocked(url: str, place: Path) -> Registry:
    """``clinic`` with three versions (the third fused of the others) and ``legal`` with one."""
    registry = Registry.open(url, create=True, actor="maker")
    one, two = write(place / "one", 1), write(place / "two", 2)
    registry.push(one, "clinic", note="first", tags=["notes"], metrics=loss(1.31), alias="production", why="begin")
    registry.push(two, "clinic", note=EVIL, tags=["dpo"], metrics=loss(1.18))
    a, b = Adapter.load(one), Adapter.load(two)
    parents = (Parent("clinic-a", a.digest, 0.3), Parent("clinic-b", b.digest, 0.5))
    mixed = Adapter(Adapter.load(write(place / "raw", 3)).modules, a.base, Lineage(made_by="fusion", parents=parents))
    registry.push(mixed.save(place / "three"), "clinic", metrics=loss(1.12))
    registry.push(write(place / "four", 4), "legal", metrics=loss(0.9), alias="production")
    return registry


class World:
    """One server.

    Args:
        place: of registry, keys and cache.
        keyed: whether it has keys: an operator ``ann``, a viewer ``vic``, a user ``uma``.
    """

    def __init__(self, place: Path, keyed: bool = True, stock=stocked) -> None:
        self.place, self.url = place, str(place / "registry")
        self.registry = stock(self.url, place)
        self.keys_file, self.keys, self.secrets = place / "keys.yaml", None, {}
        if keyed:
            for name, role in (("ann", "operator"), ("vic", "viewer"), ("uma", "user")):
                self.secrets[name] = add_key(self.keys_file, name, role=role, adapters="all")
            self.keys = KeysFile(self.keys_file)
        self.gateway = Gateway(self.url, place / "cache", keys=self.keys)
        self.gateway.operator = self.secrets.get("ann")
        inner = self.gateway.gateway
        self.usage = inner._log = Usage(inner._log, "base")
        self.console = Console(inner, self.keys, self.usage, "base", self.gateway.follower)
        mount(self.gateway.server.config.app, self.console)
        self.address = self.gateway.url

    def browser(self, name: str = "") -> Browser:
        """Somebody's; logged in where a name is given, or where nobody has to be."""
        browser = Browser(self.address)
        if name:
            assert browser.login(self.secrets[name]).status_code == 200
        elif self.keys is None:
            browser.token = browser.get("session").json()["csrf"]
        return browser

    def stop(self) -> None:
        self.gateway.stop()
        self.registry.close()


class Browser:
    """Keeps cookies, and says where it comes from."""

    def __init__(self, address: str) -> None:
        self.client = httpx2.Client(base_url=address, timeout=60)
        self.origin, self.token = address, ""

    def login(self, secret: str):
        answer = self.post("login", {"key": secret})
        if answer.status_code == 200:
            self.token = answer.json()["csrf"]
        return answer

    def get(self, path: str, **params):
        return self.client.get(f"/console/api/{path}", params=params)

    def post(self, path: str, body=None, **headers):
        said = {"origin": self.origin, "x-lorchestra-csrf": self.token} | headers
        said = {name: value for name, value in said.items() if value}
        return self.client.post(f"/console/api/{path}", json=body if body is not None else {}, headers=said)
