"""A run: recipe → stages → coefficients → fused adapter → merged model → verdict → report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.home import home
from lorchestra.base.load import choose_device, choose_format
from lorchestra.errors import LorchestraError
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import Step, StepCache, discard, run_lock, storage, sweep, write_json
from lorchestra.pipeline.choosing import Chosen, choose
from lorchestra.pipeline.delivering import fuse_step, merge_step, place_with_lineage
from lorchestra.pipeline.figures import delivered_lineage
from lorchestra.pipeline.gate_verdict import GateJudged, gate_verdict_step, place_gate
from lorchestra.pipeline.gating import fit_gate
from lorchestra.pipeline.journal import Journal
from lorchestra.pipeline.judging import Judged, evaluate_step
from lorchestra.pipeline.lazy import LazyBase
from lorchestra.pipeline.prepare import Prepared, prepare
from lorchestra.pipeline.publishing import KEPT, Published, check_publish, publish
from lorchestra.pipeline.refitting import acting, refit_inputs
from lorchestra.pipeline.training import (
    Trained,
    budget,
    context_of,
    load_trained,
    mixed_inputs,
    stage_digest,
    stage_inputs,
    train,
)
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.suggestions import Suggestion, lines
from lorchestra.recipe.unexpanded import Unexpanded, as_written, mask_of, masked
from lorchestra.report.write import write_report
from lorchestra.train.loop import refuse_absent_trackers
from lorchestra.train.stage import StageInputs


@dataclass(frozen=True)
class RunResult:
    """What a run delivered.

    Args:
        directory: of the run: ``report.html``, ``events.jsonl``, ``plan.json``, ``adapters/``, ``final/``.
        adapter: the fused adapter, a PEFT directory (``final/adapter``).
        merged: the merged model (``final/model``), if the recipe asks for one.
        weights: the coefficients of the members.
        verdict: one sentence; empty without a sealed test.
        readings: domain → how often its sealed test has been read so far, this verdict included.
        digests: step name → content digest of the adapter it made.
        report: ``report.html``.
        suggestions: stage → what its examples settled, and the advice on how to judge with so many.
        published: what it is in a registry, if the recipe publishes.
        scores: of the verdict: model → domain → scores of every item; ``None`` without a sealed test.
        gate: the gate with its adapters (``final/gate``), if the recipe asks for one and it beat the static weights.
        gate_verdict: one sentence; empty without a gate.
    """

    directory: Path
    adapter: Path
    merged: Path | None
    weights: Mapping[str, float]
    verdict: str
    readings: Mapping[str, int]
    digests: Mapping[str, str]
    report: Path
    suggestions: Mapping[str, tuple[Suggestion, ...]]
    published: Published | None = None
    scores: Path | None = None
    gate: Path | None = None
    gate_verdict: str = ""


@as_written
def run(recipe: Recipe, *, directory: Path | None = None, reporter: Reporter = SILENT, wait: bool = False) -> RunResult:
    """Carry out a recipe; finished steps are reused, an unfinished one goes on where it stopped.

    Args:
        recipe: see :meth:`Recipe.load`.
        directory: of the run; ``runs/<recipe name>`` under the working directory by default.
        reporter: progress.
        wait: wait for another run in the same directory instead of refusing.

    Raises:
        UserError: something in the recipe, its sources or its data is to be mended.
        TrainingError: a law did not hold, or training diverged.
        StorageError: the disk is full or cannot be written.
        RegistryError: the registry that it publishes to cannot be reached, before anything is trained or at the end.
        PromotionRefused: a gate did not let the published adapter take the alias.
    """
    where = (directory or Path("runs") / recipe.name).resolve()
    with storage(where), run_lock(where, wait, reporter.say):
        sweep(where)
        journal = Journal(reporter, where / "events.jsonl")
        try:
            return _Run(recipe, where, Unexpanded(journal, mask_of(recipe))).go()
        finally:
            journal.close()


class _Run:
    """One execution; steps note themselves as they finish."""

    def __init__(self, recipe: Recipe, directory: Path, reporter: Reporter) -> None:
        self.recipe = recipe
        self.directory = directory
        self.reporter = reporter
        self.cache = StepCache(home() / "steps")
        self.started = time.time()
        self.steps: list[dict[str, Any]] = []
        self.trainings: dict[str, dict[str, Any]] = {}  # name → what the report tells of it
        self._clock = self.started

    def go(self) -> RunResult:
        """Every step in order."""
        choose_format(choose_device(self.recipe.device), self.recipe.dtype)  # a mistake there is told before any fetch
        check_publish(self.recipe)
        for stage in self.recipe.stages:
            refuse_absent_trackers(self.recipe.train_of(stage).report_to)
        self.written = self.recipe
        self.reporter.event("run", recipe=self.recipe.name, version=version("lorchestra"))
        prepared = prepare(self.recipe, self.reporter)
        self.recipe = prepared.recipe
        if self.recipe.evaluate.mixed_baseline:
            mixed_inputs(prepared, tokens=1)  # a mistake in what it needs is told before the stages are trained
        self.prepared = prepared
        self.base = LazyBase(
            prepared.directory, prepared.base.name, self.recipe.device, self.recipe.dtype, self.reporter
        )
        self._note("data", "data", None)
        for line in prepared.check.warnings:
            self.reporter.say(f"warning: {line}")
        for line in lines(prepared.suggestions):
            self.reporter.say(line)
        trained = self._stages(prepared)
        adapters = {**prepared.adapters, **{name: found.adapter for name, found in trained.items()}}
        members = {name: adapters[name] for name in self.recipe.members}
        spent = ""
        if self.recipe.evaluate.mixed_baseline:
            inputs = mixed_inputs(prepared, sum(int(found.training["tokens"]) for found in trained.values()))
            mixed = self._train(prepared, inputs)
            adapters["mixed"] = mixed.adapter
            spent = budget(trained.values(), mixed)
        chosen = choose(prepared, members, self.base, self.cache, self.reporter)
        if chosen.step is not None:
            self._note("search", "search", chosen.step)
        for line in chosen.warnings:
            self.reporter.say(f"warning: {line}")
        refitted = self._refit(prepared, chosen, adapters, trained) if self.recipe.fusion.refit else {}
        acting = (name for name in trained if chosen.weights.get(name, 0.0) > 0)
        stages = {name: trained[name].step.directory / "adapter" for name in acting}
        fused, fuse = fuse_step(prepared, {**members, **refitted}, chosen, self.cache, self.reporter, stages)
        self._note("fuse", "fuse", fuse)
        merge = None
        if self.recipe.deliver.merged:
            merge = merge_step(prepared, fused, self.cache, self.reporter)
            self._note("merge", "merge", merge)
            self.reporter.say(
                f"merged in {merge.info['dtype']}: ‖ΔW‖/‖W‖ {merge.info['update_ratio']:.2%}, rounding lost "
                f"{merge.info['rounding_lost']:.2%} of it; parity {merge.info['parity']:.2%} (5 % allowed)"
            )
        judged = evaluate_step(
            prepared, adapters, members, chosen, fused, merge, self.base, self.cache, self.reporter, spent,
            self.recipe.fusion.refit,
        )  # fmt: skip
        if judged is not None:
            self._note("evaluate", "evaluate", judged.step)
        gated = None
        if judged is not None and self.recipe.fusion.gate is not None:
            gated = self._gate(prepared, members, chosen, judged)
            judged = replace(judged, ledger=list(gated.told["ledger"]))
        for other in sorted((self.directory / "adapters").glob("[!.]*")):  # of a stage that the recipe no longer has
            if other.name not in {name.replace(":", "-") for name in self.trainings}:
                discard(other)
        final = self.directory / "final"
        lineage = delivered_lineage(prepared, fused, {**members, **refitted}.values(), judged)
        place_with_lineage(fuse.directory / "adapter", final / "adapter", lineage)
        if merge is not None:
            place_with_lineage(merge.directory / "model", final / "model", lineage)
        else:
            discard(final / "model")
        kept = gated is not None and gated.verdict.kept
        if gated is not None and kept:
            self._place_gate(gated, members, final / "gate")
        else:
            discard(final / "gate")
        report = self._report(chosen, fuse, merge, judged, gated)
        sentence = judged.verdict.sentence if judged else ""
        published = self._publish(final / "adapter", sentence) if self.recipe.deliver.publish else None
        digests = {**{name: adapter.digest for name, adapter in adapters.items()}, "fused": fused.digest}
        self.reporter.event("done", seconds=round(time.time() - self.started, 1), digests=digests, verdict=sentence)
        return RunResult(
            directory=self.directory,
            adapter=final / "adapter",
            merged=final / "model" if merge else None,
            weights=chosen.weights,
            verdict=sentence,
            readings={row["domain"]: row["reads"] for row in judged.ledger} if judged else {},
            digests=digests,
            report=report,
            suggestions=prepared.suggestions,
            published=published,
            scores=judged.step.directory / "scores.json" if judged else None,
            gate=final / "gate" if kept else None,
            gate_verdict=gated.verdict.sentence if gated else "",
        )

    def _gate(self, prepared: Prepared, members: Mapping[str, Adapter], chosen: Chosen, judged: Judged) -> GateJudged:
        """Fit a gate, and judge it beside the static weights, on the base that it is served with."""
        base = self.base.plain()
        fitted = fit_gate(prepared, members, chosen.weights, base, self.cache, self.reporter)
        self._note("gate", "gate", fitted.step)
        for line in fitted.warnings:
            self.reporter.say(f"warning: {line}")
        found = gate_verdict_step(prepared, members, chosen, judged, fitted, base, self.cache, self.reporter)
        self._note("judge", "judge", found.step)
        return found

    def _place_gate(self, gated: GateJudged, members: Mapping[str, Adapter], target: Path) -> None:
        """The gate with every member; what was brought in is written anew, as a PEFT directory."""
        brought = self.directory / "adapters" / ".brought"
        places = {}
        for name, adapter in members.items():
            if name in self.recipe.adapters:
                adapter.save(brought / name)
                places[name] = brought / name
            else:
                places[name] = self.directory / "adapters" / name
        place_gate(gated, places, target)
        discard(brought)

    def _publish(self, adapter: Path, verdict: str) -> Published:
        """Push what was delivered, and its stages if the recipe says so; everything else is on disk by now."""
        stages = {name.replace(":", "-"): self.directory / "adapters" / name.replace(":", "-")
                  for name in self.trainings if name != "mixed"}  # fmt: skip
        try:
            found = publish(self.written, adapter, stages, self.reporter)
        except LorchestraError as error:
            if verdict:
                self.reporter.say(verdict)
            error.args = (f"{error}\n{KEPT.format(self.directory)}", *error.args[1:])
            raise
        self._note("publish", "publish", None)
        return found

    def _stages(self, prepared: Prepared) -> dict[str, Trained]:
        trained: dict[str, Trained] = {}
        for stage in self.recipe.stages:
            adapters = {**prepared.adapters, **{name: found.adapter for name, found in trained.items()}}
            inputs = stage_inputs(prepared, stage, context_of(self.recipe, stage, adapters))
            trained[stage.name] = self._train(prepared, inputs)
        return trained

    def _refit(
        self, prepared: Prepared, chosen: Chosen, adapters: Mapping[str, Adapter], trained: Mapping[str, Trained]
    ) -> dict[str, Adapter]:
        """Members as they are after training on λ-validation too; what is not trained here stays what it was."""
        refitted: dict[str, Adapter] = {}
        for stage in acting(self.recipe, chosen.weights):
            inputs = refit_inputs(prepared, stage, trained[stage.name].training, adapters, refitted)
            refitted[stage.name] = self._train(prepared, inputs, f"refit:{stage.name}").adapter
        return {name: adapter for name, adapter in refitted.items() if name in self.recipe.members}

    def _train(self, prepared: Prepared, inputs: StageInputs, called: str = "") -> Trained:
        """Train, or find it done; ``called`` is the step's name, if it is not the stage's."""
        name = called or inputs.name
        device = choose_device(self.recipe.device)
        held = choose_format(device, self.recipe.dtype)
        digest = stage_digest(prepared, inputs, device.type, str(held))
        cached = self.cache.lookup("stage", digest)
        if cached is not None:
            self.cache.verify(cached)
            found = load_trained(cached, inputs, prepared.base)
            self.reporter.say(f"{name}: trained before, reused ({digest[:12]})")
        else:
            logs = self.directory / "logs" / name.replace(":", "-")
            found = train(prepared, inputs, self.base, self.cache, digest, self.reporter, logs)
        self._note(name, "stage", found.step)
        own = self.directory / "adapters" / name.replace(":", "-")
        place_with_lineage(found.step.directory / "adapter", own, found.adapter.lineage)
        self.trainings[name] = self._training_report(inputs, found)
        return found

    def _note(self, name: str, kind: str, step: Step | None) -> None:
        now = time.time()
        self.steps.append(
            {
                "name": name,
                "kind": kind,
                "digest": step.digest if step else "",
                "cached": step.cached if step else False,
                "seconds": round(now - self._clock, 2),
            }
        )
        self._clock = now
        self.reporter.event("step", **self.steps[-1])
        write_json(self.directory / "plan.json", {"recipe": self.recipe.name, "steps": self.steps})

    def _report(
        self, chosen: Chosen, fuse: Step, merge: Step | None, judged: Judged | None, gated: GateJudged | None
    ) -> Path:
        recipe, prepared = self.recipe, self.prepared
        told: dict[str, Any] = {"verdict": {"sentence": "", "notes": []}, "evaluation": None}
        if judged:
            told = judged.verdict.as_dict()
            told["evaluation"]["ledger"] = judged.ledger
        device = choose_device(recipe.device)
        data = {
            "title": recipe.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "lorchestra": version("lorchestra"),
            "seconds": round(time.time() - self.started, 1),
            "recipe_text": recipe.text,
            "settings": recipe.model_dump(mode="json"),
            "settled": {
                name: {found.key: found.said for found in stage} for name, stage in prepared.suggestions.items()
            },
            **told,
            "base": {
                **asdict(prepared.base),
                "device": str(device),
                "dtype": choose_format(device, recipe.dtype).name,
            },
            "steps": self.steps,
            "stages": [self.trainings[stage.name] for stage in recipe.stages],
            "mixed": self.trainings.get("mixed"),
            "search": chosen.search,
            "fusion": {
                **fuse.info,
                "weights": chosen.weights,
                "warnings": list(chosen.warnings),
                "refit": [told for name, told in self.trainings.items() if name.startswith("refit:")],
            },
            "merge": dict(merge.info) if merge else None,
            "gate": dict(gated.told) if gated else None,
            "samples": judged.samples if judged else [],
            "data": prepared.check.as_dict(),
        }
        return write_report(masked(mask_of(recipe), data), self.directory)

    def _training_report(self, inputs: StageInputs, found: Trained) -> dict[str, Any]:
        training = found.training
        seconds = max(float(training["seconds"]), 1e-9)
        examples = {"train": len(inputs.items), "validation": len(inputs.validation)}
        if inputs.name in self.prepared.data:
            examples["test"] = len(self.prepared.data[inputs.name].splits.test)
        return {
            "name": inputs.name,
            "task": inputs.objective.task,
            "digest": found.adapter.digest,
            "lora": training["lora"],
            "train": training["train"],
            "scale": training["scale"],
            "trainable": training["trainable"],
            "examples": examples,
            "context": {name: member.model_dump(mode="json") for name, (_, member) in inputs.context.items()},
            "history": training["history"],
            "validation": training["validation"],
            "best_step": training["best_step"],
            "stopped_early": training["stopped"],
            "seconds": seconds,
            "tokens": training["tokens"],
            "tokens_per_second": training["tokens"] / seconds,
        }
