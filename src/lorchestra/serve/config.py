"""Everything a server can be told, in one YAML file; flags of the command line win over it."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lorchestra.errors import UserError
from lorchestra.recipe.text import Document
from lorchestra.recipe.words import problems
from lorchestra.registry.canary.plan import parse_duration
from lorchestra.registry.location import Location, local_path

SIZE = r"^[0-9]+(\.[0-9]+)?(MB|GB)$"
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
Positive = Annotated[int, Field(ge=1)]
# Of these, adapters and gates, relative ones are the file's neighbours.
PATHS = ("keys", "ssl_certfile", "ssl_keyfile", "vllm_adapters", "registry_cache")
REGISTRY = "LORCHESTRA_REGISTRY"


def _size(text: str) -> str:
    if not re.fullmatch(SIZE, text) or not size_of(text):
        raise ValueError(f"expected a size in MB or GB, as in 512MB or 4GB, got {text!r}")
    return text


def _origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text):
        raise ValueError(f"expected an origin without a path, as in https://chat.example.org, or '*', got {text!r}")
    return text


Size = Annotated[str, AfterValidator(_size)]
Origin = Annotated[str, AfterValidator(_origin)]


class ServeConfig(BaseModel):
    """Of ``lorchestra serve``. Relative paths are relative to the file that they stand in.

    Args:
        base: a source: a model directory, ``pip:``, ``hf:``, or a bare ``org/name``.
        name: what requests call the base; the last part of ``base`` unless set.
        adapters: name → PEFT directory.
        adapters_dirs: directories whose PEFT directories are served under their own names.
        aliases: a name → an adapter, a mixture, or the base's name.
        gates: name → directory of a gate (``lorchestra gate fit``), whose adapters are served too.
        auto: there is a model ``auto``, which chooses for each prompt among the adapters that its key may use.
        auto_top_k: adapters of an answer of ``auto``, at most.
        auto_gate: a gate of ``gates`` that has the last word where ``auto`` finds one of its members.
        registry: URL of a registry whose names are served too; ``LORCHESTRA_REGISTRY`` unless set, empty for none.
        registry_cache: where its versions are kept on this machine; under ``LORCHESTRA_HOME`` unless set.
        registry_cache_size: what they may take there, as in ``20GB``; ``null`` for no bound.
        registry_grace: how long they are served while the registry is away, as in ``1h``; then they are refused.
        engine: ``embedded``: our own; ``vllm``: by vLLM's servers; ``auto``: vLLM where it and CUDA are there.
        engine_process: the embedded engine has a process of its own, beside the server's.
        vllm_urls: of vLLM servers that run already; one is started here unless set.
        vllm_python: the Python of the environment that vLLM is installed in; this one unless set.
        vllm_arguments: further ones for a vLLM that is started here, as it spells them.
        vllm_adapters: a directory where adapters are written for it, seen by its servers under the same path; a
            temporary one unless set.
        device: as everywhere.
        dtype: of the base.
        max_batch: sequences at a time; the engine's own default unless set.
        max_length: positions of a sequence, prompt and answer; the base's own unless set.
        memory: for adapters, as in ``4GB``; the engine's own default unless set.
        cache: of keys and values, as in ``4GB``; the engine's own default unless set.
        kernel: compile the embedded engine's kernel for a CPU, and use it.
        host: to listen at.
        port: to listen at.
        ssl_certfile: certificate chain (PEM); with it, TLS.
        ssl_keyfile: its private key, where it is not in the same file.
        max_body: of a request, as in ``8MB``.
        body_seconds: in which a request has to be here.
        cors_origins: pages of these may call from a browser; none unless set.
        keys: the file of API keys.
        insecure_no_keys: listen beyond this machine without keys.
        enable_load: operators may load and unload adapters.
        lora_roots: from directories under these.
        max_mixture: members of a mixture.
        queue_per_tenant: requests of one tenant that may wait.
        queue: requests that may wait in all.
        grace: seconds for what runs when the server is asked to stop.
        console: the page at ``/console``; with keys and on this machine alone it is there unless unset.
        request_log: a file, ``-`` for standard output, empty for none.
        log_prompts: log prompts and answers too.
        metrics_adapters: adapters with series of their own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    base: str | None = None
    name: str | None = None
    adapters: dict[str, str] = Field(default_factory=dict)
    adapters_dirs: list[str] = Field(default_factory=list)
    aliases: dict[str, str] = Field(default_factory=dict)
    gates: dict[str, str] = Field(default_factory=dict)
    auto: bool = False
    auto_top_k: Annotated[int, Field(ge=1, le=64)] = 1
    auto_gate: str | None = None
    registry: str | None = None
    registry_cache: str | None = None
    registry_cache_size: Size | None = "20GB"
    registry_grace: str = "1h"
    engine: Literal["auto", "embedded", "vllm"] = "auto"
    engine_process: bool = True
    vllm_urls: list[str] = Field(default_factory=list)
    vllm_python: str | None = None
    vllm_arguments: list[str] = Field(default_factory=list)
    vllm_adapters: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_batch: Positive | None = None
    max_length: Positive | None = None
    memory: Size | None = None
    cache: Size | None = None
    kernel: bool = False
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    max_body: Size = "8MB"
    body_seconds: Annotated[float, Field(gt=0, strict=False)] = 60.0
    cors_origins: list[Origin] = Field(default_factory=list)
    keys: str | None = None
    insecure_no_keys: bool = False
    enable_load: bool = False
    lora_roots: list[str] = Field(default_factory=list)
    max_mixture: Annotated[int, Field(ge=1, le=64)] = 8
    queue_per_tenant: Positive = 256
    queue: Positive = 1024
    grace: Annotated[float, Field(ge=0, strict=False)] = 30.0
    console: bool | None = None
    request_log: str = "-"
    log_prompts: bool = False
    metrics_adapters: Positive = 256

    @classmethod
    def load(cls, path: Path) -> ServeConfig:
        """Read a file.

        Raises:
            UserError: one message that lists what is wrong, with lines and nearest valid keys.
        """
        if not path.is_file():
            raise UserError(f"there is no configuration file {path}; docs/serving.md shows one")
        document = Document.read(path, "a server's configuration is a mapping (base:, adapters:, keys:)")
        try:
            return cls.model_validate(document.values)._beside(path)
        except ValidationError as error:
            raise UserError(document.listed(problems(error, cls))) from None

    def with_flags(self, flags: Mapping[str, Any]) -> ServeConfig:
        """With what the command line says; adapters, aliases and gates are added, everything else is replaced.

        Raises:
            UserError: a flag is out of bounds, or an adapter's name is taken.
        """
        given = {key: value for key, value in flags.items() if value is not None and value != []}
        for key in ("adapters", "aliases", "gates"):
            for name in given.get(key, {}).keys() & getattr(self, key).keys():
                raise UserError(f"{name!r} is in the configuration file and on the command line; keep one of them")
            given[key] = getattr(self, key) | given.get(key, {})
        try:
            return type(self).model_validate(self.model_dump() | given)
        except ValidationError as error:
            document = Document.of({})
            told = document.listed(problems(error, type(self))).replace("recipe: ", "")
            raise UserError(f"on the command line: {told}") from None

    def check(self) -> None:
        """What no single key can say.

        Raises:
            UserError: no base, half of TLS, loading without roots, a registry that is none, or an open server beyond
                this machine.
        """
        if not self.base:
            raise UserError("no base: name it (lorchestra serve BASE), or write base: into the configuration file")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise UserError("a TLS key without its certificate: give --ssl-certfile too")
        if self.enable_load and not self.lora_roots:
            raise UserError(
                "adapters may be loaded (--enable-load), but from nowhere: name the directories with --lora-root DIR"
            )
        if self.lora_roots and not self.enable_load:
            raise UserError("--lora-root says where adapters may be loaded from; it needs --enable-load")
        if self.auto_gate is not None and self.auto_gate not in self.gates:
            raise UserError(
                f"auto_gate is {self.auto_gate!r}, which is none of gates: {', '.join(self.gates) or 'none'}"
            )
        if self.auto_top_k > self.max_mixture:
            raise UserError(
                f"auto_top_k is {self.auto_top_k}, and at most max_mixture: {self.max_mixture} may be mixed"
            )
        if self.registry_url:
            Location.parse(self.registry_url)
        parse_duration(self.registry_grace)
        if not self.keys and not self.insecure_no_keys and not is_loopback(self.host):
            raise UserError(
                f"listening at {self.host} without API keys: whoever reaches this port could use every adapter, "
                "and load more. Make keys (`lorchestra serve keys add NAME`) and give --keys FILE; or, on a network "
                "where everybody may, say --insecure-no-keys"
            )

    @property
    def registry_url(self) -> str:
        """Of the registry that is followed; empty for none."""
        return os.environ.get(REGISTRY, "") if self.registry is None else self.registry

    @property
    def has_console(self) -> bool:
        """Whether there is the page at ``/console``: not by itself where anybody could come and change things."""
        return bool(self.keys) or is_loopback(self.host) if self.console is None else self.console

    def _beside(self, file: Path) -> ServeConfig:
        """Paths as seen from the working directory."""
        here = file.resolve().parent

        def beside(path: str) -> str:
            return str(here / Path(path).expanduser())

        changed: dict[str, Any] = {
            "adapters": {name: beside(path) for name, path in self.adapters.items()},
            "gates": {name: beside(path) for name, path in self.gates.items()},
            "adapters_dirs": [beside(path) for path in self.adapters_dirs],
            "lora_roots": [beside(path) for path in self.lora_roots],
        }
        for key in PATHS:
            if (path := getattr(self, key)) is not None:
                changed[key] = beside(path)
        if self.registry and local_path(self.registry) is not None and not self.registry.startswith("file:"):
            changed["registry"] = beside(self.registry)
        if self.request_log not in ("", "-"):
            changed["request_log"] = beside(self.request_log)
        if self.base and (here / Path(self.base).expanduser()).exists():
            changed["base"] = beside(self.base)
        return self.model_copy(update=changed)


def size_of(text: str) -> int:
    """Bytes of ``512MB`` or ``4GB``."""
    unit = {"MB": 1_000_000, "GB": 1_000_000_000}[text[-2:]]
    return int(float(text[:-2]) * unit)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: it may lead anywhere


def base_name(source: str) -> str:
    """What a base is called unless it is said: the last part of its source, without version, pin and ``.gguf``."""
    last = source.split("#sha256=")[0].removeprefix("hf:").rstrip("/").rpartition("/")[2]
    return last.partition("@")[0].removesuffix(".gguf") or "base"
