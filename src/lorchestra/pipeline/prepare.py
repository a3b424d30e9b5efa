"""What a run stands on: the base on disk, the data loaded, split, rendered and checked, adapters brought in.

Nothing that can be known without training is left for later: modules to train are looked up, adapters are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.belonging import base_remarks, check_base
from lorchestra.adapter.digest import json_digest
from lorchestra.adapter.lineage import BaseId
from lorchestra.bank import Bank
from lorchestra.base.fingerprint import config_digest, fingerprint
from lorchestra.base.load import load_tokenizer, positions, prepare_base
from lorchestra.base.locate import SourceLock, locate, parse_source
from lorchestra.base.nf4 import NF4, refuse_quantised
from lorchestra.data.check import Check, StageData, check_data
from lorchestra.data.load import load_examples
from lorchestra.data.render import Rendered, Renderer
from lorchestra.data.split import SplitSpec, split
from lorchestra.errors import AdapterError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.fusion.search import heuristic
from lorchestra.pipeline.estimate import empty_model
from lorchestra.recipe.gate import deep_problems
from lorchestra.recipe.mistakes import targets_place
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import DataEntry
from lorchestra.recipe.sources import expand
from lorchestra.recipe.suggestions import StageExamples, Suggestion, settle
from lorchestra.recipe.unexpanded import as_written
from lorchestra.recipe.words import Problem
from lorchestra.train.lora import target_paths


@dataclass(frozen=True)
class Prepared:
    """Everything that steps read.

    Args:
        recipe: as written, and what it leaves open settled on its stages.
        directory: the base, a Hugging Face directory.
        base: its fingerprint.
        tokenizer: its tokenizer.
        renderer: with the recipe's ``max_length``, or as many positions as the base has, if these are fewer.
        data: stage or extra domain → its data.
        check: what was found in the data.
        adapters: brought in from outside, by name.
        suggestions: stage → what its examples settled, and the advice on how to judge with so many.
    """

    recipe: Recipe
    directory: Path
    base: BaseId
    tokenizer: Any
    renderer: Renderer
    data: Mapping[str, StageData]
    check: Check
    adapters: Mapping[str, Adapter]
    suggestions: Mapping[str, tuple[Suggestion, ...]]

    @cached_property
    def base_digest(self) -> str:
        """Of the function that the base computes: its weights and its configuration."""
        return json_digest([self.base.weights, config_digest(self.directory)])


@as_written
def prepare(recipe: Recipe, reporter: Reporter = SILENT, fetch: bool = True) -> Prepared:
    """Fetch, load, split, render and check; no weights are loaded.

    Raises:
        NotHereError: something would have to be fetched, and ``fetch`` is false.
        SourceError, DataError, AdapterError: what cannot be found, read or used.
        RecipeError: modules that the base does not have, adapters that do not fit it.
    """
    recipe.check_sources()
    where = recipe.directory
    source = expand(recipe.base)
    directory = prepare_base(source, relative_to=where, reporter=reporter, fetch=fetch)
    if recipe.dtype == NF4:
        refuse_quantised(directory)
    path = where / Path(source).expanduser()
    # Adapters record it, to find their base again; as it was written, where the environment has a part in it.
    name = str(path.resolve()) if path.exists() and source == recipe.base else recipe.base
    base = fingerprint(directory, name, reporter)
    lock = _lock(recipe, reporter, fetch)
    _pin(lock, recipe, recipe.base, base.weights)
    model = empty_model(directory)
    recipe.refuse([*_absent_modules(recipe, model), *_too_deep(recipe, model)])
    adapters = {}
    for key, text in recipe.adapters.items():
        adapters[key] = Adapter.load(locate(expand(text), relative_to=where, reporter=reporter, fetch=fetch))
        _pin(lock, recipe, text, adapters[key].digest)
    recipe.refuse(_misfits(recipe, model, base, adapters))
    for line in base_remarks(adapters, base):
        reporter.say(line)
    tokenizer = load_tokenizer(directory)
    longest = min(recipe.max_length, positions(model.config) or recipe.max_length)
    renderer = Renderer(tokenizer, longest, recipe.supervise)
    for note in renderer.notes:
        reporter.say(f"note: {note}")
    data, check = _examples(recipe, renderer, lock, reporter, fetch, {})
    settled, suggestions = settle(recipe, {stage.name: examples_of(data[stage.name]) for stage in recipe.stages})
    return Prepared(settled, directory, base, tokenizer, renderer, data, check, adapters, suggestions)


@as_written
def prepare_beside(recipe: Recipe, known: Prepared, reporter: Reporter = SILENT, fetch: bool = True) -> Prepared:
    """:func:`prepare` for a recipe that differs from the one of ``known`` in its stages alone.

    Base, tokenizer and adapters are taken over, and so are the data of stages that both have.

    Raises:
        NotHereError, SourceError, DataError, RecipeError: as :func:`prepare`.
    """
    recipe.check_sources()
    model = empty_model(known.directory)
    recipe.refuse([*_absent_modules(recipe, model), *_too_deep(recipe, model)])
    before = {stage.name: stage for stage in known.recipe.stages}
    same = {
        stage.name: known.data[stage.name]
        for stage in recipe.stages
        if stage.name in before and (stage.data, stage.task) == (before[stage.name].data, before[stage.name].task)
    }
    lock = _lock(recipe, reporter, fetch)
    data, check = _examples(recipe, known.renderer, lock, reporter, fetch, same)
    settled, suggestions = settle(recipe, {stage.name: examples_of(data[stage.name]) for stage in recipe.stages})
    return replace(known, recipe=settled, data=data, check=check, suggestions=suggestions)


def _examples(
    recipe: Recipe,
    renderer: Renderer,
    lock: SourceLock | None,
    reporter: Reporter,
    fetch: bool,
    known: Mapping[str, StageData],
) -> tuple[dict[str, StageData], Check]:
    """The data of stages and domains, but for those that are ``known``; and what was found in them together."""
    data = {
        stage.name: known.get(stage.name)
        or _stage_data(recipe, stage.name, stage.task, stage.data, renderer, lock, reporter, fetch)
        for stage in recipe.stages
    }
    for extra, entries in recipe.evaluate.domains.items():
        data[extra] = _stage_data(recipe, extra, "sft", entries, renderer, lock, reporter, fetch)
    domains = [data[name] for name in recipe.evaluate.domains]
    return data, check_data([data[stage.name] for stage in recipe.stages], renderer, split_spec(recipe), domains)


def _lock(recipe: Recipe, reporter: Reporter, enters: bool) -> SourceLock | None:
    """Of a recipe that lies in a file."""
    return SourceLock(recipe.path.with_suffix(".lock.json"), reporter, enters=enters) if recipe.path else None


def examples_of(data: StageData) -> StageExamples:
    """What settles the open keys of a stage."""
    train = data.rendered["train"]
    learned = sum(item.supervised for item in train) / max(sum(len(item.branches) for item in train), 1)
    return StageExamples(len(train), len(data.rendered["validation"]), len(data.rendered["test"]), learned)


def _absent_modules(recipe: Recipe, model: Any) -> list[Problem]:
    """Names in ``target_modules`` that no linear module of the base has."""
    found: list[Problem] = []
    for stage in recipe.stages:
        try:
            target_paths(model, recipe.lora_of(stage).target_modules)
        except UserError as error:
            found.append((targets_place(recipe, stage), str(error).removeprefix("target_modules: ")))
    return found


def _too_deep(recipe: Recipe, model: Any) -> list[Problem]:
    """A gate's layers, beyond those that the base has."""
    return list(deep_problems(recipe, int(model.config.get_text_config().num_hidden_layers)))


