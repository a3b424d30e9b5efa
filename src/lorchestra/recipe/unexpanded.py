"""``${NAME}`` stays ``${NAME}`` in all that is said and kept: what the environment holds may be nobody's business."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lorchestra.errors import LorchestraError
from lorchestra.events import Reporter, Task
from lorchestra.recipe.sources import masking

if TYPE_CHECKING:
    from lorchestra.recipe.recipe import Recipe

P = ParamSpec("P")
R = TypeVar("R")


def mask_of(recipe: Recipe) -> Callable[[str], str]:
    """:func:`masking` for all sources of a recipe, and for the registry that it publishes to."""
    publish = recipe.deliver.publish
    return masking([*(text for _, text, _, _ in recipe.sources()), *([publish.registry] if publish else [])])


def masked(mask: Callable[[str], str], value: Any) -> Any:
    """``value`` (plain data) with every text in it masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {masked(mask, key): masked(mask, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(mask, inner) for inner in value]
    return value


class Unexpanded:
    """A reporter that passes everything on masked."""

    def __init__(self, reporter: Reporter, mask: Callable[[str], str]) -> None:
        self.reporter, self.mask = reporter, mask

    def task(self, name: str, total: float | None = None, unit: str = "it") -> AbstractContextManager[Task]:
        task: AbstractContextManager[Task] = self.reporter.task(self.mask(name), total, unit)
        return task

    def event(self, kind: str, /, **fields: Any) -> None:
        self.reporter.event(kind, **masked(self.mask, fields))

    def say(self, text: str) -> None:
        self.reporter.say(self.mask(text))


def as_written(function: Callable[P, R]) -> Callable[P, R]:
    """For functions of a ``recipe`` (and a ``reporter``): what they say, and what goes wrong in them, is masked."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        mask = mask_of(given["recipe"])
        if "reporter" in given:
            given["reporter"] = Unexpanded(given["reporter"], mask)
        try:
            return function(**given)  # type: ignore[call-arg]
        except LorchestraError as error:
            error.args = tuple(masked(mask, error.args))
            raise

    return call
