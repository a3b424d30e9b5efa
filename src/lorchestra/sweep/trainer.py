"""Trains stages, or finds them trained, and scores what came of them, on a base that stays in memory between them."""

from __future__ import annotations

from lorchestra.adapter.adapter import Adapter
from lorchestra.bank import Bank
from lorchestra.base.home import home
from lorchestra.base.load import choose_device, choose_format
from lorchestra.evaluate.score import Domain, Kind, Scores, make_domain, score
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import SCRATCH, StepCache, storage
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared
from lorchestra.pipeline.training import Trained, context_of, load_trained, stage_digest, stage_inputs, train
from lorchestra.recipe.recipe import Recipe
from lorchestra.train.context import final_weights
from lorchestra.train.stage import StageInputs

BEGUN_HERE = "begun-by-a-sweep"  # beside the checkpoints of a training


class Trainer:
    """One process's base and steps.

    Args:
        reporter: progress.
    """

    def __init__(self, reporter: Reporter = SILENT) -> None:
        self.reporter = reporter
        self.cache = StepCache(home() / "steps")
        self._bases: dict[tuple[str, str, str], LazyBase] = {}

    def base(self, prepared: Prepared) -> LazyBase:
        """The base of ``prepared``; another one that was in memory is released."""
        recipe = prepared.recipe
        choose_format(choose_device(recipe.device), recipe.dtype)
        key = (prepared.base.weights, recipe.device, recipe.dtype)
        if key not in self._bases:
            self.release()
            self._bases = {
                key: LazyBase(prepared.directory, prepared.base.name, recipe.device, recipe.dtype, self.reporter)
            }
        return self._bases[key]

    def release(self) -> None:
        """Give the base's memory back."""
        for base in self._bases.values():
            base.release()

    def earlier(self, prepared: Prepared, name: str, base: LazyBase) -> dict[str, Adapter]:
        """Adapters of the stages that the context of stage ``name`` rests on, trained once."""
        needed = _needed(prepared.recipe, name)
        names = [stage.name for stage in prepared.recipe.stages if stage.name in needed]
        return {name: found.adapter for name, found in self.stages(prepared, base, names).items()}

    def stages(self, prepared: Prepared, base: LazyBase, names: list[str]) -> dict[str, Trained]:
        """The stages ``names``, in the recipe's order; each one's context is among those before it."""
        trained: dict[str, Trained] = {}
        for name in names:
            inputs = self.inputs(prepared, name, {key: found.adapter for key, found in trained.items()})
            trained[name] = self.train(prepared, inputs, base, self.digest(prepared, inputs, base))
        return trained

    def inputs(self, prepared: Prepared, name: str, trained: dict[str, Adapter]) -> StageInputs:
        """What stage ``name`` depends on, beside adapters that were brought in and those ``trained`` before."""
        stage = prepared.recipe.stage(name)
        return stage_inputs(prepared, stage, context_of(prepared.recipe, stage, {**prepared.adapters, **trained}))

    def digest(self, prepared: Prepared, inputs: StageInputs, base: LazyBase) -> str:
        """Of the training step."""
        return stage_digest(prepared, inputs, base.device.type, str(base.dtype))

    def train(
        self, prepared: Prepared, inputs: StageInputs, base: LazyBase, digest: str, pause: float | None = None
    ) -> Trained:
        """Train, go on, or find it done; see :func:`lorchestra.pipeline.training.train`."""
        step = self.cache.lookup("stage", digest)
        if step is not None:
            return load_trained(step, inputs, prepared.base)
        work = self.cache.work("stage", digest)
        if not work.exists():
            with storage(work):
                (work / SCRATCH).mkdir(parents=True, exist_ok=True)
                (work / SCRATCH / BEGUN_HERE).touch()
        logs = home() / "logs" / f"sweep-{digest[:12]}"
        return train(prepared, inputs, base, self.cache, digest, self.reporter, logs, pause)

    def abandon(self, digest: str) -> None:
        """Remove the checkpoints of a training that goes no further, but for one that a run had begun."""
        if (self.cache.work("stage", digest) / SCRATCH / BEGUN_HERE).exists():
            self.cache.abandon("stage", digest)

    def scored(self, inputs: StageInputs, domain: Domain, base: LazyBase, adapter: Adapter | None = None) -> Scores:
        """Scores of base and context, and of ``adapter`` on top of them."""
        members = {name: member for name, (member, _) in inputs.context.items()}
        weights = final_weights({name: member for name, (_, member) in inputs.context.items()})
        if adapter is not None:
            members[inputs.name] = adapter
            weights[inputs.name] = 1.0
        return self.score(domain, base, members, weights)

    def score(self, domain: Domain, base: LazyBase, members: dict[str, Adapter], weights: dict[str, float]) -> Scores:
        """Scores of the sum of ``members`` with ``weights`` on the base; without members, of the base itself."""
        loaded = base.load()
        bank = Bank(loaded.model, loaded.id)
        try:
            for name, member in members.items():
                bank.load(name, member)
            with self.reporter.task("test", len(domain.items), "item") as task, bank.using(weights):
                return score(loaded.model, domain, loaded.pad_id, task.advance)
        finally:
            bank.unmount()


def sealed_test(prepared: Prepared, name: str, limit: int | None) -> Domain | None:
    """The test items of stage ``name``, the first ``limit`` of them; ``None`` if there are none."""
    data = prepared.data[name]
    kind: Kind = "dpo" if data.task == "dpo" else "sft"
    examples = data.splits.test[:limit]
    return make_domain(name, kind, examples, prepared.renderer) if examples else None


def _needed(recipe: Recipe, name: str) -> set[str]:
    """Stages that stage ``name`` needs, directly or through others."""
    stages = {stage.name: stage for stage in recipe.stages}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for other in stages[waiting.pop()].context:
            if other in stages and other not in found:
                found.add(other)
                waiting.append(other)
    return found
