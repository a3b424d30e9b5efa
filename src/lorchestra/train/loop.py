"""The training loop: one member, one objective, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorchestra.bank import Bank, TrainableMember
from lorchestra.errors import TrainingError, UserError
from lorchestra.events import Reporter, Task
from lorchestra.train.checkpoint import Checkpoints, Progress
from lorchestra.train.context import final_weights, weights_at
from lorchestra.train.objectives import StageObjective
from lorchestra.train.orthogonality import penalty, project_gradients
from lorchestra.train.schedule import BatchPlan
from lorchestra.train.settings import ContextMember, Orthogonality, TrainSettings


class Loop:
    """Trains the bank's trainable member ``name``; see :meth:`run`.

    Args:
        bank: holds the context, frozen, and the trainable member.
        name: the trainable member's name.
        member: its factors.
        objective: batches, loss and validation.
        plan: which items each step sees.
        settings: optimiser, schedule, how often to validate and to save.
        orthogonality: optional penalty or projection.
        context: name → schedule of each context member.
        bases: module path → orthonormal rows of the context's row space (for ``against_context``).
        directory: where checkpoints live until the stage is finished.
        reporter: progress and events.
        log_directory: where trackers write.
    """

    def __init__(
        self,
        bank: Bank,
        name: str,
        member: TrainableMember,
        objective: StageObjective,
        plan: BatchPlan,
        settings: TrainSettings,
        orthogonality: Orthogonality,
        context: Mapping[str, ContextMember],
        bases: Mapping[str, torch.Tensor],
        directory: Path,
        reporter: Reporter,
        log_directory: Path | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from transformers import get_scheduler

        self.bank, self.name, self.member = bank, name, member
        self.objective, self.plan, self.settings = objective, plan, settings
        self.orthogonality, self.context, self.bases = orthogonality, context, bases
        self.reporter = reporter
        self.checkpoints = Checkpoints(directory)
        reference = next(bank.model.parameters())
        AcceleratorState._reset_state()  # it outlives its accelerator, and the stage before may have had another dtype
        self.accelerator = Accelerator(
            cpu=reference.device.type == "cpu",
            # Half-precision activations need a scaled loss; the float32 masters are unscaled before the step.
            mixed_precision="fp16" if reference.dtype == torch.float16 else "no",
            log_with=list(settings.report_to) or None,
            project_dir=str(log_directory) if log_directory else None,
        )
        optimizer = torch.optim.AdamW(
            member.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=reference.device.type in ("cpu", "cuda"),
        )
        scheduler = get_scheduler(
            settings.scheduler,
            optimizer,
            num_warmup_steps=round(settings.warmup_ratio * plan.steps),
            num_training_steps=plan.steps,
        )
        _, self.optimizer, self.scheduler = self.accelerator.prepare(member, optimizer, scheduler)
        # Of this process, validation apart: what "tokens/s" shows.
        self._trained, self._training = 0, 0.0

    def run(self) -> Progress:
        """Train to the end from the newest checkpoint; the member is left with the best validated factors.

        Raises:
            TrainingError: the loss or a gradient is not finite.
        """
        progress = self.checkpoints.restore(self.accelerator)
        if self.settings.report_to:
            # Trackers take plain scalars only.
            settings = self.settings.model_dump(mode="json").items()
            scalars = {k: v for k, v in settings if isinstance(v, (str, int, float))}
            self.accelerator.init_trackers("lorchestra", {"stage": self.name, **scalars})
        self.member.train()
        with self.reporter.task(f"train {self.name}", self.plan.steps, "step") as task:
            if progress.step:
                task.advance(progress.step)
                self.reporter.say(f"{self.name}: resumed after step {progress.step} of {self.plan.steps}")
            elif not progress.validation:
                self._validate(progress)
            while progress.step < self.plan.steps and not progress.stopped:
                self._advance(progress, task)
        if progress.best_step is not None:
            self.checkpoints.load_best(self.member, progress.best_step)
        self.member.eval()
        if self.settings.report_to:
            self.accelerator.end_training()
        self.accelerator.free_memory()
        return progress

    def _advance(self, progress: Progress, task: Task) -> None:
        """One optimiser step, with its validation and checkpoint where they are due."""
        started = time.perf_counter()
        row = self._step(progress.step)
        self._trained += row["tokens"]
        self._training += time.perf_counter() - started
        progress.step += 1
        progress.tokens += row["tokens"]
        every = self.settings.eval_every or self.plan.steps_per_epoch
        last = progress.step == self.plan.steps
        validated = last or progress.step % every == 0
        if validated:
            self._validate(progress)
        progress.seconds += time.perf_counter() - started
        progress.history.append(row)
        self.reporter.event("train_step", stage=self.name, **row)
        if self.settings.report_to:
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=progress.step)
        task.advance(1, loss=row["loss"], tokens_per_s=self._trained / self._training)
        if validated or progress.step % self.settings.checkpoint_every == 0:
            self.checkpoints.save(self.accelerator, progress)
            if progress.best_step is not None:
                self.checkpoints.drop_best(keep=progress.best_step)

    def _step(self, step: int) -> dict[str, Any]:
        """Forward, backward and update of optimiser step ``step`` (from 0); returns its row of the history."""
        weights = weights_at(self.context, step / self.plan.steps)
        micro_batches = [self.objective.pack(indices) for indices in self.plan.step(step)]
        total = sum(self.objective.weight(packed) for packed in micro_batches)
        row: dict[str, Any] = {"step": step + 1, "loss": 0.0}
        with self.bank.using({**weights, self.name: 1.0}):
            for packed in micro_batches:
                micro = self.objective.micro(packed, total)
                self.accelerator.backward(micro.loss)
                row["loss"] += float(micro.loss.detach())
                for key, value in micro.figures.items():
                    row[key] = row.get(key, 0.0) + value / total
        if self.orthogonality.mode == "penalty":
            extra = penalty(self.member, self.bases)
            self.accelerator.backward(self.orthogonality.weight * extra)
            row["orthogonality"] = float(extra.detach())
        parameters = list(self.member.parameters())
        limit = self.settings.max_grad_norm or math.inf
        row["gradient_norm"] = float(self.accelerator.clip_grad_norm_(parameters, limit))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            self._not_finite(row)
            row["gradient_norm"] = None  # JSON has no infinity
        if self.orthogonality.mode == "projection":
            project_gradients(self.member, self.bases)
            with torch.no_grad():
                row["orthogonality"] = float(penalty(self.member, self.bases))
        row["learning_rate"] = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        row["tokens"] = sum(self.objective.tokens(packed) for packed in micro_batches)
        if weights:
            row["context"] = weights
        return row

    def _not_finite(self, row: dict[str, Any]) -> None:
        # A scaled half-precision loss may overflow in its first steps: the scaler then skips the step by itself.
        # On a CPU accelerate has none, and nothing would.
        if self.accelerator.scaler is not None and math.isfinite(row["loss"]):
            return
        raise TrainingError(
            f"stage {self.name!r}: loss {row['loss']}, gradient norm {row['gradient_norm']} at step {row['step']}. "
            f"Training diverged; lower learning_rate (now {self.settings.learning_rate:g}) or alpha"
        )

    def _validate(self, progress: Progress) -> None:
        """Validation loss at the schedules' final weights; the best factors are kept."""
        self.member.eval()
        with self.bank.using({**final_weights(self.context), self.name: 1.0}):
            loss = self.objective.validate()
        self.member.train()
        if loss is None:
            return
        progress.validation.append({"step": progress.step, "loss": loss})
        self.reporter.event("validation", stage=self.name, step=progress.step, loss=loss)
        if progress.step == 0:
            return  # where it started, for the curve: an untrained adapter is no candidate
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.waited = loss, progress.step, 0
            self.checkpoints.save_best(self.member, progress.step)
        else:
            progress.waited += 1
            progress.stopped = self.settings.patience is not None and progress.waited >= self.settings.patience


def refuse_absent_trackers(wanted: Sequence[str]) -> None:
    """accelerate leaves out a tracker that is not installed without a word; a user who asked for it should know.

    Raises:
        UserError: a tracker whose package is not there.
    """
    from accelerate.tracking import get_available_trackers

    there = {tracker.value for tracker in get_available_trackers()}
    if absent := [name for name in wanted if name not in there]:
        raise UserError(
            f"report_to: {', '.join(absent)} is not installed here; `pip install {' '.join(absent)}`, or leave it out"
        )
