"""A LoRA resolver for vLLM: a request's ``model`` is looked up under one directory, when vLLM does not know it yet.

It runs in vLLM's own environment (``pip install --no-deps lorchestra`` there) and is found through vLLM's entry point
group ``vllm.general_plugins``. With ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` and ``LORCHESTRA_LORA_ROOT=DIR`` the name
``team/support`` means the PEFT directory ``DIR/team/support``. It is checked (readable, finite, the digest it says,
scale folded or folded now) before vLLM sees it. A name means the same weights for as long as vLLM runs: one whose
directory has changed is refused, and the new weights need a new name.

With ``LORCHESTRA_REGISTRY=URL`` names are looked up in a registry too: ``clinic@v2``, ``clinic@sha256:…``; and
``clinic`` or ``clinic@production``, which keep the version that they had when vLLM was first asked for them. vLLM asks
once: an alias that moves later, or a revocation, is followed by our gateway (``lorchestra serve``), not by vLLM alone.
This needs SQLAlchemy in vLLM's environment, and psycopg for PostgreSQL.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.registry.registry import Registry

ROOT, REGISTRY = "LORCHESTRA_LORA_ROOT", "LORCHESTRA_REGISTRY"
log = logging.getLogger("vllm.lorchestra")  # below vLLM's own logger, which is the one that is set up there


def register() -> None:
    """Called by vLLM in every process of its own, perhaps more than once. Does nothing without :data:`ROOT` or
    :data:`REGISTRY`.
    """
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # type: ignore[import-not-found,unused-ignore]

    root, registry = os.environ.get(ROOT, ""), os.environ.get(REGISTRY, "")
    if registry and find_spec("sqlalchemy") is None:
        log.error(
            "%s is set, but SQLAlchemy is not in vLLM's environment (%s): nothing is served from the registry. There, "
            "run pip install 'sqlalchemy>=2' (and 'psycopg[binary]' for PostgreSQL)",
            REGISTRY, sys.prefix,
        )  # fmt: skip
        registry = ""
    if not root and not registry:
        return
    resolver = Resolver(Path(root) if root else None, registry)
    kind = type("LorchestraResolver", (LoRAResolver,), {"resolve_lora": lambda self, *names: resolver.resolve(*names)})
    LoRAResolverRegistry.register_resolver("lorchestra", kind())


class Resolver:
    """Names to directories under ``root``, or to versions; every trouble is logged and is ``None``, since vLLM catches
    nothing.

    Args:
        root: of directories; ``None`` for none.
        registry: its URL; empty for none. A name that is under ``root`` is not looked for in it.
    """

    def __init__(self, root: Path | None, registry: str = "") -> None:
        self.root, self.url = root, registry
        self._registry: Registry | None = None
        self._lock = Lock()
        self._digests: dict[str, str] = {}
        self._copies = tempfile.TemporaryDirectory(prefix="lorchestra-lora-")

    async def resolve(self, base_model_name: str, lora_name: str) -> Any:
        """A ``LoRARequest``, or ``None``."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found,unused-ignore]

        try:
            found = await asyncio.to_thread(self.find, lora_name, base_model_name)
        except Exception as error:  # vLLM would answer 500, or fall: whatever it is, the name is not served
            log.warning("LoRA %r is not served: %s", lora_name, error)
            return None
        if found is None:
            return None
        number = int.from_bytes(hashlib.sha256(lora_name.encode()).digest()[:4], "little") % (2**31 - 1) + 1
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(found))

    def find(self, name: str, base: str = "") -> Path | None:
        """A portable copy of what ``name`` means, ``None`` where nothing does.

        Raises:
            AdapterError: it is there, and cannot be served; or has other weights than it had.
            UserError, LorchestraError: its version was revoked, or the registry cannot be reached.
        """
        from lorchestra.adapter.adapter import Adapter
        from lorchestra.errors import AdapterError

        directory = self._directory(name) or self._version(name, base)
        if directory is None:
            return None
        adapter = Adapter.load(directory)
        if not _fits(adapter, Path(base)):
            raise AdapterError(f"no module of it is in {base}, and vLLM would answer as the base; it is another base's")
        known = self._digests.setdefault(name, adapter.digest)
        if known != adapter.digest:
            raise AdapterError(
                "it leads to other weights than before, which vLLM knows by this name; give new weights a new name (of "
                "a registry: name@v2)"
            )
        copy = Path(self._copies.name) / adapter.digest.removeprefix("sha256:")
        if not copy.is_dir():
            adapter.save(copy)
        return copy

    def _directory(self, name: str) -> Path | None:
        if self.root is None:
            return None
        root = self.root.resolve()
        parts = name.split("/")
        if not name or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            return None
        directory = root.joinpath(*parts).resolve()
        inside = directory.is_relative_to(root) and (directory / "adapter_config.json").is_file()
        return directory if inside else None

    def _version(self, name: str, base: str) -> Path | None:
        """A verified copy of the version that ``name`` leads to."""
        if not self.url:
            return None
        from lorchestra.adapter.lineage import BaseId
        from lorchestra.base.fingerprint import fingerprint
        from lorchestra.base.home import home
        from lorchestra.errors import AdapterError, UserError
        from lorchestra.registry.mistakes import UnknownReferenceError
        from lorchestra.registry.reference import parse_reference
        from lorchestra.registry.registry import Registry

        try:
            reference = parse_reference(name)
        except UserError:  # no name of ours: of the base, say
            return None
        with self._lock:
            if self._registry is None:
                self._registry = Registry.open(self.url)
            registry = self._registry
        try:
            version = registry.resolve(reference)
        except UnknownReferenceError:
            return None
        own = fingerprint(Path(base)) if base and any(Path(base).glob("*.safetensors")) else BaseId(base)
        check = registry.allowed_base(version.manifest, own)
        if not check.ok:
            raise AdapterError(check.why)
        directory = registry.materialise(version, home() / "versions")
        if reference.version is None and not reference.digest:
            log.warning(
                "LoRA %r is %s for as long as this vLLM runs, whatever it leads to later", name, version.reference
            )
        return directory


def _fits(adapter: Adapter, base: Path) -> bool:
    """Whether any module is in the base, where its files are here to be looked into."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in base.glob("*.safetensors") if base.is_dir() else ():
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return not names or any(f"{path}.weight" in names for path in adapter.modules)