def _misfits(recipe: Recipe, model: Any, base: BaseId, adapters: Mapping[str, Adapter]) -> list[Problem]:
    """Adapters of another base, by what they say or by their modules and shapes; and what ``last`` lacks of them."""
    found: list[Problem] = []
    bank = Bank(model, base)
    for name, adapter in adapters.items():
        try:
            check_base({name: adapter}, base)
            bank.load(name, adapter)
        except AdapterError as error:
            found.append((("adapters", name), str(error)))
    bank.unmount()
    if not found and recipe.fusion.weights == "last" and adapters.keys() >= set(recipe.members):
        try:
            heuristic("last", {name: adapters[name] for name in recipe.members})
        except UserError as error:
            found.append((("fusion", "weights"), str(error)))
    return found


def rendered_digest(items: Sequence[Rendered]) -> str:
    """SHA-256 of token ids and supervision: what training sees, whatever file it came from."""
    return json_digest([[item.prompt, [[b.ids, b.supervised] for b in item.branches]] for item in items])


def split_spec(recipe: Recipe) -> SplitSpec:
    """How the examples are split."""
    return SplitSpec(recipe.split.train, recipe.split.validation, recipe.split.test, recipe.seeds.data)


def _stage_data(
    recipe: Recipe,
    name: str,
    task: Any,
    entries: Sequence[DataEntry],
    renderer: Renderer,
    lock: SourceLock | None,
    reporter: Reporter,
    fetch: bool,
) -> StageData:
    loaded = []
    for entry in entries:
        found = load_examples(entry.spec(), task, relative_to=recipe.directory, reporter=reporter, fetch=fetch)
        _pin(lock, recipe, entry.source, found.content)
        loaded.append(replace(found, source=entry.source))  # as written: a lineage keeps no environment
    splits = split([example for found in loaded for example in found.examples], split_spec(recipe))
    return StageData.render(name, task, loaded, splits, renderer)


def _pin(lock: SourceLock | None, recipe: Recipe, text: str, digest: str) -> None:
    """Sources of a recipe that lies in a file are pinned beside it; data by a local path may change freely."""
    here = (recipe.directory / Path(text.split("#sha256=")[0]).expanduser()).exists()
    if lock is not None and parse_source(text, is_path=here).kind != "path":
        lock.check(text, digest)
