"""``Gate``: features of a prompt → coefficients over K adapters.

Axis letters: b prompts, n features, K members, G groups of layers, N prompts that the gate remembers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorchestra.adapter.digest import json_digest, tensor_bytes
from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError, UserError
from lorchestra.fusion.groups import is_group, matches
from lorchestra.gate.features import FeatureSpec
from lorchestra.registry.reference import check_name

Activation = Literal["softmax", "sigmoid", "linear"]
ACTIVATIONS: tuple[Activation, ...] = ("softmax", "sigmoid", "linear")
MOST_MEMBERS = 4096
LONGEST_NAME = 256
_MARKS = frozenset("=+,")  # of mixtures and lists of coefficients


@dataclass(frozen=True)
class AdapterId:
    """A member: the name that the gate knows it by, and its digest."""

    name: str
    digest: str


@dataclass(frozen=True)
class GateSpec:
    """Everything about a gate but its numbers.

    Args:
        name: under which it is asked for.
        adapters: its K members, in the order of the coefficients.
        base: whose states it reads.
        features: which of them.
        activation: ``softmax`` (not negative, sum 1), ``sigmoid`` (each between 0 and 1) or ``linear`` (any).
        groups: of layers (``layers.0-9``, ``layers.10``, ``other``), each with coefficients of its own; none: one for
            all modules.
        top_k: so many members act at most, the greatest by size; ``None``: all.
        none: with softmax the base competes as a member: its share of the sum is nobody's, and where it is the
            greatest of ``top_k`` = 1 no member acts.
        temperature: divides what is activated; above 1 coefficients draw together.
        hidden: units of a hidden layer; 0: a linear network.

    Raises:
        UserError: a member without a name or digest, or twice; a number out of range; a group of layers that is none;
            ``none`` without softmax; a temperature with ``linear``.
    """

    name: str
    adapters: tuple[AdapterId, ...]
    base: BaseId
    features: FeatureSpec = field(default_factory=FeatureSpec)
    activation: Activation = "softmax"
    groups: tuple[str, ...] = ()
    top_k: int | None = None
    none: bool = False
    temperature: float = 1.0
    hidden: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        names = self.members
        if not 1 <= len(names) <= MOST_MEMBERS or len(set(names)) != len(names):
            raise UserError(
                f"a gate has 1 to {MOST_MEMBERS} members of different names; got {', '.join(names) or 'none'}"
            )
        for adapter in self.adapters:
            good = (
                adapter.name.isprintable() and adapter.name == adapter.name.strip() and not set(adapter.name) & _MARKS
            )
            if not good or not 1 <= len(adapter.name) <= LONGEST_NAME:
                raise UserError(
                    f"{adapter.name[:60]!r} is no name for a gate's member: up to {LONGEST_NAME} printed characters, "
                    "without '=', '+' and ','"
                )
            if not adapter.digest:
                raise UserError(f"member {adapter.name!r} has no digest, by which it would be known again")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation {self.activation!r} is unknown; there are {', '.join(ACTIVATIONS)}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; at least 1 member acts (or leave it out: all do)")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature is {self.temperature}; expected a number above 0")
        if self.none and self.activation != "softmax":
            raise UserError(
                f"none belongs to softmax; coefficients of {self.activation} need no member that stands for the base, "
                "they can all be near 0"
            )
        if self.activation == "linear" and self.temperature != 1.0:
            raise UserError("a temperature belongs to softmax and sigmoid; linear coefficients are the network's own")
        if self.hidden < 0:
            raise UserError(f"hidden is {self.hidden} units; expected 0 (a linear network) or more")
        if len(set(self.groups)) != len(self.groups):
            raise UserError(f"groups of layers are named twice: {', '.join(self.groups)}")
        for group in self.groups:
            if not is_group(group):
                raise UserError(f"{group[:60]!r} is no group of layers; expected layers.0-9, layers.10 or other")

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the K members."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def outputs(self) -> int:
        """What the network computes for a prompt: for every group K numbers, one more with ``none``."""
        return max(1, len(self.groups)) * (len(self.adapters) + self.none)

    def group_of(self, paths: Sequence[str]) -> dict[str, int] | None:
        """Module path → the index of its group, as :meth:`lorchestra.bank.Bank.using_tensor` takes it.

        Raises:
            AdapterError: a path that is in no group.
        """
        if not self.groups:
            return None
        out = {}
        for path in paths:
            found = next((g for g, pattern in enumerate(self.groups) if matches(pattern, path)), None)
            if found is None:
                raise AdapterError(
                    f"module {path!r} is in none of gate {self.name!r}'s groups {', '.join(self.groups)}"
                )
            out[path] = found
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Known:
    """A training prompt that the gate remembers.

    Args:
        digest: of its token ids.
        domain: it was given in.
        text: the beginning of it, where that was asked to be kept; else empty.
    """

    digest: str
    domain: str = ""
    text: str = ""


@dataclass(frozen=True, eq=False)
class Memory:
    """Training prompts, to explain a choice by its neighbours.

    Args:
        vectors: ``[N, n]`` float16, standardised features of length 1.
        prompts: what they are of.
    """

    vectors: Tensor
    prompts: tuple[Known, ...]

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.prompts):
            raise UserError(f"a gate remembers {len(self.prompts)} prompts by {len(self.vectors)} vectors; one each")


@dataclass(frozen=True)
class Nearest:
    """A training prompt near a prompt.

    Args:
        index: among the training prompts.
        similarity: cosine of the standardised features.
        known: the prompt.
    """

    index: int
    similarity: float
    known: Known


class Gate(nn.Module):
    """A small network over standardised features.

    Coefficients are a function of the features alone. A gate that is new gives every member the same.

    Args:
        spec: what it is.
        mean: ``[n]`` of the features, subtracted from them.
        std: ``[n]`` by which they are divided then.
        seed: of the hidden layer's first weights.

    Raises:
        UserError: a mean or standard deviation of another shape, not finite, or not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: GateSpec, mean: Tensor, std: Tensor, seed: int = 0) -> None:
        super().__init__()
        if mean.ndim != 1 or mean.shape != std.shape or not bool(torch.isfinite(mean).all() & (std > 0).all()):
            raise UserError(
                f"features are standardised by a mean {tuple(mean.shape)} and a standard deviation {tuple(std.shape)}; "
                "expected two finite vectors of one length, the second above 0"
            )
        self.spec = spec
        self.memory: Memory | None = None
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("std", std.detach().float().clone())
        n, outputs = len(mean), spec.outputs
        self.first: nn.Linear | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if spec.hidden:
                self.first = nn.Linear(n, spec.hidden)
            self.last = nn.Linear(spec.hidden or n, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, 1 / len(spec.adapters) if spec.activation == "linear" else 0.0)

    @classmethod
    def load(cls, directory: str | Path, adapters: Mapping[str, str] | None = None, base: BaseId | None = None) -> Gate:
        """Read a gate; see :func:`lorchestra.gate.store.load`."""
        from lorchestra.gate.store import load

        return load(Path(directory), adapters, base)

    def save(self, directory: str | Path) -> Path:
        """Write it, whole or not at all; see :func:`lorchestra.gate.store.save`."""
        from lorchestra.gate.store import save

        return save(self, Path(directory))

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the K members, in the order of the coefficients."""
        return self.spec.members

    @property
    def size(self) -> int:
        """n, how many features it reads."""
        return len(self.mean)

    @property
    def digest(self) -> str:
        """``sha256:…`` of the specification and all numbers as they stand; what it remembers does not count."""
        numbers = {name: hashlib.sha256(tensor_bytes(value)).hexdigest() for name, value in self.state_dict().items()}
        return json_digest([self.spec.as_dict(), numbers])

    def forward(self, x: Tensor) -> Tensor:
        """``[b, G, K]``, or ``[b, G, K + 1]`` with the base last where it is a member: before temperature and
        activation. ``x`` is ``[b, n]``.

        Raises:
            UserError: another number of features, or NaN or infinity among them.
        """
        if x.ndim != 2 or x.shape[1] != self.size:
            raise UserError(f"features are {tuple(x.shape)}; gate {self.spec.name!r} reads [b, {self.size}]")
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"features hold NaN or infinity; gate {self.spec.name!r} makes no coefficients of them")
        z = self.standardised(x)
        if self.first is not None:
            z = torch.nn.functional.gelu(self.first(z))
        out: Tensor = self.last(z)
        return out.view(len(x), max(1, len(self.spec.groups)), -1)

    def standardised(self, x: Tensor) -> Tensor:
        """(x − mean) / std."""
        return (x.to(self.mean) - self.mean) / self.std

    def coefficients(self, x: Tensor, allowed: Tensor | None = None, top_k: bool = True) -> Tensor:
        """``[b, K]``, or ``[b, G, K]`` with groups of layers; differentiable.

        Args:
            x: ``[b, n]``.
            allowed: ``[K]`` or ``[b, K]`` bool: the others are no candidates at all, so their coefficient is 0 and of
                softmax those that are left share the sum. Where none is left all are 0: the base.
            top_k: keep only the specification's ``top_k`` greatest; of softmax they share the sum then.
        """
        K = len(self.spec.adapters)
        found = self(x) / self.spec.temperature
        open_ = torch.ones(len(x), 1, K, dtype=torch.bool, device=found.device)
        if allowed is not None:
            open_ = allowed.to(found.device).expand(len(x), K)[:, None]
        if self.spec.none:  # the base is always allowed
            open_ = torch.cat([open_, torch.ones_like(open_[..., :1])], dim=-1)
        open_ = open_.expand_as(found)
        if top_k and self.spec.top_k is not None:
            size = found.abs() if self.spec.activation == "linear" else found
            open_ = open_ & _greatest(size.masked_fill(~open_, -math.inf), self.spec.top_k)
        if self.spec.activation == "softmax":
            # Where nothing is open a softmax would be 0/0; such a row is 0 in the end.
            some = open_.any(dim=-1, keepdim=True)
            found = torch.softmax(found.masked_fill(~open_ & some, -math.inf), dim=-1)
        elif self.spec.activation == "sigmoid":
            found = torch.sigmoid(found)
        found = torch.where(open_, found, torch.zeros_like(found))[..., :K]
        return found if self.spec.groups else found[:, 0]

    def remember(self, x: Tensor, prompts: Sequence[Known]) -> None:
        """Keep training prompts for :meth:`explain`; ``x`` ``[N, n]`` are their features."""
        self.memory = Memory(self._unit(x).half(), tuple(prompts))

    def explain(self, x: Tensor, count: int = 3) -> list[tuple[Nearest, ...]]:
        """For each row of ``x`` ``[b, n]`` the training prompts with the likest features, nearest first.

        Nothing where the gate remembers none.
        """
        memory = self.memory
        if memory is None or not memory.prompts:
            return [()] * len(x)
        likeness = self._unit(x) @ memory.vectors.float().T
        values, places = likeness.topk(min(count, len(memory.prompts)), dim=1)
        return [
            tuple(Nearest(i, value, memory.prompts[i]) for value, i in zip(row, indices, strict=True))
            for row, indices in zip(values.tolist(), places.tolist(), strict=True)
        ]

    @torch.no_grad()
    def _unit(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.standardised(x), dim=1)

    def named_coefficients(self, x: Tensor, allowed: Tensor | None = None) -> list[Mapping[str, float]]:
        """For each prompt: member → coefficient, those that act; with groups of layers their mean."""
        with torch.no_grad():
            found = self.coefficients(x, allowed)
        rows = (found.mean(dim=1) if self.spec.groups else found).tolist()
        return [{name: c for name, c in zip(self.members, row, strict=True) if c} for row in rows]


def _greatest(values: Tensor, k: int) -> Tensor:
    """Bool in the shape of ``values``: the k greatest along the last axis; of equal ones the first."""
    order = values.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, True)
