"""The resolver without vLLM: which names it finds, and that it needs nothing that vLLM's environment may lack.

Inside a real vLLM it is tested by tests/vllm.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError
from lorchestra.vllm_plugin import Resolver


def adapter(seed, path="model.layers.0.mlp.up_proj"):
    generator = torch.Generator().manual_seed(seed)
    return Adapter({path: LowRank(torch.randn(6, 2, generator=generator), torch.randn(2, 4, generator=generator))})


@pytest.fixture
def root(tmp_path):
    adapter(1).save(tmp_path / "loras" / "team" / "a")
    adapter(2).save(tmp_path / "secret")
    (tmp_path / "loras" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "loras" / "empty").mkdir()
    return tmp_path / "loras"


def test_a_name_is_a_directory_under_the_root_and_nothing_else(root, tmp_path):
    resolver = Resolver(root)
    copy = resolver.find("team/a")
    assert Adapter.load(copy).digest == adapter(1).digest
    assert resolver.find("team/a") == copy
    assert not copy.is_relative_to(root)
    outside = ["link", "../secret", "team/../../secret", str(tmp_path / "secret"), "team\\a", "a\0b"]
    away = [*outside, "", ".", "empty", "team", "none", "team//a"]
    assert [name for name in away if resolver.find(name) is not None] == []


def test_weights_that_change_under_a_name_are_refused(root):
    resolver = Resolver(root)
    resolver.find("team/a")
    adapter(3).save(root / "team" / "a")
    with pytest.raises(AdapterError, match="new name"):
        resolver.find("team/a")


def test_an_adapter_with_no_module_in_the_base_is_refused(root, tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4)}, tmp_path / "base" / "model.safetensors")
    adapter(4, "transformer.h.0.attn").save(root / "other")
    resolver = Resolver(root)
    assert resolver.find("team/a", str(tmp_path / "base")) is not None
    with pytest.raises(AdapterError, match="another base"):
        resolver.find("other", str(tmp_path / "base"))
    assert resolver.find("other", "org/name-on-a-hub") is not None


RESOLVE = """
import asyncio, sys, types
from dataclasses import dataclass
for name in ("transformers", "peft", "accelerate", "datasets", "pydantic", "typer", "optuna", "httpx2", "fastapi"):
    sys.modules[name] = None  # not to be imported
from pathlib import Path
from lorchestra.vllm_plugin import Resolver
import lorchestra.vllm_plugin
assert "torch" not in sys.modules, "vLLM's start is not to wait for us"
request = types.ModuleType("vllm.lora.request")
@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
request.LoRARequest = LoRARequest
sys.modules.update({"vllm": types.ModuleType("vllm"), "vllm.lora": types.ModuleType("vllm.lora"),
                    "vllm.lora.request": request})
resolver = Resolver(Path(sys.argv[1]))
got = asyncio.run(resolver.resolve("base", "team/a"))
assert got.lora_name == "team/a" and got.lora_int_id >= 1, got
Path(sys.argv[1], "team", "a", "adapter_model.safetensors").write_bytes(b"damaged")
assert asyncio.run(resolver.resolve("base", "team/a")) is None
assert asyncio.run(resolver.resolve("base", "nothing")) is None
"""


def test_it_runs_where_most_of_our_requirements_are_missing_and_raises_nothing(root):
    command = [sys.executable, "-c", RESOLVE, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "'team/a' is not served" in done.stderr


# ---- from a registry

FROM_A_REGISTRY = """
import os, sys, types
missing = sys.argv[1].split(",")
for name in ("transformers", "peft", "accelerate", "datasets", "typer", "optuna", "httpx2", "fastapi", *missing):
    sys.modules[name] = None  # not to be imported
import asyncio, logging
from dataclasses import dataclass
logging.basicConfig(stream=sys.stderr)
@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
class Registered:
    resolvers = {}
    @classmethod
    def register_resolver(cls, name, resolver):
        cls.resolvers[name] = resolver
parts = {"vllm": {}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": LoRARequest},
         "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": Registered}}
for name, values in parts.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(values)
import lorchestra.vllm_plugin
lorchestra.vllm_plugin.register()
for resolver in Registered.resolvers.values():
    for name in sys.argv[2:]:
        got = asyncio.run(resolver.resolve_lora("base", name))
        print(name, got and got.lora_path)
"""


def from_a_registry(registry, *names, missing="", place=None):
    command = [sys.executable, "-c", FROM_A_REGISTRY, missing, *names]
    environment = {**os.environ, "LORCHESTRA_REGISTRY": str(registry)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()), done.stderr


@pytest.fixture
def registry(tmp_path):
    from lorchestra.registry.registry import Registry

    with Registry.open(str(tmp_path / "registry"), create=True, actor="tester") as opened:
        for seed in (1, 2, 3):
            opened.push(adapter(seed).save(tmp_path / f"a{seed}"), "clinic")
        opened.promote("clinic@v2")
        opened.revoke("clinic@v3", why="leaks")
        yield opened


def test_names_are_versions_of_a_registry_in_an_environment_without_most_of_ours(registry, tmp_path):
    place = tmp_path / "registry"
    got, said = from_a_registry(place, "clinic@v1", "clinic", "clinic@v3", "nobody", "org/base", place=tmp_path)
    assert got["clinic@v1"] != got["clinic"]
    assert [name for name, path in got.items() if path == "None"] == ["clinic@v3", "nobody", "org/base"]
    assert "'clinic@v3' is not served: clinic@v3 was revoked" in said
    assert "'clinic' is clinic@v2 for as long as this vLLM runs" in said


def test_a_registry_without_sqlalchemy_is_told_of_clearly_and_nothing_is_registered(registry, tmp_path):
    got, said = from_a_registry(tmp_path / "registry", "clinic@v1", missing="sqlalchemy", place=tmp_path)
    assert got == {}
    assert "SQLAlchemy is not in vLLM's environment" in said


def test_an_alias_that_moves_is_not_taken_for_what_vllm_knows(registry, tmp_path):
    resolver = Resolver(None, str(tmp_path / "registry"))
    assert Adapter.load(resolver.find("clinic")).digest == adapter(2).digest
    registry.promote("clinic@v1")
    with pytest.raises(AdapterError, match="name@v2"):
        resolver.find("clinic")
    assert Adapter.load(resolver.find("clinic@v1")).digest == adapter(1).digest


def test_a_version_of_another_base_is_refused(tmp_path):
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.registry.registry import Registry

    (tmp_path / "base").mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4)}, tmp_path / "base" / "model.safetensors")
    with Registry.open(str(tmp_path / "registry"), create=True) as opened:
        foreign = Adapter(adapter(1).modules, BaseId("other", "sha256:" + "9" * 64))
        opened.push(foreign.save(tmp_path / "foreign"), "clinic")
    resolver = Resolver(None, str(tmp_path / "registry"))
    with pytest.raises(AdapterError, match="was trained on other"):
        resolver.find("clinic@v1", str(tmp_path / "base"))


def test_the_entry_point_is_the_one_that_vllm_reads():
    told = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = told["project"]["entry-points"]["vllm.general_plugins"]["lorchestra"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
