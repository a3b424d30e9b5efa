"""Rebuilding: the recipe on record of a version, carried out on another base, compared on the same sealed test.

The base changes, the data may not: their digests are those of the manifest, and so are those of the sealed test, by
its texts. What comes of it is pushed as a candidate; no alias is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.home import home
from lorchestra.errors import LorchestraError, RecipeError, UserError, counted
from lorchestra.evaluate.ledger import sealed_digest
from lorchestra.evaluate.score import Scores
from lorchestra.evaluate.verdict import DELIVERED
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import StepCache
from lorchestra.pipeline.comparing import Compared, paired, unpaired
from lorchestra.pipeline.execute import run
from lorchestra.pipeline.figures import LOSS, data_digests
from lorchestra.pipeline.judging import read_scores, score_alone, sealed_items
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.plan import plan
from lorchestra.pipeline.prepare import Prepared, prepare
from lorchestra.pipeline.publishing import push_once, recorded
from lorchestra.recipe.recipe import Recipe
from lorchestra.registry.manifest import Metric
from lorchestra.registry.mistakes import UnknownReferenceError

if TYPE_CHECKING:
    from lorchestra.pipeline.execute import RunResult
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Version

TAG = "rebuilt"
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Rebuilt:
    """What became of one version.

    Args:
        version: ``clinic@v3``.
        state: ``done``; ``there``: it stands on that base already; ``planned``: it could be rebuilt; ``failed``.
        reason: of a failure; of what is planned, what a run would do.
        candidate: ``clinic@v4``.
        compared: on the sealed test; ``None`` where nothing can be compared.
        remarks: what should be known beside.
    """

    version: str
    state: Literal["done", "there", "planned", "failed"]
    reason: str = ""
    candidate: str = ""
    compared: Compared | None = None
    remarks: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "compared": self.compared.as_dict() if self.compared else None}


def selected(registry: Registry, patterns: Sequence[str], tag: str = "", base: str = "") -> list[str]:
    """References of the versions that are meant, each name once, sorted.

    Args:
        registry: it is asked.
        patterns: references, or names with ``*``, ``?`` and ``[…]``; without any, every name that the filters take.
        tag: the version has it.
        base: the version's base, by its name or the digest of its weights.

    Raises:
        UserError: nothing is asked for, or nothing found.
        UnknownReferenceError: a reference without ``*`` that leads nowhere.
    """
    if not (patterns or tag or base):
        raise UserError("say what to rebuild: names (clinic, 'med_*'), --tag TAG, or --on BASE for all that is on it")
    found = [registry.resolve(text) for text in patterns if not _WILD & set(text)]
    wild = [text for text in patterns if _WILD & set(text)] or ([] if patterns else ["*"])
    for name in registry.names() if wild else []:
        if any(fnmatchcase(name, pattern) for pattern in wild):
            try:
                version = registry.resolve(name)
            except UnknownReferenceError:  # all of its versions were revoked
                continue
            if version.manifest.made_by != "stage" and version.revoked is None:
                found.append(version)
    if tag or base:
        taken = {line.id for line in registry.summaries(tag=tag, base=base)}
        found = [version for version in found if version.id in taken]
    if not found:
        raise UserError("nothing in the registry is meant by this; `lorchestra registry list` shows what there is")
    return sorted({version.reference for version in found})


class Rebuilder:
    """Rebuilds versions, one after the other.

    Args:
        url: of the registry.
        base: the new base, a source; a path is absolute.
        where: the directory that the recipes' relative paths are relative to.
        runs: where the runs' directories go.
        dry_run: only look whether it could be done.
        reporter: progress.
    """

    def __init__(
        self, url: str, base: str, where: Path, runs: Path, dry_run: bool = False, reporter: Reporter = SILENT
    ) -> None:
        self.url, self.base, self.where, self.runs, self.dry_run = url, base, where, runs, dry_run
        self.reporter = reporter

    def elsewhere(self) -> Callable[[], Rebuilder]:
        """Makes the same in another process."""
        return partial(Rebuilder, self.url, self.base, self.where, self.runs, self.dry_run)

    def work(self, piece: str) -> Rebuilt:
        """One version; whatever goes wrong with it is an outcome, so that the others go on."""
        try:
            return self._work(piece)
        except LorchestraError as error:
            return Rebuilt(piece, "failed", reason=str(error))

    def _work(self, reference: str) -> Rebuilt:
        with self._open() as registry:
            version = registry.resolve(reference)
        manifest = version.manifest
        recipe = recipe_of(version, self.base, self.where)
        prepared = prepare(recipe, self.reporter)
        if prepared.base.weights == manifest.base.weights:
            return Rebuilt(reference, "there", reason=f"it stands on {prepared.base.name} already")
        check_data(version, prepared, self.where)
        domains = check_sealed(version, prepared)
        if self.dry_run:
            return Rebuilt(reference, "planned", reason=_planned(recipe))
        name = f"{manifest.name}-v{manifest.number}"
        result = run(recipe, directory=self.runs / name, reporter=self.reporter)
        with self._open() as registry:
            compared, remarks = self._compare(registry, version, prepared, result, domains)
            led = registry.resolve(manifest.name).reference
            candidate = push_once(
                registry, result.adapter, manifest.name, self.reporter,
                note=f"rebuilt from {reference}", tags=(TAG,), recipe=recorded(recipe),
                why=f"{reference} rebuilt on {prepared.base.name}",
            )  # fmt: skip
            leads = registry.resolve(manifest.name).reference
        if leads != led:
            remarks = (*remarks, f"{manifest.name} has no alias production, so the name alone leads to {leads} now")
        return Rebuilt(reference, "done", "", candidate.reference, compared, remarks)

    def _open(self) -> Registry:
        from lorchestra.registry.registry import Registry

        return Registry.open(self.url)

    def _compare(
        self, registry: Registry, version: Version, prepared: Prepared, result: RunResult, domains: Sequence[str]
    ) -> tuple[Compared | None, tuple[str, ...]]:
        """By item where the old base is here, else by the two intervals; and what should be known of it."""
        if result.scores is None or not domains:
            return None, (f"{version.reference} has no sealed test on record, so the two were not compared",)
        manifest = version.manifest
        same_tokens = manifest.base.tokenizer == prepared.base.tokenizer
        try:
            before = self._scores_before(registry, version, prepared, domains)
        except LorchestraError as error:
            metric = f"{domains[0]}.{LOSS}" if len(domains) == 1 else LOSS
            told = Metric(**Adapter.load(result.adapter).lineage.metrics[metric])
            why = f"not paired by item, as the old version cannot be scored here: {error}"
            if not same_tokens:
                return None, (f"not compared: the tokenizers differ, and {why}",)
            return unpaired(manifest.metrics[metric], told), (why,)
        after = read_scores(result.scores)[DELIVERED]
        remarks = () if same_tokens else ("the tokenizers differ: both losses are per token of the old one",)
        return paired(before, {name: after[name] for name in domains}), remarks

    def _scores_before(
        self, registry: Registry, version: Version, prepared: Prepared, domains: Sequence[str]
    ) -> dict[str, Scores]:
        """Of the old version on its own base, if that is here.

        Raises:
            LorchestraError: it is not, or not the same, or the version cannot be had.
        """
        manifest = version.manifest
        old = prepare(recipe_of(version, "", self.where), fetch=False)
        if old.base.weights != manifest.base.weights:
            raise UserError(f"{old.base.name} has other weights now than when {version.reference} was trained on it")
        here, there = sealed_items(prepared), sealed_items(old)
        if any(here[name] != there[name] for name in domains):
            raise UserError("its sealed test comes in another order there")
        adapter = Adapter.load(registry.materialise(version, home() / "versions"))
        recipe = old.recipe
        base = LazyBase(old.directory, old.base.name, recipe.device, recipe.dtype, self.reporter)
        scores = score_alone(old, adapter, base, StepCache(home() / "steps"), self.reporter)
        return {name: scores[name] for name in domains}


def recipe_of(version: Version, base: str, where: Path) -> Recipe:
    """The recipe on record of a version, on another base (an empty one: on its own), with its sources looked at.

    Raises:
        UserError: there is none, this lorchestra does not take it, or what it reads is not there.
    """
    from lorchestra.registry.changing import check_ready

    manifest = version.manifest
    check_ready(version)
    if manifest.made_by == "stage":
        raise UserError(f"{version.reference} is a stage of a recipe; rebuild what it was fused into")
    if not manifest.recipe:
        raise UserError(
            f"{version.reference} has no recipe on record: it was pushed by hand. Train it on the new base with "
            "`lorchestra run`, and publish from there (deliver.publish)"
        )
    try:
        recipe = Recipe.from_dict({**manifest.recipe, **({"base": base} if base else {})}, where)
    except RecipeError as error:
        made = manifest.tools.get("lorchestra", "another version")
        raise UserError(
            f"the recipe on record of {version.reference} (written by lorchestra {made}) is not taken: {error}"
        ) from None
    try:
        recipe.check_sources()
    except RecipeError as error:
        raise UserError(
            f"the recipe on record of {version.reference} cannot be carried out here: {error}\nIts relative paths are "
            f"those of the directory that it lay in: name that with --from (now {where})"
        ) from None
    return recipe


def check_data(version: Version, prepared: Prepared, where: Path) -> None:
    """Whether the stages' examples are those that the version was trained on.

    Raises:
        UserError: some are not.
    """
    found = data_digests(prepared)
    changed = [
        f"{source}: {_short(digest)} then, {_short(found[source]) if source in found else 'not read'} now"
        for source, digest in version.manifest.data.items()
        if digest not in found.values()
    ]
    if changed:
        raise UserError(
            f"{version.reference} was trained on other examples than there are in {where}: {'; '.join(changed)}. "
            "Rebuild from the data as it was (--from DIR), or run the recipe as a new version"
        )


def check_sealed(version: Version, prepared: Prepared) -> list[str]:
    """Domains that both can be compared on: those of the version's record, by the digest of their sealed tests.

    Raises:
        UserError: one of them has another sealed test now.
    """
    now = {name: sealed_digest(items) for name, items in sealed_items(prepared).items()}
    metrics = version.manifest.metrics
    then = {name: metrics[f"{name}.{LOSS}"].sealed for name in prepared.data if f"{name}.{LOSS}" in metrics}
    known = {name: digest for name, digest in then.items() if digest}
    other = [name for name, digest in known.items() if now.get(name) != digest]
    if other:
        raise UserError(
            f"the sealed test of {', '.join(other)} is not the one that {version.reference} was judged on, so the two "
            "could not be compared; give the data, seeds and split as they were"
        )
    return list(known)


def _planned(recipe: Recipe) -> str:
    found = plan(recipe)
    todo = [step for step in found.steps if step.kind == "stage" and not step.finished]
    left = f"{counted(len(todo), 'stage')} to train" if todo else "every stage is trained"
    return left + (f", about {found.seconds / 60:.0f} min" if found.seconds and found.seconds >= 60 else "")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
