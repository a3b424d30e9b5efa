"""One stage: base + frozen context → one new adapter, and proof that nothing else changed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.digest import adapter_digest, tensor_bytes
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.bank import Bank
from lorchestra.base.allocator import freed_memory_kept
from lorchestra.base.nf4 import scales
from lorchestra.data.render import Rendered
from lorchestra.errors import DivergedError, TrainingError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.objective.attention import quick_attention
from lorchestra.objective.norm import quick_norms
from lorchestra.train.checkpoint import Progress
from lorchestra.train.context import final_weights, first_weights
from lorchestra.train.loop import Loop, refuse_absent_trackers
from lorchestra.train.lora import new_member
from lorchestra.train.objectives import Layout, PreferenceObjective, SftObjective
from lorchestra.train.orthogonality import leave_context, row_bases
from lorchestra.train.schedule import BatchPlan
from lorchestra.train.settings import ContextMember, LoraSettings, Objective, TrainSettings


@dataclass(frozen=True)
class StageInputs:
    """Everything a stage depends on.

    Args:
        name: of the stage and of its adapter.
        objective: sft or dpo, and its numbers.
        lora: the new adapter.
        train: how it is trained.
        items: rendered training items (one branch for sft; chosen and rejected for dpo).
        validation: rendered items for early stopping; may be empty.
        context: name → (adapter, its schedule), in order.
        init_seed: of the new adapter's factors.
        data_seed: of the order of the data and of dropout.
        data: name → digest of the data, for the lineage.
        salt: what A is drawn by beside ``init_seed``, so that stages start apart; empty: the name.
        stop: end after this step, with the schedules of the whole; ``None``: go to the end.
        quantised: how the base is held while this trains (``nf4``), for the lineage; empty: plain.
    """

    name: str
    objective: Objective
    lora: LoraSettings
    train: TrainSettings
    items: Sequence[Rendered]
    validation: Sequence[Rendered]
    context: Mapping[str, tuple[Adapter, ContextMember]]
    init_seed: int = 0
    data_seed: int = 0
    data: Mapping[str, str] | None = None
    salt: str = ""
    stop: int | None = None
    quantised: str = ""


@dataclass(frozen=True)
class StageResult:
    """The new adapter (best validated factors, scale folded in), how training went, and what was trained."""

    adapter: Adapter
    progress: Progress
    steps: int
    steps_per_epoch: int
    trainable: int
    first_preference_loss: float | None


def train_stage(
    model: nn.Module,
    base: BaseId,
    pad_id: int,
    inputs: StageInputs,
    directory: Path,
    *,
    reporter: Reporter = SILENT,
    log_directory: Path | None = None,
    pause: float | None = None,
) -> StageResult:
    """Train one new adapter on a frozen model beside its frozen context.

    Args:
        model: a frozen transformers causal language model in eval mode; it is left as it was.
        base: its fingerprint.
        pad_id: token id for padding.
        inputs: see :class:`StageInputs`.
        directory: for checkpoints (created; the caller removes it when the result is safe). Running again
            with the same directory and inputs goes on from the newest checkpoint and ends bitwise the same on
            a CPU.
        reporter: progress and events.
        log_directory: where trackers (``report_to``) write.
        pause: stop at the first validation after this share of the steps; the same call without it goes on.

    Raises:
        UserError: no training items, or a tracker that is not installed.
        PausedError: as asked; what is done is checkpointed in ``directory``.
        TrainingError: a law does not hold (frozen tensors changed, the preference law), or training diverged.
    """
    if not inputs.items:
        raise UserError(f"stage {inputs.name!r} has no training items")
    refuse_absent_trackers(inputs.train.report_to)
    directory.mkdir(parents=True, exist_ok=True)
    before = frozen_digest(model, reporter, "hash the frozen base")
    bank = Bank(model, base)
    schedules = {name: member for name, (_, member) in inputs.context.items()}
    with freed_memory_kept(), quick_attention(model), quick_norms(model), _unmounted(bank):
        layout = Layout.of(model, pad_id)
        for name, (adapter, _) in inputs.context.items():
            bank.load(name, adapter)
        context_before = _context_digest(bank, inputs)
        member = new_member(model, inputs.lora, inputs.init_seed, inputs.salt or inputs.name).to(layout.device)
        bank.mount_trainable(inputs.name, member)
        objective: SftObjective | PreferenceObjective
        validation = list(inputs.validation)[: inputs.train.eval_limit]
        if inputs.objective.task == "sft":
            objective = SftObjective(model, layout, inputs.items, validation)
        else:
            objective = PreferenceObjective(model, layout, inputs.items, validation, inputs.objective)
        plan = BatchPlan(objective.lengths, inputs.train, inputs.data_seed, objective.fixed, inputs.stop)
        first_loss = None
        if isinstance(objective, PreferenceObjective):
            fresh = not any(directory.glob("step-*"))
            start = first_weights(schedules)
            objective.score_reference(bank, start, plan.composition(), directory / "reference.safetensors", reporter)
            first_loss = objective.assert_preference_law(bank, inputs.name, start, plan.composition(), fresh)
            reporter.event("preference_law", stage=inputs.name, loss=first_loss)
        bases: dict[str, torch.Tensor] = {}
        if inputs.lora.orthogonality.against_context:
            bases = {path: Q.to(layout.device) for path, Q in row_bases(_context_rows(inputs.context)).items()}
            if inputs.lora.orthogonality.mode == "projection":
                leave_context(member, bases)
        torch.manual_seed(inputs.data_seed)
        with _nothing_kept(directory):
            with _checkpointing(model, inputs.train.gradient_checkpointing):
                loop = Loop(
                    bank, inputs.name, member, objective, plan, inputs.train, inputs.lora.orthogonality,
                    schedules, bases, directory, reporter, log_directory, pause,
                )  # fmt: skip
                progress = loop.run()
            bank.check()
            if _context_digest(bank, inputs) != context_before:
                raise TrainingError(f"stage {inputs.name!r} changed its frozen context; its adapter is not kept")
        modules = member.folded()
    with _nothing_kept(directory):
        if frozen_digest(model, reporter, "compare the frozen base") != before:
            raise TrainingError(f"stage {inputs.name!r} changed a tensor of the frozen base; its adapter is not kept")
    lineage = stage_lineage(inputs, progress.best_loss, progress.best_step)
    adapter = Adapter(modules, base, lineage, _transposed(model, modules))
    trainable = sum(p.numel() for p in member.parameters())
    return StageResult(adapter, progress, plan.last, plan.steps_per_epoch, trainable, first_loss)


def frozen_digest(model: nn.Module, reporter: Reporter = SILENT, task: str = "digest of the base") -> str:
    """SHA-256 over every parameter, buffer and scale of a packed weight of ``model``, by name.

    ``task`` is what the progress is called.
    """
    sha = hashlib.sha256()
    tensors = sorted((*model.named_parameters(), *model.named_buffers(), *scales(model)))
    with reporter.task(task, sum(tensor.nbytes for _, tensor in tensors), "B") as progress:
        for name, tensor in tensors:
            sha.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            if tensor.numel():
                sha.update(tensor_bytes(tensor))
            progress.advance(tensor.nbytes)
    return sha.hexdigest()


def _context_digest(bank: Bank, inputs: StageInputs) -> str:
    """SHA-256 over the context's adapters and over their mounted copies (on a CPU in float32 these are the same)."""
    sha = hashlib.sha256()
    for name, (adapter, _) in inputs.context.items():
        sha.update(adapter_digest(adapter.modules).encode())
        mounted = {path: layer.frozen[name] for path, layer in bank.layers().items() if name in layer.frozen}
        sha.update(adapter_digest(mounted).encode())
    return sha.hexdigest()


