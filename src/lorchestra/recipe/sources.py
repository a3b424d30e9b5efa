"""The sources that a recipe names, looked at before anything is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorchestra.base.locate import NotHereError, locate
from lorchestra.base.source import parse_source
from lorchestra.errors import DataError, RecipeError, SourceError
from lorchestra.recipe.words import near

if TYPE_CHECKING:
    from lorchestra.recipe.sections import DataEntry

ENVIRONMENT = ("HF_ENDPOINT", "HOME", "USER")
SHORT = 4  # characters; a value as short is looked for as a word of its own
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
# A name like a/b is a hub's, unless it ends as a file does.
_FILES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".gguf", ".gz", ".txt", ".safetensors")


def source_problem(text: str, directory: Path, entry: DataEntry | None, task: Literal["sft", "dpo"]) -> str:
    """What is wrong with a source as far as can be said here; empty if nothing.

    Args:
        text: as in the recipe.
        directory: what relative paths are relative to.
        entry: how it is read, if it is data.
        task: of the stage that reads it.
    """
    from lorchestra.data.load import check_spec

    try:
        body = expand(text)
        path = directory / Path(body.split("#sha256=")[0]).expanduser()
        file = path.suffix.lower() in _FILES and not body.startswith(("hf:", "pip:"))
        source = parse_source(body, is_path=path.exists() or file)
        if source.kind == "path":
            locate(source, relative_to=directory)
        if entry is not None:
            check_spec(entry.spec(), task)
    except (RecipeError, SourceError, DataError) as error:
        return masking([text])(str(error))
    return ""


def expand(text: str) -> str:
    """``${NAME}`` filled in from the environment, for allowed names only; the recipe itself keeps it unexpanded.

    Raises:
        RecipeError: another name, or one that is not set.
    """

    def value(found: re.Match[str]) -> str:
        if problem := variable_problem(found[0]):
            raise RecipeError(problem)
        if found[1] not in os.environ:
            raise RecipeError(f"the environment variable {found[1]} is not set, which {text!r} needs")
        return os.environ[found[1]]

    return _VARIABLE.sub(value, text)


def is_here(text: str, directory: Path, kind: Literal["model", "dataset"]) -> bool:
    """Whether a source can be read without fetching anything.

    Args:
        text: as in the recipe.
        directory: what relative paths are relative to.
        kind: what it would be at a hub.
    """
    try:
        locate(expand(text), relative_to=directory, repo_type=kind, fetch=False)
    except NotHereError:
        return False
    return True


def variable_problem(text: str) -> str:
    """What is wrong with the names in ``${…}``, whatever their values; empty if nothing."""
    for name in _VARIABLE.findall(text):
        if name not in ENVIRONMENT and not re.match(r"^LORCHESTRA_[A-Z0-9_]+$", name):
            return (
                f"${{{name}}} may not be used here: a recipe sees {', '.join(ENVIRONMENT)} and names that begin with "
                f"LORCHESTRA_{near(name, ENVIRONMENT, cutoff=0.7)}"
            )
    return ""


def masking(texts: Iterable[str]) -> Callable[[str], str]:
    """A function that puts ``${NAME}`` back where the value of a variable stands that one of ``texts`` names.

    A value that is a path is also known by what it resolves to.
    """
    names: dict[str, str] = {}
    for name in _VARIABLE.findall("\n".join(texts)):
        if value := os.environ.get(name, ""):
            resolved = str(Path(value).expanduser().resolve()) if os.sep in value else value
            names |= {shape: f"${{{name}}}" for shape in (value, value.rstrip("/"), resolved) if shape not in ("", "/")}
    if not names:
        return lambda text: text
    longest = sorted(names, key=len, reverse=True)
    pattern = re.compile(
        "|".join(re.escape(v) if len(v) >= SHORT else rf"(?<!\w){re.escape(v)}(?!\w)" for v in longest)
    )
    return lambda text: pattern.sub(lambda found: names[found[0]], text)
