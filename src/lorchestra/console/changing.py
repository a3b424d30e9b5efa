"""What the page may change: aliases, canaries, revocations. Each change has a reason and is in the audit log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lorchestra.console.guard import Asked, Route
from lorchestra.registry.registry import Registry
from lorchestra.registry.sql.catalog import PRODUCTION, AliasState, Catalog
from lorchestra.serve.engine import RequestError

if TYPE_CHECKING:
    from lorchestra.console.looking import Looking, Threads
    from lorchestra.registry.canary.watching import Rollout
    from lorchestra.serve.following import Follower

Text = Annotated[str, Field(min_length=1, max_length=512)]
Why = Annotated[str, Field(max_length=2000)]
Part = Annotated[float, Field(ge=0)]


class _Change(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    why: Why = ""


class OfVersion(_Change):
    """A change of a version."""

    reference: Text


class Promotion(OfVersion):
    """Let an alias lead to a version.

    Args:
        alias: of its name.
        gates: that it has to pass.
        force: though a gate refuses.
    """

    alias: Text = PRODUCTION
    gates: Annotated[list[Text], Field(max_length=20)] = Field(default_factory=list)
    force: bool = False


class OfAlias(_Change):
    """A change of an alias."""

    name: Text
    alias: Text = PRODUCTION


class Rollback(OfAlias):
    """Back to where an alias was; ``to`` a version, or the one before."""

    to: Annotated[str, Field(max_length=512)] = ""


class Promoted(OfAlias):
    """The end of a canary; ``force`` though a guard is broken."""

    force: bool = False


class Hold(OfAlias):
    """How long each step lasts: ``10m``."""

    hold: Text


class Start(OfAlias):
    """A canary. Shares and allowed differences are parts of 1; ``None`` leaves a guard out.

    Args:
        candidate: a reference.
        steps: shares of the users.
        hold: of each step: ``10m``.
        promote: the alias moves by itself at the end.
    """

    candidate: Text
    steps: Annotated[list[Part], Field(min_length=1, max_length=20)]
    hold: Text = "10m"
    promote: bool = False
    alpha: Part = 0.05
    max_error_increase: Part | None = 0.01
    max_latency_increase: Part | None = 0.25
    max_score_drop: Part | None = 0.05
    max_error_rate: Part | None = 0.5
    min_requests: Annotated[int, Field(ge=0, lt=10**9)] = 100


class Changing:
    """Routes that change a registry, for operators.

    Args:
        looking: knows the registry.
        follower: is told to look at once.
        threads: to change it in.
    """

    def __init__(self, looking: Looking, follower: Follower | None, threads: Threads) -> None:
        self._looking, self._follower, self._threads = looking, follower, threads

    @property
    def routes(self) -> list[Route]:
        """All of them."""
        found = {
            "promote": self._promote, "rollback": self._rollback, "revoke": self._revoke,
            "reinstate": self._reinstate, "canary/start": self._start, "canary/step": self._step,
            "canary/hold": self._hold, "canary/promote": self._finish, "canary/abort": self._abort,
        }  # fmt: skip
        return [Route("POST", f"/api/{name}", "operator", answer) for name, answer in found.items()]

    async def _promote(self, asked: Asked) -> Mapping[str, Any]:
        from lorchestra.registry.gates import parse_gate

        said = await asked.body(Promotion)
        gates = [parse_gate(gate) for gate in said.gates]
        return await self._change(
            asked, said, lambda held: _alias(held.promote(said.reference, said.alias, gates, said.why, said.force))
        )

    async def _rollback(self, asked: Asked) -> Mapping[str, Any]:
        said = await asked.body(Rollback)
        return await self._change(
            asked, said, lambda held: _alias(held.rollback(said.name, said.alias, said.why, said.to))
        )

    async def _revoke(self, asked: Asked) -> Mapping[str, Any]:
        said = await asked.body(OfVersion)
        return await self._change(asked, said, lambda held: {"state": held.revoke(said.reference, said.why).state})

    async def _reinstate(self, asked: Asked) -> Mapping[str, Any]:
        said = await asked.body(OfVersion)
        return await self._change(asked, said, lambda held: {"state": held.reinstate(said.reference, said.why).state})

    async def _start(self, asked: Asked) -> Mapping[str, Any]:
        from lorchestra.registry.canary.guards import Guards
        from lorchestra.registry.canary.plan import Plan, parse_duration
        from lorchestra.registry.canary.rollout import start

        said = await asked.body(Start)
        plan = Plan(tuple(said.steps), parse_duration(said.hold), said.promote)
        guards = Guards(
            said.alpha, said.max_error_increase, said.max_latency_increase, said.max_score_drop, said.max_error_rate,
            said.min_requests,
        )  # fmt: skip
        return await self._change(
            asked,
            said,
            lambda held: _canary(
                start(held, said.name, said.candidate, alias=said.alias, plan=plan, guards=guards, why=said.why)
            ),
        )

    async def _step(self, asked: Asked) -> Mapping[str, Any]:
        from lorchestra.registry.steering import step

        said = await asked.body(OfAlias)
        return await self._change(asked, said, lambda held: _canary(step(held, said.name, said.alias, why=said.why)))

    async def _hold(self, asked: Asked) -> Mapping[str, Any]:
        from lorchestra.registry.canary.plan import parse_duration
        from lorchestra.registry.steering import hold

        said = await asked.body(Hold)
        span = parse_duration(said.hold)
        return await self._change(
            asked, said, lambda held: _canary(hold(held, said.name, span, said.alias, why=said.why))
        )

    async def _finish(self, asked: Asked) -> Mapping[str, Any]:
        from lorchestra.registry.canary.rollout import promote

        said = await asked.body(Promoted)
        return await self._change(
            asked, said, lambda held: _alias(promote(held, said.name, said.alias, why=said.why, force=said.force))
        )

    async def _abort(self, asked: Asked) -> Mapping[str, Any]:
        from lorchestra.registry.canary.rollout import abort

        said = await asked.body(OfAlias)
        return await self._change(asked, said, lambda held: _canary(abort(held, said.name, said.alias, why=said.why)))

    async def _change(
        self, asked: Asked, said: _Change, work: Callable[[Registry], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """``work`` on the registry, in the name of who asks; then the server looks at it at once."""
        if not said.why.strip():
            raise RequestError("why: a change needs a reason, for the audit log and for whoever is on call next", "why")
        held = acting(self._looking.registry, asked.caller.tenant)
        found = await self._threads.run(lambda: work(held))
        if self._follower is not None:
            self._follower.look()
        return found


def acting(registry: Registry, actor: str) -> Registry:
    """``registry``, changed in the name of ``actor``; it has the same connections."""
    catalog = Catalog(registry.catalog.engine, registry.catalog.shown, actor)
    return Registry(registry.location, catalog, registry.blobs)


def _alias(state: AliasState) -> Mapping[str, Any]:
    return {"name": state.name, "alias": state.alias, "reference": state.version.reference}


def _canary(rollout: Rollout) -> Mapping[str, Any]:
    return {
        "name": rollout.name, "alias": rollout.alias, "state": rollout.state, "share": rollout.share,
        "step": rollout.step, "hold": rollout.plan.hold.total_seconds(),
    }  # fmt: skip
