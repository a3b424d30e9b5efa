"""Publishing: what a run made is pushed to a registry under a name, with all that is known of it.

The same adapter, with the same figures and lineage, is the version that is there already: a run that is run again
publishes nothing twice, and one that was killed while it published goes on. An alias is moved to a version once: if it
was moved away since, somebody had a reason, and a run that is run again leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.errors import UserError
from lorchestra.events import Reporter
from lorchestra.recipe.publish import published_name
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Publish
from lorchestra.recipe.sources import expand
from lorchestra.recipe.unexpanded import as_written
from lorchestra.registry.mistakes import PromotionRefused, TakenError

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Version

KEPT = "Everything that was made is kept in {}; the same command reuses it and goes on from here"
_NOTHING = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Published:
    """What was published.

    Args:
        reference: of the version, ``clinic@v3``.
        alias: ``clinic@staging`` if that leads to it now; empty otherwise.
        stages: references of the stages' adapters, if they were asked for.
    """

    reference: str
    alias: str
    stages: tuple[str, ...]


def recorded(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a registry keeps it: overrides applied, ``${NAME}`` not filled in, nothing settled.

    Where it is published to is left out: it has no part in what comes of it.
    """
    values: dict[str, Any] = recipe.model_dump(mode="json")
    del values["deliver"]["publish"]
    return values


def destination(recipe: Recipe) -> str:
    """``clinic to ${LORCHESTRA_REGISTRY}; clinic@staging if loss<=1.2``: what would be published, as it is written."""
    asked, name = _wanted(recipe), published_name(recipe)
    gates = f" if {', '.join(asked.gates)}" if asked.gates else ""
    return f"{name} to {asked.registry}" + (f"; {name}@{asked.alias}{gates}" if asked.alias else "")


def open_registry(recipe: Recipe) -> Registry:
    """The registry that ``recipe`` publishes to; a relative path is relative to the recipe.

    Raises:
        UserError: it is not named, or not there.
        RegistryError: it cannot be reached.
    """
    from lorchestra.registry.location import local_path
    from lorchestra.registry.registry import Registry

    url = expand(_wanted(recipe).registry)
    if local_path(url) is not None and not url.lower().startswith("file:"):
        url = str(recipe.directory / Path(url).expanduser())
    return Registry.open(url)


@as_written
def check_publish(recipe: Recipe, names: Sequence[str] = ()) -> None:
    """Whether the recipe can be published, as far as it can be told before anything is trained. Nothing is changed.

    Args:
        recipe: it need not publish at all.
        names: what is pushed, instead of the recipe's one name.

    Raises:
        RecipeError: there is no such registry, or a name or tag is none; with the line.
        RegistryError: the catalog or the store cannot be reached.
    """
    if recipe.deliver.publish is None:
        return
    from lorchestra.registry.pushing import Wanted
    from lorchestra.registry.reference import check_name

    asked, place = recipe.deliver.publish, "name"
    called = names or [published_name(recipe)]
    try:
        for name in called:
            check_name(name)
        place = "tags"
        for name in called:
            Wanted(name, asked.note, asked.tags, {}, {}, None, asked.alias, "").check()
        place = "registry"
        with open_registry(recipe) as registry:
            registry.blobs.has(_NOTHING)
    except UserError as error:
        recipe.refuse([(("deliver", "publish", place), str(error))])


@as_written
def publish(
    recipe: Recipe,
    adapter: Path,
    stages: Mapping[str, Path],
    reporter: Reporter,
    *,
    name: str = "",
    told: Mapping[str, Any] | None = None,
) -> Published:
    """Push an adapter, and its stages before it; move the alias if the gates let it through.

    Args:
        recipe: as written.
        adapter: a directory.
        stages: stage → directory; pushed as ``<name>-<stage>`` if the recipe asks for stages.
        reporter: progress.
        name: of the adapter; the recipe's by default.
        told: the recipe to record; this one by default.

    Raises:
        RegistryError: the catalog or the store cannot be reached, or is full.
        PromotionRefused: a gate refused it; it is pushed, and the alias where it was.
        RevokedError: these very files were revoked.
    """
    from lorchestra.registry.changing import check_ready

    asked, name = _wanted(recipe), name or published_name(recipe)
    told = recorded(recipe) if told is None else told
    why = f"a run of the recipe {recipe.name}"
    with open_registry(recipe) as registry, reporter.task(f"publish {name}"):
        found = push_stages(registry, recipe, name, stages) if asked.stages else ()
        version = push_once(registry, adapter, name, reporter, note=asked.note, tags=asked.tags, recipe=told, why=why)
        check_ready(version)
        alias = _moved(registry, version, asked, why, reporter) if asked.alias else ""
    leads = f"; {alias} leads to it" if alias else ""
    reporter.say(f"published: {version.reference} in {asked.registry}{leads}")
    reporter.event("published", reference=version.reference, digest=version.manifest.digest, alias=alias)
    return Published(version.reference, alias, found)


def push_stages(registry: Registry, recipe: Recipe, name: str, stages: Mapping[str, Path]) -> tuple[str, ...]:
    """Push stages as ``<name>-<stage>``, so that the lineage of what they are fused into leads somewhere."""
    told, why = recorded(recipe), f"a stage of the recipe {recipe.name}"
    return tuple(
        registry.push(directory, f"{name}-{stage}", recipe=told, why=why).reference
        for stage, directory in stages.items()
    )


def push_once(
    registry: Registry,
    adapter: Path,
    name: str,
    reporter: Reporter,
    *,
    note: str,
    tags: Sequence[str],
    recipe: Mapping[str, Any],
    why: str,
) -> Version:
    """Push; where these very files are there already with another note or other tags, that is said and they stay."""
    try:
        return registry.push(adapter, name, note=note, tags=tags, recipe=recipe, why=why)
    except TakenError:
        there = registry.push(adapter, name)
        reporter.say(
            f"note: these very files are {there.reference} already, and a version never changes: it keeps its note "
            "and tags"
        )
        return there


def _moved(registry: Registry, version: Version, asked: Publish, why: str, reporter: Reporter) -> str:
    """``clinic@staging``, if it leads to the version now."""
    from lorchestra.registry.gates import parse_gate
    from lorchestra.registry.sql.audit import MOVES

    name, alias = version.manifest.name, asked.alias
    now = next((state.version for state in registry.aliases(name) if state.alias == alias), None)
    if now is not None and now.id == version.id:
        return f"{name}@{alias}"
    before = [entry for entry in registry.history(name, alias) if entry.action in MOVES]
    if any(entry.after == version.reference for entry in before):
        to = f"to {now.reference}" if now else "away"
        reporter.say(
            f"note: {name}@{alias} led to {version.reference} before and was moved {to} by {before[0].actor}; it is "
            f"left there. `lorchestra registry promote {version.reference} --to {alias}` moves it"
        )
        return ""
    try:
        if asked.gates:
            registry.promote(version.reference, alias, [parse_gate(text) for text in asked.gates], why)
        else:
            registry.alias(name, alias, version.reference, why)
    except PromotionRefused as error:
        error.args = (f"{version.reference} is published. {error}", *error.args[1:])
        raise
    return f"{name}@{alias}"


def _wanted(recipe: Recipe) -> Publish:
    asked = recipe.deliver.publish
    if asked is None:
        raise UserError(f"the recipe {recipe.name} publishes nothing; add deliver: {{publish: {{name: …}}}}")
    return asked
