"""Adapters as vLLM can take them: checked against the base, scale folded, a mixture fused into one."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorchestra.adapter.digest import json_digest
from lorchestra.errors import AdapterError, UserError
from lorchestra.serve.engine import RequestError, Served, Target

if TYPE_CHECKING:
    from torch import nn

    from lorchestra.adapter.adapter import Adapter
    from lorchestra.adapter.lineage import BaseId

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Portable:
    """A directory that any engine applies as it was trained.

    Args:
        key: what vLLM calls it; never used for other weights.
        directory: ours, written once and never changed.
        members: the adapters that are in it, with their coefficients.
    """

    key: str
    directory: Path
    members: tuple[tuple[Served, float], ...]

    @property
    def single(self) -> Served | None:
        """The adapter that it is, if it is no mixture."""
        return self.members[0][0] if len(self.members) == 1 and self.members[0][1] == 1.0 else None


def target_key(target: Target) -> str | None:
    """What vLLM calls the adapter of ``target``; ``None`` for the base. A mixture is named by digests and weights."""
    members = _acting(target)
    if not members:
        return None
    if len(members) == 1 and members[0][1] == 1.0:
        return members[0][0].key
    mixed = sorted((served.digest, weight) for served, weight in members)
    return f"mixture@{json_digest(mixed).removeprefix('sha256:')[:32]}"


# An adapter that changes nothing. vLLM's LoRA kernels for a CPU (0.32) take "no adapter" for that of the last slot, so
# in a batch with adapters the base would answer as whichever is there.
NOTHING = "base@nothing"


class Workshop:
    """Writes portable directories under one root, by name.

    Args:
        base: directory of the base that vLLM serves.
        identity: of the base; adapters of another one are refused.
        root: where; vLLM must see it under the same path.
        max_rank: of vLLM's slots.
    """

    def __init__(self, base: Path, identity: BaseId, root: Path, max_rank: int) -> None:
        self.base, self.identity, self.root, self.max_rank = base, identity, root, max_rank
        self._skeleton: nn.Module | None = None
        self._one = threading.Lock()

    async def make(self, key: str, target: Target) -> Portable:
        """Write the adapter of ``target`` under ``key``.

        Raises:
            AdapterError: a member cannot be read, is not what its digest says, belongs to another base, fits no module
                or has too high a rank.
            RequestError: the weights of a mixture add up to nothing.
        """
        return await asyncio.to_thread(self._make, key, target)

    async def nothing(self) -> Portable:
        """Write the adapter that changes nothing, as :data:`NOTHING`."""
        return await asyncio.to_thread(self._nothing)

    async def remove(self, portable: Portable) -> None:
        """Delete what :meth:`make` wrote."""
        await asyncio.to_thread(shutil.rmtree, portable.directory, ignore_errors=True)

    def _make(self, key: str, target: Target) -> Portable:
        from lorchestra.fusion.methods import compress, linear

        members = _acting(target)
        adapters = {served.key: self._read(served) for served, _ in members}
        if len(members) == 1 and members[0][1] == 1.0:
            served, adapter = members[0][0], adapters[members[0][0].key]
            rank = _rank(adapter)
            if rank > self.max_rank:
                raise AdapterError(
                    f"adapter {served.name} has rank {rank}, vLLM's slots hold {self.max_rank}: start with a larger "
                    f"max_rank, or make it smaller (lorchestra export DIR -o OUT --rank {self.max_rank})"
                )
        else:
            try:
                adapter = linear(adapters, _weights(members), name=target.asked)
            except AdapterError:
                raise
            except UserError as error:
                raise RequestError(f"{target.asked}: {error}", "model") from error
            rank = _rank(adapter)
            if rank > self.max_rank:
                adapter, kept = compress(adapter, rank=self.max_rank)
                log.warning("%s (%s): rank %d → %d keeps %.4f of ‖ΔW‖²", target.asked, key, rank, self.max_rank, kept)
        directory = self.root / json_digest(key).removeprefix("sha256:")[:32]
        adapter.save(directory)
        return Portable(key, directory, tuple(members))

    def _nothing(self) -> Portable:
        import torch

        from lorchestra.adapter.adapter import Adapter
        from lorchestra.adapter.lowrank import LowRank
        from lorchestra.bank.mount import linear_shape

        with self._one:
            modules = dict(self._modules().named_modules())
        shapes = {path: linear_shape(module) for path, module in modules.items() if "layers." in path or "h." in path}
        path, (m, n) = next((path, shape) for path, shape in shapes.items() if shape is not None)
        directory = self.root / "nothing"
        Adapter({path: LowRank(torch.zeros(m, 1), torch.zeros(1, n))}).save(directory)
        return Portable(NOTHING, directory, ())

    def _read(self, served: Served) -> Adapter:
        """The adapter, checked: it is what its digest says, and it fits the base."""
        from lorchestra.adapter.adapter import Adapter
        from lorchestra.adapter.belonging import check_base

        adapter = Adapter.load(served.directory)
        if adapter.digest != served.digest:
            raise AdapterError(
                f"adapter {served.name}: {served.directory} holds other weights ({adapter.digest[:23]}…) than those it "
                f"was registered with ({served.digest[:23]}…); weights that changed need a new name or version"
            )
        if not served.sibling_of or served.sibling_of != adapter.base.weights:
            check_base({served.name: adapter}, self.identity)
        self._check_fits(served.name, adapter)
        return adapter

    def _check_fits(self, name: str, adapter: Adapter) -> None:
        """Every module is in the base, in its shape: what vLLM would leave out unsaid, and answer as the base."""
        from lorchestra.bank.mount import Bank

        with self._one:
            bank = Bank(self._modules())
            bank.load(name, adapter)
            bank.unmount()

    def _modules(self) -> nn.Module:
        if self._skeleton is None:
            self._skeleton = _without_weights(self.base)
        return self._skeleton


def _without_weights(base: Path) -> nn.Module:
    """The base's modules and shapes, on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return model


def _acting(target: Target) -> list[tuple[Served, float]]:
    return [(served, weight) for served, weight in target.members if weight != 0.0]


def _weights(members: list[tuple[Served, float]]) -> Mapping[str, float]:
    """Key → coefficient; a member named twice counts with its sum."""
    out: dict[str, float] = {}
    for served, weight in members:
        out[served.key] = out.get(served.key, 0.0) + weight
    return out


def _rank(adapter: Adapter) -> int:
    return max(update.rank for update in adapter.modules.values())
