"""The training loop: one member, one objective, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lorchestra.bank import Bank, TrainableMember
from lorchestra.errors import DivergedError, Interrupted, PausedError, UserError
from lorchestra.events import Reporter, Task
from lorchestra.train.checkpoint import Checkpoints, Progress
from lorchestra.train.context import final_weights, progress_at, weights_at
from lorchestra.train.interrupt import Interrupts
from lorchestra.train.objectives import StageObjective
from lorchestra.train.orthogonality import penalty, project_gradients
from lorchestra.train.schedule import BatchPlan
from lorchestra.train.settings import ContextMember, Orthogonality, TrainSettings

SMOOTHED = 20  # steps that the shown training loss is a mean of


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
        pause: stop at the first validation after this share of the steps, to go on another time.
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
        pause: float | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from transformers import get_scheduler

        self.bank, self.name, self.member = bank, name, member
        self.objective, self.plan, self.settings = objective, plan, settings
        self.orthogonality, self.context, self.bases = orthogonality, context, bases
        self.reporter = reporter
        self.interrupts = Interrupts(self._held_back)
        self.checkpoints = Checkpoints(directory)
        reference = next(bank.model.parameters())
        AcceleratorState._reset_state()  # it outlives its accelerator, and the stage before may have had another dtype
        self.accelerator = Accelerator(
            cpu=reference.device.type == "cpu",
            # Half-precision activations need a scaled loss; the float32 masters are unscaled before the step.
            mixed_precision="fp16" if reference.dtype == torch.float16 else "no",
            log_with=list(settings.report_to) or None,
            project_dir=str(log_directory) if log_directory else None,
            device_placement=False,  # the member is where the base is; accelerate would choose its own, say cuda:0
        )
        self.log_directory = log_directory
        self.pause = pause
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
            DivergedError: the loss or a gradient is not finite.
            Interrupted: Ctrl-C; the last whole step is checkpointed.
            PausedError: as asked; the last step is checkpointed.
        """
        progress = self.checkpoints.restore(self.accelerator)
        self._start_trackers()
        self.member.train()
        if progress.step:
            self.reporter.say(f"{self.name}: resumed after step {progress.step} of {self.plan.last}")
        try:
            with self.interrupts.watched():
                if self._validation_is_due(progress):  # before the first step, or where a stop came before it
                    self._validate(progress)
                with self.reporter.task(f"train {self.name}", self.plan.last, "step") as task:
                    if progress.step:
                        task.advance(progress.step)
                    while progress.step < self.plan.last and not progress.stopped:
                        self._pause_if_due(progress)
                        self._advance(progress, task)
        except KeyboardInterrupt:
            raise Interrupted(self._stop(progress)) from None
        except DivergedError as error:
            rows = tuple((row["step"], row["loss"]) for row in progress.validation)
            raise DivergedError(str(error), error.step, self.plan.last, rows) from None
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
        with self.interrupts.held():
            row = self._step(progress.step)
            progress.step += 1
            progress.tokens += row["tokens"]
            progress.history.append(row)
            spent = time.perf_counter() - started
            progress.seconds += spent
        self._trained += row["tokens"]
        self._training += spent
        self.reporter.event("train_step", stage=self.name, **row)
        context = {f"context/{name}": weight for name, weight in row.get("context", {}).items()}
        self._track({key: value for key, value in row.items() if isinstance(value, float)} | context, progress.step)
        task.advance(1, training_loss=smoothed_loss(progress.history), tokens_per_s=self._trained / self._training)
        self.interrupts.answer()
        validated = self._validation_is_due(progress)
        if validated:
            self._validate(progress)
            if progress.validation:
                task.advance(0, validation_loss=progress.validation[-1]["loss"])
        if validated or progress.step % self.settings.checkpoint_every == 0:
            self._save(progress)

    def _pause_if_due(self, progress: Progress) -> None:
        """At the first validation that is due (a checkpoint is made with it), also if an earlier try went beyond it."""
        if self.pause is None:
            return
        for row in progress.validation:
            if row["step"] and row["step"] >= self.pause * self.plan.last:
                raise PausedError(row["step"], self.plan.last, row["loss"])

    def _start_trackers(self) -> None:
        """One run of each tracker a stage, under the stage's name.

        Raises:
            UserError: a tracker will not start (no login, a server that is away, a store it does not take).
        """
        if not self.settings.report_to:
            return
        wandb = {"name": self.name}
        if self.log_directory is not None:  # else W&B writes to where one happens to stand
            self.log_directory.mkdir(parents=True, exist_ok=True)
            wandb["dir"] = str(self.log_directory)
        settings = self.settings.model_dump(mode="json").items()
        scalars = {k: v for k, v in settings if isinstance(v, (str, int, float))}  # trackers take nothing else
        options = {"wandb": wandb, "mlflow": {"run_name": self.name}}
        try:
            self.accelerator.init_trackers("lorchestra", {"stage": self.name, **scalars}, options)
        except OSError:
            raise
        except Exception as error:  # each tracker raises what it likes
            wanted = ", ".join(self.settings.report_to)
            raise UserError(f"report_to: {wanted} cannot be started: {error}\nMend this, or leave it out") from error

    def _track(self, figures: Mapping[str, float], step: int) -> None:
        """Pass ``figures`` of step ``step`` on to the trackers."""
        if self.settings.report_to:
            self.accelerator.log(dict(figures), step=step)

    def _save(self, progress: Progress) -> None:
        with self.interrupts.held():
            self.checkpoints.save(self.accelerator, progress)
            if progress.best_step is not None:
                self.checkpoints.drop_best(keep=progress.best_step)
        self.interrupts.answer()

    def _step(self, step: int) -> dict[str, Any]:
        """Forward, backward and update of optimiser step ``step`` (from 0); returns its row of the history."""
        weights = weights_at(self.context, progress_at(step, self.plan.steps))
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
        raise DivergedError(
            f"stage {self.name!r}: loss {row['loss']}, gradient norm {row['gradient_norm']} at step {row['step']}. "
            f"Training diverged; lower learning_rate (now {self.settings.learning_rate:g}) or alpha",
            row["step"],
        )

    def _validation_is_due(self, progress: Progress) -> bool:
        """Before the first step, every ``eval_every`` steps (an epoch) and after the last; once each."""
        every = self.settings.eval_every or self.plan.steps_per_epoch
        due = progress.step % every == 0 or progress.step == self.plan.last
        return due and not any(row["step"] == progress.step for row in progress.validation)

    def _validate(self, progress: Progress) -> None:
        """Validation loss at the schedules' final weights; the best factors are kept."""
        started = time.perf_counter()
        self.member.eval()
        with self.bank.using({**final_weights(self.context), self.name: 1.0}):
            loss = self.objective.validate(self.reporter)
        self.member.train()
        if loss is None:
            return
        if progress.step and not math.isfinite(loss):
            raise DivergedError(
                f"{self.name}: validation loss {loss} after step {progress.step}. Training diverged; lower "
                f"learning_rate (now {self.settings.learning_rate:g}) or alpha",
                progress.step,
            )
        self.reporter.event("validation", stage=self.name, step=progress.step, loss=loss)
        self._track({"validation_loss": loss}, progress.step)
        with self.interrupts.held():
            progress.seconds += time.perf_counter() - started
            progress.validation.append({"step": progress.step, "loss": loss})
            if progress.step:  # an untrained adapter is no candidate: its loss only says where the curve starts
                self._judge(progress, loss)
        self.interrupts.answer()

    def _judge(self, progress: Progress, loss: float) -> None:
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.waited = loss, progress.step, 0
            self.checkpoints.save_best(self.member, progress.step)
        else:
            progress.waited += 1
            progress.stopped = self.settings.patience is not None and progress.waited >= self.settings.patience

    def _held_back(self) -> None:
        self.reporter.say("stopping after this step; Ctrl-C again stops at once")

    def _stop(self, progress: Progress) -> str:
        """Checkpoint what is whole and not kept yet; says from where the next run goes on."""
        kept = self.checkpoints.newest()
        if self.interrupts.whole and progress.step > kept:
            self.checkpoints.save(self.accelerator, progress)
            kept = progress.step
        self.reporter.event("stopped", stage=self.name, step=kept)
        if not kept:
            return f"stopped before the first step of {self.name} was done; the same command begins it again"
        steps = f"{kept} of {self.plan.last} steps of {self.name}"
        return f"stopped; {steps} are kept, and the same command goes on from there"


def smoothed_loss(history: Sequence[Mapping[str, Any]]) -> float:
    """Mean training loss of the last :data:`SMOOTHED` steps: that of one step is its few examples' luck."""
    return fmean(row["loss"] for row in history[-SMOOTHED:])


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
