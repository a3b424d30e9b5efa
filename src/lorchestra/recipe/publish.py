"""``deliver.publish``, looked at before anything is fetched: what a registry would refuse after hours of training."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from lorchestra.errors import UserError
from lorchestra.recipe.sources import variable_problem
from lorchestra.recipe.words import Problem, near

if TYPE_CHECKING:
    from lorchestra.recipe.recipe import Recipe
    from lorchestra.recipe.sections import Publish

# What the sealed test measures, as a registry knows it; of one domain it is clinic.loss.
MEASURED = (
    "loss", "loss_ratio", "accuracy", "accuracy_normalised", "preference_accuracy", "preference_accuracy_normalised",
)  # fmt: skip
_VARIABLE = re.compile(r"\$\{[^}]*\}")


def publish_problems(recipe: Recipe) -> Iterable[Problem]:
    """What is wrong with ``deliver.publish`` by itself; places are those inside it."""
    publish = recipe.deliver.publish
    if publish is not None:
        yield from _registry(publish)
        yield from _names(recipe, publish)
        yield from _gates(recipe, publish)


def published_name(recipe: Recipe) -> str:
    """What the fused adapter is called in the registry."""
    publish = recipe.deliver.publish
    return (publish.name if publish else "") or recipe.name


def holds_password(text: str) -> bool:
    """Whether a URL, as it is written, has a password in it; one that ``${NAME}`` stands for is not in it."""
    from lorchestra.registry.location import masked

    plain = _VARIABLE.sub("***", text)
    return any(masked(form) != form for form in (plain, unquote(plain)))


def _registry(publish: Publish) -> Iterable[Problem]:
    if not publish.registry.strip():
        yield ("registry",), "is empty; give a directory, a URL, or ${LORCHESTRA_REGISTRY}"
    elif problem := variable_problem(publish.registry):
        yield ("registry",), problem
    elif holds_password(publish.registry):
        yield (
            ("registry",),
            "holds a password, and a recipe is copied into its report; write registry: ${LORCHESTRA_REGISTRY} and set "
            "that variable",
        )


def _names(recipe: Recipe, publish: Publish) -> Iterable[Problem]:
    from lorchestra.registry.reference import Reference, check_name

    name = published_name(recipe)
    try:
        check_name(name)
        for stage in recipe.stages if publish.stages else ():
            check_name(f"{name}-{stage.name}")
    except UserError as error:
        yield ("name",), str(error)
        return
    try:
        if publish.alias and not Reference(name, publish.alias).alias:
            yield ("alias",), f"{publish.alias!r} is a version or a digest; an alias is a word, as in staging"
    except UserError:
        yield (
            ("alias",),
            f"{publish.alias[:60]!r} is no alias; it is a word of small letters, digits, '_' and '-', as in staging",
        )


def _gates(recipe: Recipe, publish: Publish) -> Iterable[Problem]:
    """Gates that cannot be read, that guard nothing, or that ask for what this recipe never measures."""
    if not publish.gates:
        return
    from lorchestra.registry.gates import parse_gate

    if not publish.alias:
        yield ("gates",), "there is no alias for them to guard; add one, as in alias: staging, or leave them out"
    domains = [*(stage.name for stage in recipe.stages), *recipe.evaluate.domains]
    for text in publish.gates:
        try:
            metric = getattr(parse_gate(text), "metric", "")
        except UserError as error:
            yield ("gates",), str(error)
            continue
        if metric and recipe.split.test == 0:
            yield ("gates",), f"{text}: split.test is 0, so nothing is measured on a sealed test"
        elif metric and (problem := _unmeasured(metric, domains)):
            yield ("gates",), f"{text}: {problem}"


def _unmeasured(metric: str, domains: list[str]) -> str:
    domain, dot, measure = metric.rpartition(".")
    if measure in MEASURED and (not dot or domain in domains):
        return ""
    known = [*MEASURED, *(f"{name}.{measure}" for name in domains for measure in MEASURED)]
    return (
        f"a run measures no {metric!r}{near(metric, known)}; there are {', '.join(MEASURED)}, and each of a domain, as "
        f"in {domains[-1]}.loss"
    )