def _context_rows(context: Mapping[str, tuple[Adapter, ContextMember]]) -> dict[str, list[torch.Tensor]]:
    rows: dict[str, list[torch.Tensor]] = {}
    for adapter, _ in context.values():
        for path, update in adapter.modules.items():
            rows.setdefault(path, []).append(update.A)
    return rows


def stage_lineage(inputs: StageInputs, best_loss: float | None, best_step: int | None) -> Lineage:
    """Where the adapter of a stage comes from; ``best_loss`` and ``best_step`` are of its validation."""
    schedules = {name: member for name, (_, member) in inputs.context.items()}
    final = final_weights(schedules)
    settings: dict[str, Any] = {
        "objective": inputs.objective.model_dump(mode="json"),
        "lora": inputs.lora.model_dump(mode="json"),
        "train": inputs.train.model_dump(mode="json", exclude={"report_to", "checkpoint_every"}),
        "context": {name: member.model_dump(mode="json") for name, member in schedules.items()},
        "seeds": {"init": inputs.init_seed, "data": inputs.data_seed},
    }
    if inputs.stop is not None:
        settings["stop"] = inputs.stop
    if inputs.quantised:
        settings["base_quantised"] = inputs.quantised
    return Lineage(
        made_by="stage",
        name=inputs.name,
        task=inputs.objective.task,
        context=tuple(Parent(name, inputs.context[name][0].digest, weight) for name, weight in final.items()),
        data=dict(inputs.data or {}),
        settings=settings,
        metrics={"validation_loss": best_loss, "best_step": best_step},
        tools=_tools(),
    )


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lorchestra", "torch", "transformers", "accelerate")}


def _transposed(model: nn.Module, modules: Mapping[str, Any]) -> frozenset[str]:
    """Modules that the base stores transposed; transformers notes what a packed module was made from."""
    found = {path: model.get_submodule(path) for path in modules}
    kinds = {path: getattr(module, "source_cls", type(module)) for path, module in found.items()}
    return frozenset(path for path, kind in kinds.items() if kind.__name__ == "Conv1D")


@contextmanager
def _nothing_kept(directory: Path) -> Iterator[None]:
    """If a law is broken inside, checkpoints go too: from them the next run would deliver what this one refused."""
    try:
        yield
    except DivergedError:
        raise
    except TrainingError:
        shutil.rmtree(directory)
        raise


@contextmanager
def _unmounted(bank: Bank) -> Iterator[None]:
    """Afterwards the bank's model is the one that was given."""
    try:
        yield
    finally:
        bank.unmount()


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Recompute activations in the backward pass; the model otherwise stays in eval mode (no dropout in the base)."""
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True  # this flag alone, not its submodules: transformers checkpoints layers that train
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()
