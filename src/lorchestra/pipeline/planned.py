"""What a plan is: its steps, and the sums over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorchestra.pipeline.costs import Outlook
from lorchestra.pipeline.estimate import Machine
from lorchestra.recipe.suggestions import Suggestion

State = Literal["here", "to fetch", "each run", "cached", "begun", "to do"]


@dataclass(frozen=True)
class PlannedStep:
    """One node of the plan.

    Args:
        name: of the step; of a stage's data, ``data:<stage>``.
        kind: ``source``, ``data``, ``stage``, ``search``, ``fuse``, ``merge``, ``evaluate``, ``gate``, ``judge`` (of a
            gate) or ``publish``.
        needs: names of the steps it waits for.
        state: ``here`` or ``to fetch`` (a source), ``each run`` (data, publishing), ``cached``, ``begun`` (goes on from
            a checkpoint) or ``to do``.
        note: what is to be fetched, how far a begun step is, or what is published where.
        digest: of the step; empty where it depends on an unfinished one.
        outlook: of a stage.
        seconds: still to spend, estimated; of a cached stage 0; ``None`` if it cannot be said.
        memory: bytes at its peak, estimated.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    state: State
    note: str = ""
    digest: str = ""
    outlook: Outlook | None = None
    seconds: float | None = None
    memory: float | None = None

    @property
    def finished(self) -> bool:
        """Nothing is left to do but to read it."""
        return self.state in ("here", "each run", "cached")


@dataclass(frozen=True)
class Plan:
    """The whole of it.

    Args:
        recipe: its name.
        base: as written in the recipe.
        parameters: of the base; ``None`` until it is here.
        device: where the steps will run.
        dtype: of the base there.
        steps: in the order of execution.
        machine: measured rates; ``None`` if there was nothing to estimate.
        seconds: Σ over the steps, estimated; ``None`` while something is to be fetched.
        memory: the largest of the steps'.
        notes: how the estimates were made, and what should be looked at.
        suggestions: stage → what its examples settle, and the advice on how to judge with so many; empty while
            something is to be fetched.
    """

    recipe: str
    base: str
    parameters: int | None
    device: str
    dtype: str
    steps: tuple[PlannedStep, ...]
    machine: Machine | None
    seconds: float | None
    memory: float | None
    notes: tuple[str, ...]
    suggestions: Mapping[str, tuple[Suggestion, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def step(self, name: str) -> PlannedStep:
        """The step called ``name``."""
        return next(step for step in self.steps if step.name == name)
