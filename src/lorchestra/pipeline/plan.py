"""What a run would do: its steps in order, what is there already, and what the rest will roughly cost.

Nothing is fetched and no weights are loaded. The digests come from the functions that the run itself uses, so a step
called *cached* is one that the run reuses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.home import home
from lorchestra.base.load import choose_device, choose_format, prepare_base
from lorchestra.base.locate import NotHereError
from lorchestra.data.load import load_examples
from lorchestra.data.split import split
from lorchestra.events import SILENT
from lorchestra.pipeline.cache import SCRATCH, Step, StepCache
from lorchestra.pipeline.choosing import Chosen, concluded, search_inputs, settled
from lorchestra.pipeline.costs import Cost, Costs, Outlook, outlook_of
from lorchestra.pipeline.delivering import fuse_digest, merge_digest
from lorchestra.pipeline.estimate import Machine, Shape, empty_model, measure, shape_of
from lorchestra.pipeline.gate_verdict import gate_verdict_inputs
from lorchestra.pipeline.gating import GateInputs, chosen_gate, gate_inputs, gate_names
from lorchestra.pipeline.judging import evaluate_inputs
from lorchestra.pipeline.planned import Plan, PlannedStep
from lorchestra.pipeline.prepare import Prepared, prepare, split_spec
from lorchestra.pipeline.publishing import check_publish, destination
from lorchestra.pipeline.refitting import acting, refit_inputs
from lorchestra.pipeline.training import Trained, context_of, load_trained, mixed_inputs, stage_digest, stage_inputs
from lorchestra.recipe.gate import candidates, reason
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Stage
from lorchestra.recipe.sources import expand, is_here
from lorchestra.recipe.unexpanded import as_written, mask_of
from lorchestra.train.stage import StageInputs


@as_written
def plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """Look ahead.

    Args:
        recipe: see :meth:`Recipe.load`.
        machine: rates to estimate with; measured here, in a third of a second, by default.

    Raises:
        UserError: what :func:`prepare` would refuse, as far as it is here.
    """
    recipe.check_sources()
    check_publish(recipe)
    return Planner(recipe, machine).go()


class Planner:
    """Walks through the run without doing it. Arguments as of :func:`plan`."""

    def __init__(self, recipe: Recipe, machine: Machine | None) -> None:
        self.recipe = recipe
        self.machine = machine
        self.device = choose_device(recipe.device)
        self.format = choose_format(self.device, recipe.dtype)
        self.cache = StepCache(home() / "steps")
        self.steps: list[PlannedStep] = []
        self.trained: dict[str, Trained] = {}
        self.ratios: list[float] = []  # of finished and begun stages: seconds they take / estimated
        self.model: Any = None
        self.shape: Shape | None = None
        self.prepared: Prepared | None = None
        self.costs: Costs | None = None

    def go(self) -> Plan:
        """All steps, then the sums."""
        self.begin()
        self._after(self.stages())
        if self.recipe.deliver.publish is not None:
            self.add(PlannedStep("publish", "publish", (self.steps[-1].name,), "each run", destination(self.recipe)))
        return self.plan()

    def begin(self) -> None:
        """Steps of the sources and of the data."""
        directory = self._sources()
        if directory is not None:
            self.model = empty_model(directory)
            self.shape = shape_of(self.model, self.format.dtype.itemsize, bool(self.format.quantised))
        self._data()

    def _sources(self) -> Path | None:
        """A step for everything that is read from outside; the directory of the base, if it is here."""
        where, directory = self.recipe.directory, None
        try:
            directory = prepare_base(expand(self.recipe.base), relative_to=where, fetch=False)
            self.add(PlannedStep("base", "source", (), "here"))
        except NotHereError as error:
            self.add(PlannedStep("base", "source", (), "to fetch", note=mask_of(self.recipe)(str(error))))
        wanted: list[tuple[str, list[str], Literal["model", "dataset"]]]
        wanted = [(f"data:{stage.name}", [e.source for e in stage.data], "dataset") for stage in self.recipe.stages]
        extra = self.recipe.evaluate.domains
        wanted += [(f"data:{name}", [e.source for e in entries], "dataset") for name, entries in extra.items()]
        wanted += [(f"adapter:{name}", [text], "model") for name, text in self.recipe.adapters.items()]
        for name, texts, kind in wanted:
            missing = [text for text in texts if not is_here(text, where, kind)]
            note = f"{', '.join(map(repr, missing))} has not been fetched yet" if missing else ""
            self.add(PlannedStep(name, "source", (), "to fetch" if missing else "here", note=note))
        return directory

    def _data(self) -> None:
        """The step that reads, splits, renders and checks; it is done here and now if everything is here."""
        needs = tuple(step.name for step in self.steps)
        if any(step.state == "to fetch" for step in self.steps):
            self.add(PlannedStep("data", "data", needs, "each run"))
            return
        started = time.perf_counter()
        self.prepared = prepare(self.recipe, SILENT, fetch=False)
        self.recipe = self.prepared.recipe
        self.add(PlannedStep("data", "data", needs, "each run", seconds=time.perf_counter() - started))
        assert self.shape is not None  # the base is one of the sources
        self.machine = self.machine or measure(self.device, self.format.dtype, self.shape)
        self.costs = Costs(self.prepared, self.model, self.shape, self.machine)

    def stages(self) -> dict[str, Adapter]:
        """Steps of the stages and of the mixed baseline; the adapters that are there."""
        prepared, costs = self.prepared, self.costs
        adapters = dict(prepared.adapters) if prepared else {}
        tokens = 0
        for stage in self.recipe.stages:
            needs = ("data", *(name for name in stage.context if name not in self.recipe.adapters))
            if prepared is None or costs is None:
                outlook = outlook_of(self.recipe, stage, self.model, self.counts(stage))
                self.add(PlannedStep(stage.name, "stage", needs, "to do", outlook=outlook))
                continue
            outlook, cost = costs.stage(stage)
            inputs = None
            if stage.context.keys() <= adapters.keys():
                inputs = stage_inputs(prepared, stage, context_of(self.recipe, stage, adapters))
            trained = self.training(prepared, stage.name, needs, inputs, outlook, cost)
            if trained is not None:
                adapters[stage.name] = trained.adapter
                self.trained[stage.name] = trained
            tokens += int(trained.training["tokens"]) if trained else outlook.tokens or 0
        if self.recipe.evaluate.mixed_baseline:
            names = [stage.name for stage in self.recipe.stages]
            needs = ("data", *names)
            if prepared is None or costs is None:
                self.add(PlannedStep("mixed", "stage", needs, "to do"))
                return adapters
            inputs = mixed_inputs(prepared, tokens)
            outlook, cost = costs.mixed(inputs)
            done = all(name in adapters for name in names)
            trained = self.training(prepared, "mixed", needs, inputs if done else None, outlook, cost)
            if trained is not None:
                adapters["mixed"] = trained.adapter
        return adapters

    def training(
        self,
        prepared: Prepared,
        name: str,
        needs: tuple[str, ...],
        inputs: StageInputs | None,
        outlook: Outlook,
        cost: Cost,
    ) -> Trained | None:
        """Add a training step; what it made, if it is finished. ``inputs`` is ``None`` if a stage before it is not."""
        planned = PlannedStep(name, "stage", needs, "to do", "", "", outlook, cost.seconds, cost.memory)
        if inputs is None:
            self.add(planned)
            return None
        digest = stage_digest(prepared, inputs, self.device.type, str(self.format))
        planned = replace(planned, digest=digest)
        step = self.cache.lookup("stage", digest)
        if step is not None:
            trained = load_trained(step, inputs, prepared.base)
            took = float(trained.training["seconds"])
            self.ratios.append(took / cost.seconds)
            self.add(replace(planned, state="cached", note=f"took {took:.0f} s", seconds=0.0))
            return trained
        scratch = self.cache.work("stage", digest) / SCRATCH
        checkpoints = sorted(scratch.glob("step-*/progress.json"))
        if checkpoints and outlook.steps:
            progress = json.loads(checkpoints[-1].read_text(encoding="utf-8"))
            done = int(progress["step"])
            self.ratios.append(float(progress["seconds"]) / done * outlook.steps / cost.seconds)
            note = f"goes on after step {done} of {outlook.steps}"
            left = cost.seconds * (1 - done / outlook.steps)
            planned = replace(planned, state="begun", note=note, seconds=left)
        self.add(planned)
        return None

    def _after(self, adapters: Mapping[str, Adapter]) -> None:
        """Search, fusion, merge and verdict."""
        recipe, prepared, costs, held = self.recipe, self.prepared, self.costs, self.format
        inside = tuple(name for name in recipe.members if name not in recipe.adapters)
        members = {name: adapters[name] for name in recipe.members if name in adapters}
        whole = len(members) == len(recipe.members)
        chosen = settled(recipe, members) if prepared and whole else None
        if recipe.fusion.weights == "search":
            inputs = search_inputs(prepared, members, str(held)) if prepared and whole else None
            digest = inputs.digest if inputs else ""
            step = self._look("search", ("data", *inside), digest, costs.search() if costs else None)
            if step is not None and inputs is not None:
                chosen = concluded(recipe, members, inputs, step)
            inside = (*inside, "search")
        stages = tuple(step.name for step in self.steps if step.kind == "stage")
        refitted = self._refits(chosen, adapters, inside)
        inside = (*inside, *(step.name for step in self.steps if step.kind == "stage" and step.name not in stages))
        digest = ""
        if prepared and chosen and refitted is not None:
            digest = fuse_digest(prepared, {**members, **refitted}, chosen.weights)
        step = self._look("fuse", inside or ("data",), digest, costs.fuse() if costs else None)
        fused = Adapter.load(step.directory / "adapter") if step is not None else None
        if recipe.deliver.merged:
            digest = merge_digest(prepared, fused) if prepared and fused else ""
            self._look("merge", ("base", "fuse"), digest, costs.merge() if costs else None)
        if recipe.split.test == 0 and not (prepared and any(d.splits.test for d in prepared.data.values())):
            return
        digest = ""
        if prepared and chosen and fused and {*recipe.adapters, *stages} <= adapters.keys():
            unrefit = chosen.weights if recipe.fusion.refit else None
            judged = evaluate_inputs(prepared, adapters, members, fused, str(held.plain), unrefit)
            digest = judged.digest if judged else ""
        last = "merge" if recipe.deliver.merged else "fuse"
        self._look("evaluate", ("data", *stages, last), digest, costs.evaluate() if costs else None)
        if recipe.fusion.gate is not None:
            self._gate(members if whole else None, chosen)

    def _gate(self, members: Mapping[str, Adapter] | None, chosen: Chosen | None) -> None:
        """Steps of the gates, and of the verdict on the one that λ-validation chooses."""
        recipe, prepared, costs, dtype = self.recipe, self.prepared, self.costs, str(self.format.plain)
        trained = tuple(name for name in recipe.members if name not in recipe.adapters)
        after = ("search",) if recipe.fusion.weights == "search" else ()
        inputs: list[GateInputs] = []
        if prepared and members is not None and chosen is not None:
            inputs = gate_inputs(prepared, members, chosen.weights, dtype)
        names = gate_names(recipe)
        digests = [one.digest for one in inputs] or [""] * len(names)
        steps = []
        cost, why = costs.gate() if costs else None, reason(recipe)
        note = f"{candidates(recipe)[0].activation}: {why}" if why else ""
        for name, digest in zip(names, digests, strict=True):
            steps.append(self._look("gate", ("data", *trained, *after), digest, cost, name, note))
        found = [step for step in steps if step is not None]
        digest = ""
        if prepared and members is not None and chosen is not None and len(found) == len(names):
            fitted = chosen_gate(prepared, members, inputs, found)
            digest = gate_verdict_inputs(prepared, members, chosen.weights, fitted, dtype).digest
        self._look("judge", (*names, "evaluate"), digest, costs.judge() if costs else None)

    def _refits(
        self, chosen: Chosen | None, adapters: Mapping[str, Adapter], after: tuple[str, ...]
    ) -> dict[str, Adapter] | None:
        """Steps of the refit, if one is asked for; the members it makes, ``None`` if one of them is not there yet."""
        recipe, refitted = self.recipe, dict[str, Adapter]()
        if not recipe.fusion.refit:
            return refitted
        stages = acting(recipe, chosen.weights if chosen else dict.fromkeys(recipe.members, 1.0))
        for stage in stages:
            name = f"refit:{stage.name}"
            inner = [other.name for other in stages if other.name in stage.context]
            needs = ("data", stage.name, *(f"refit:{other}" for other in inner), *(n for n in after if n == "search"))
            if self.prepared is None or self.costs is None:
                self.add(PlannedStep(name, "stage", needs, "to do"))
                continue
            inputs, (outlook, cost) = None, self.costs.stage(stage)
            if chosen is not None and stage.name in self.trained and {*inner} <= refitted.keys():
                training = self.trained[stage.name].training
                inputs = refit_inputs(self.prepared, stage, training, adapters, refitted)
                outlook, cost = self.costs.refit(inputs)
            made = self.training(self.prepared, name, needs, inputs, outlook, cost)
            if made is not None:
                refitted[stage.name] = made.adapter
        if len(refitted) < len(stages):
            return None
        return {name: adapter for name, adapter in refitted.items() if name in recipe.members}

    def _look(
        self, kind: str, needs: tuple[str, ...], digest: str, cost: Cost | None, name: str = "", note: str = ""
    ) -> Step | None:
        """Add a step that is looked up by its digest, where that is known already; ``note`` is of one still to do."""
        step = self.cache.lookup(kind, digest) if digest else None
        planned = PlannedStep(name or kind, kind, needs, "cached" if step else "to do", digest=digest)
        planned = replace(planned, note="" if step else note)
        if cost is not None:
            planned = replace(planned, seconds=0.0 if step else cost.seconds, memory=cost.memory)
        self.add(planned)
        return step

    def counts(self, stage: Stage) -> dict[str, int]:
        """Examples by part of a stage whose data is here although something else is not; else empty."""
        try:
            loaded = [
                load_examples(entry.spec(), stage.task, relative_to=self.recipe.directory, fetch=False)
                for entry in stage.data
            ]
        except NotHereError:
            return {}
        parts = split([example for found in loaded for example in found.examples], split_spec(self.recipe)).parts()
        return {part: len(examples) for part, examples in parts}

    def add(self, step: PlannedStep) -> None:
        self.steps.append(step)

    def plan(self) -> Plan:
        ratio = median(self.ratios) if self.ratios else 1.0
        steps = [
            replace(step, seconds=step.seconds * ratio) if step.kind == "stage" and step.seconds else step
            for step in self.steps
        ]
        counted = [step for step in steps if step.memory and step.state != "cached"]
        if self.device.type != "cpu":  # the device's own memory: fusion and merge work in the machine's
            counted = [step for step in counted if step.kind not in ("fuse", "merge")]
        memory = max((step.memory for step in counted if step.memory), default=None)
        return Plan(
            recipe=self.recipe.name,
            base=self.recipe.base,
            parameters=self.shape.parameters if self.shape else None,
            device=str(self.device),
            dtype=self.format.name,
            steps=tuple(steps),
            machine=self.machine if self.costs else None,
            seconds=sum(step.seconds or 0.0 for step in steps) if self.costs else None,
            memory=memory,
            notes=tuple(self._notes(memory, ratio)),
            suggestions=self.prepared.suggestions if self.prepared else {},
        )

    def _notes(self, memory: float | None, ratio: float) -> list[str]:
        if self.costs is None or self.machine is None:
            notes = ["Something is to be fetched first; `lorchestra check` fetches it and looks at the data."]
            if any(map(self.recipe.open_keys, self.recipe.stages)):
                notes.append("Settings that the recipe leaves open are settled from the examples, once these are here.")
            return notes
        if all(step.finished for step in self.steps):
            publishes = ", and publishes" if self.recipe.deliver.publish else ""
            return [f"Every step is cached: a run only writes its report{publishes}."]
        notes = [self.costs.basis()]
        if self.ratios:
            count = f"{len(self.ratios)} stage{'s' if len(self.ratios) > 1 else ''}"
            factor = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
            notes.append(f"Stages' times are multiplied by {factor}, as {count} of this recipe went so far.")
        if memory and self.machine.memory and memory > 0.9 * self.machine.memory:
            notes.append(
                f"About {memory / 1e9:.1f} GB may be needed, and {self.device} has {self.machine.memory / 1e9:.1f} GB: "
                "lower train.batch_size or max_length, or set train.gradient_checkpointing: true."
            )
        return notes
