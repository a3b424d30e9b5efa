"""``model: <gate>`` and ``model: auto``: the prompt chooses the adapters, and the answer is that of their mixture.

What chooses sees a key's own adapters alone: those that it may not use are no candidates, as if they were not there, so
neither answers, nor headers, nor the coefficients of its own adapters tell of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorchestra.errors import AdapterError, UserError
from lorchestra.gate.features import FeatureSpec
from lorchestra.gate.network import Gate
from lorchestra.gate.prototypes import FEATURES
from lorchestra.gate.store import load
from lorchestra.registry.access import Key
from lorchestra.registry.reference import Reference
from lorchestra.serve.engine import Choice, Engine, Served, Target
from lorchestra.serve.ports import Card
from lorchestra.serve.routing import Router, unknown
from lorchestra.serve.versions import ColdError

if TYPE_CHECKING:
    from lorchestra.adapter.lineage import BaseId
    from lorchestra.serve.auto import Auto
    from lorchestra.serve.wire import ChatRequest, CompletionRequest

AUTO = "auto"
DIGITS = 6  # of a coefficient after the point: what is told is what is computed with
NEAREST = 3  # training prompts that explain a choice
Members = Sequence[tuple[Reference, float]]


@dataclass(frozen=True)
class _Mix:
    """What a prompt gets; arguments as of :class:`~lorchestra.serve.engine.Target`."""

    members: Members = ()
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def told(self, gate: str, nearest: tuple[Mapping[str, Any], ...]) -> Choice:
        names = [_called(reference) for reference, _ in self.members]
        layers = {
            group: {name: c for name, c in zip(names, found, strict=True) if c} for group, found in self.layers.items()
        }
        return Choice(gate, dict(zip(names, (c for _, c in self.members), strict=True)), nearest, layers)


def _called(reference: Reference) -> str:
    """A member's name; of one that the registry has under another name, the version."""
    return reference.name if reference.version is None else str(reference)


def read_gate(name: str, directory: Path, base: BaseId, most: int) -> Gate:
    """A gate that can be served.

    Args:
        name: that it is to have here.
        directory: of the gate.
        base: of this server.
        most: members that may answer together.

    Raises:
        UserError: it is of another base, damaged, or mixes more adapters than may answer together.
    """
    gate = load(directory, None, base)
    spec = gate.spec
    groups = max(1, len(spec.groups))
    together = min(len(spec.adapters), groups * (spec.top_k or len(spec.adapters)))
    if together > most:
        each = f" ({spec.top_k} in each of {groups} groups of layers)" if spec.top_k and groups > 1 else ""
        fewer = f"fit it with --top-k {most // groups}" if most >= groups else "fit it with fewer --groups"
        raise UserError(
            f"gate {name!r} mixes up to {together} adapters for an answer{each}, and at most {most} may be here; "
            f"{fewer}, or set max_mixture: {together} in the configuration file"
        )
    for member in spec.adapters:
        Reference(member.name, member.digest)
    return gate


