"""Where an adapter came from, and which base it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Parent:
    """An adapter that this one was made from or trained beside, with its coefficient."""

    name: str
    digest: str
    coefficient: float


@dataclass(frozen=True)
class Lineage:
    """How an adapter came to be. Every field is plain JSON.

    ``made_by`` is ``"stage"``, ``"fusion"`` or ``"foreign"`` (another tool's directory).
    ``parents`` are the members of a fusion. ``context`` are the adapters that were active while a stage
    trained, at the *final* weights of their schedules: with this adapter at 1 they are its *stack*.
    """

    made_by: str = "foreign"
    name: str = ""
    task: str = ""
    parents: tuple[Parent, ...] = ()
    context: tuple[Parent, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseId:
    """Which base an adapter belongs to: a name for people, digests for the check.

    ``weights``, ``tokenizer`` and ``template`` are ``sha256:…`` or empty where unknown.
    """

    name: str = ""
    weights: str = ""
    tokenizer: str = ""
    template: str = ""