class Choosing:
    """The gates of a server, and ``auto``. It belongs to one event loop.

    Args:
        router: names the members.
        engine: sees prompts.
        gates: by the names that requests call them.
        auto: what ``model: auto`` asks; ``None``: there is no such model.
        above: name of a gate that has the last word of ``auto`` where it finds one of the gate's members; empty: none.

    Raises:
        UserError: a gate was fitted on an adapter that is neither here nor in the registry, or not with these weights;
            no gate is ``above``.
    """

    def __init__(
        self,
        router: Router,
        engine: Engine,
        gates: Mapping[str, Gate] | None = None,
        auto: Auto | None = None,
        above: str = "",
    ) -> None:
        self._router, self._engine, self._gates, self._auto = router, engine, dict(gates or {}), auto
        self._above = above
        if above and above not in self._gates:
            raise UserError(f"auto_gate is {above!r}, and there are the gates {', '.join(self._gates) or 'none'}")
        self._members = {
            name: tuple(Reference(member.name, member.digest) for member in gate.spec.adapters)
            for name, gate in self._gates.items()
        }
        for name, members in self._members.items():
            for member in members:
                if not router.places(member):
                    there = " and not in the registry" if router.versions else ""
                    raise UserError(
                        f"gate {name!r} was fitted on {member.name!r} with digest {member.digest[:23]}…, which is not "
                        f"here{there}; serve that adapter as --adapter {member.name}=DIR, or fit the gate again"
                    )

    def has(self, model: str) -> bool:
        """Whether ``model`` is the name of something that chooses."""
        return model in self._gates or (model == AUTO and self._auto is not None)

    async def target(self, key: Key, body: CompletionRequest | ChatRequest) -> Target:
        """Who answers ``body`` for ``key``: the mixture that its prompt gets, or the base where it gets none.

        Raises:
            UnknownModelError: ``key`` may use none of the gate's members, or none is here any more.
            RequestError: several prompts at once.
            StoppingError, AdapterError: as :meth:`lorchestra.serve.routing.Router.resolve`.
        """
        gate = self._gates.get(body.model)
        if gate is not None and not any(self._places(body.model, key)):
            raise unknown(body.model)
        x = await self._seen(body, FEATURES if gate is None else gate.spec.features)
        while True:
            mix = await self._routed(key, body, x) if gate is None else self._mixed(body.model, gate, key, x)
            try:
                target = self._router.mixed(key, body.model, mix.members, body.user or "")
            except ColdError as cold:
                assert self._router.versions is not None  # it says so
                with suppress(AdapterError):  # it cannot be served here, and is no candidate from now on
                    await self._router.versions.prepare(cold.line)
                continue
            choice = mix.told(body.model, self._nearest(body.model, key, x))
            return replace(target, layers=mix.layers, choice=choice)

    def cards(self, key: Key) -> Sequence[Card]:
        """What ``key`` may ask: gates with a member that it may use, and ``auto``."""
        router = self._router
        out = []
        for name in self._members:
            own = tuple(_called(place) for place in self._places(name, key) if place is not None)
            if own:
                out.append(Card(name, router.created, router.base, max_length=router.max_length, chooses=own))
        if self._auto is not None:
            own = tuple(sorted(router.present(key)))
            out.append(Card(AUTO, router.created, router.base, max_length=router.max_length, chooses=own))
        return out

    async def _seen(self, body: CompletionRequest | ChatRequest, spec: FeatureSpec) -> Tensor | None:
        """``[1, n]``; nothing of a prompt without text."""
        seen = await self._engine.features(body, spec.layers, spec.last)
        return torch.tensor([seen], dtype=torch.float32) if seen else None

    async def _routed(self, key: Key, body: CompletionRequest | ChatRequest, x: Tensor | None) -> _Mix:
        """Of ``auto``. What is revoked while a router is made is no candidate of the next."""
        assert self._auto is not None  # has(model)
        while x is not None:
            present = self._router.present(key)
            router = await self._auto.router(present)
            members = [(Reference(name), round(c, DIGITS)) for name, c in self._auto.routed(router, x[0])]
            if self._router.present(key).keys() >= {member.name for member, _ in members}:
                break
        else:
            return _Mix()
        gate = self._gates.get(self._above)
        if gate is None or not members or not self._is_member(self._above, members[0][0], present):
            return _Mix(members)
        return self._mixed(self._above, gate, key, await self._seen(body, gate.spec.features))

    def _is_member(self, gate: str, reference: Reference, present: Mapping[str, Served]) -> bool:
        """Whether an adapter is one of the gate's, with the weights that it was fitted on."""
        digest = present[reference.name].digest
        return any(
            member.digest == digest and any(place.name == reference.name for place in self._router.places(member))
            for member in self._members[gate]
        )

    def _mixed(self, model: str, gate: Gate, key: Key, x: Tensor | None) -> _Mix:
        """Of a gate. Where its groups of layers get the same coefficients, they are those of the whole adapters."""
        places = self._places(model, key)
        allowed = [place is not None for place in places]
        if not any(allowed):
            raise unknown(model)
        if x is None:
            return _Mix()
        with torch.no_grad():
            found = gate.coefficients(x, torch.tensor(allowed))[0]
        if not bool(found.isfinite().all()):
            raise AdapterError(f"gate {model!r} makes no finite coefficients of this prompt; fit it again")
        rows = [[round(c, DIGITS) for c in row] for row in found.view(-1, len(allowed)).tolist()]  # a group each
        members, acting = [], []
        for k, place in enumerate(places):
            if place is not None and any(row[k] for row in rows):
                members.append((place, round(sum(row[k] for row in rows) / len(rows), DIGITS)))
                acting.append(k)
        if all(row == rows[0] for row in rows):
            return _Mix(members)
        layers = [tuple(row[k] for k in acting) for row in rows]
        return _Mix(members, dict(zip(gate.spec.groups, layers, strict=True)))

    def _places(self, model: str, key: Key) -> list[Reference | None]:
        """Under which reference ``key`` may use each of the gate's members; ``None``: it is no candidate."""
        usable = self._router.usable
        return [
            next((place for place in self._router.places(member) if usable(key, place)), None)
            for member in self._members[model]
        ]

    def _nearest(self, model: str, key: Key, x: Tensor | None) -> tuple[Mapping[str, Any], ...]:
        """Training prompts may be those of any member, so they are shown to those alone who may use all of them."""
        gate = self._gates.get(model)
        if gate is None or x is None:
            return ()
        for member in self._members[model]:
            if not any(key.may_use(place.name) for place in self._router.places(member) or (member,)):
                return ()
        told: list[Mapping[str, Any]] = []
        for one in gate.explain(x, NEAREST)[0]:
            shown: dict[str, Any] = {"similarity": round(one.similarity, 4), "digest": one.known.digest}
            if one.known.domain:
                shown["domain"] = one.known.domain
            if one.known.text:
                shown["text"] = one.known.text
            told.append(shown)
        return tuple(told)
