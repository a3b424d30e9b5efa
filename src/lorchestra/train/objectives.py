"""What a stage optimises, batch by batch: supervised answers, or preference pairs against a cached reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorchestra.bank import Bank
from lorchestra.data.render import Rendered
from lorchestra.errors import TrainingError
from lorchestra.events import Reporter
from lorchestra.objective.batch import Batch, batches, length, pack
from lorchestra.objective.logprobs import branch_logprobs, flat_is_exact, tree_is_exact
from lorchestra.objective.losses import preference_at_zero, preference_terms, sft_loss
from lorchestra.train.settings import Objective

# Positions (padding included) of a forward pass without gradients: large enough for full GEMMs on any device.
VALIDATION_TOKENS = 4096


@dataclass(frozen=True)
class Layout:
    """How items become batches on this model: device, padding, shared prompts of branches, one row instead of many."""

    device: torch.device
    pad_id: int
    tree: bool
    flat: bool

    @classmethod
    def of(cls, model: nn.Module, pad_id: int) -> Layout:
        """The layout that is exact on ``model``."""
        return cls(next(model.parameters()).device, pad_id, tree_is_exact(model), flat_is_exact(model))

    def pack(self, items: Sequence[Rendered]) -> Batch:
        """One batch of ``items``, in order."""
        return pack(items, self.pad_id, self.device, self.tree, self.flat)


@dataclass(frozen=True)
class Micro:
    """One micro-batch's share of the loss, and sums of what is worth logging (divided by the step's total later)."""

    loss: Tensor
    figures: Mapping[str, float]


class StageObjective(Protocol):
    """What the training loop needs to know of a task."""

    @property
    def fixed(self) -> bool:
        """Whether micro-batches keep their composition over all epochs."""

    @property
    def lengths(self) -> Sequence[int]:
        """Positions of each training item."""

    def pack(self, indices: Sequence[int]) -> Any:
        """A micro-batch of training items, ready for :meth:`micro`."""

    def weight(self, packed: Any) -> int:
        """What a micro-batch counts in the step's mean: supervised tokens, or pairs."""

    def tokens(self, packed: Any) -> int:
        """Tokens that are not padding."""

    def micro(self, packed: Any, total: int) -> Micro:
        """Forward pass; the losses of a step's micro-batches, each with the step's ``total``, add up to its mean."""

    def validate(self, reporter: Reporter) -> float | None:
        """Mean loss on the validation items under the present selection; ``None`` without such items."""


class SftObjective:
    """Negative log-likelihood of the supervised tokens."""

    fixed = False

    def __init__(
        self, model: nn.Module, layout: Layout, items: Sequence[Rendered], validation: Sequence[Rendered]
    ) -> None:
        self.model = model
        self.layout = layout
        self.items = items
        self.validation = validation
        self.lengths = [length(item) for item in items]

    def pack(self, indices: Sequence[int]) -> Batch:
        return self.layout.pack([self.items[i] for i in indices])

    def weight(self, packed: Batch) -> int:
        return packed.supervised

    def tokens(self, packed: Batch) -> int:
        return packed.tokens

    def micro(self, packed: Batch, total: int) -> Micro:
        return Micro(sft_loss(branch_logprobs(self.model, packed), total), {})

    @torch.no_grad()
    def validate(self, reporter: Reporter) -> float | None:
        if not self.validation:
            return None
        loss, tokens = 0.0, 0
        held_out = batches(self.validation, VALIDATION_TOKENS, self.layout.tree)
        with reporter.task("validation", len(held_out), "batch") as task:
            for indices in held_out:
                packed = self.layout.pack([self.validation[i] for i in indices])
                loss -= float(branch_logprobs(self.model, packed).sums.cpu().double().sum())  # MPS has no float64
                tokens += packed.supervised
                task.advance(loss=loss / max(tokens, 1))
        return loss / max(tokens, 1)


class PreferenceObjective:
    """DPO or IPO. The reference is scored once, in the very batches that training uses, and cached."""

    fixed = True

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        items: Sequence[Rendered],
        validation: Sequence[Rendered],
        settings: Objective,
    ) -> None:
        self.model = model
        self.layout = layout
        self.items = items
        self.validation = validation
        self.settings = settings
        self.lengths = [length(item, layout.tree) for item in items]
        self.reference = torch.zeros(0, 2)
        self.validation_reference = torch.zeros(0, 2)

    def pack(self, indices: Sequence[int]) -> tuple[Batch, Tensor]:
        batch = self.layout.pack([self.items[i] for i in indices])
        return batch, self.reference[list(indices)].reshape(-1).to(self.layout.device)

    def weight(self, packed: tuple[Batch, Tensor]) -> int:
        return packed[0].item.numel() // 2

    def tokens(self, packed: tuple[Batch, Tensor]) -> int:
        return packed[0].tokens

    def micro(self, packed: tuple[Batch, Tensor], total: int) -> Micro:
        batch, reference = packed
        terms = preference_terms(branch_logprobs(self.model, batch), reference, **self._loss())
        figures = {"accuracy": float(terms.preferred.sum()), "margin": float(terms.margin.detach().sum())}
        return Micro(terms.loss.sum() / total, figures)

    @torch.no_grad()
    def validate(self, reporter: Reporter) -> float | None:
        if not self.validation:
            return None
        loss, pairs = 0.0, 0
        held_out = batches(self.validation, VALIDATION_TOKENS, self.layout.tree)
        with reporter.task("validation", len(held_out), "batch") as task:
            for indices in held_out:
                batch = self.layout.pack([self.validation[i] for i in indices])
                reference = self.validation_reference[indices].reshape(-1).to(self.layout.device)
                terms = preference_terms(branch_logprobs(self.model, batch), reference, **self._loss())
                loss += float(terms.loss.cpu().double().sum())
                pairs += len(indices)
                task.advance(loss=loss / pairs)
        return loss / len(self.validation)

    @torch.no_grad()
    def score_reference(
        self,
        bank: Bank,
        weights: Mapping[str, float],
        composition: Sequence[Sequence[int]],
        cache: Path,
        reporter: Reporter,
    ) -> None:
        """Log-probabilities of every branch under base + context at ``weights``, read from ``cache`` if they are there.

        Args:
            bank: holds the context.
            weights: the context's weights as the stage starts.
            composition: the micro-batches of training.
            cache: a safetensors file.
            reporter: hears of the progress.
        """
        from safetensors.torch import load_file, save_file

        if cache.exists():
            stored = load_file(cache)
            self.reference, self.validation_reference = stored["train"], stored["validation"]
            return
        held_out = batches(self.validation, VALIDATION_TOKENS, self.layout.tree)
        self.reference = torch.zeros(len(self.items), 2)
        self.validation_reference = torch.zeros(len(self.validation), 2)
        with (
            bank.using(weights),
            reporter.task("reference", len(composition) + len(held_out), "batch") as task,
        ):
            for indices in composition:
                scores = branch_logprobs(self.model, self.layout.pack([self.items[i] for i in indices]))
                self.reference[list(indices)] = scores.sums.cpu().reshape(-1, 2)
                task.advance()
            for indices in held_out:
                scores = branch_logprobs(self.model, self.layout.pack([self.validation[i] for i in indices]))
                self.validation_reference[indices] = scores.sums.cpu().reshape(-1, 2)
                task.advance()
        partial = cache.with_suffix(".partial")
        save_file({"train": self.reference, "validation": self.validation_reference}, partial)
        partial.replace(cache)

    @torch.no_grad()
    def assert_preference_law(
        self,
        bank: Bank,
        name: str,
        weights: Mapping[str, float],
        composition: Sequence[Sequence[int]],
        fresh: bool,
    ) -> float:
        """Design's preference law, on the first micro-batch; returns the loss that was found.

        A fresh adapter acts (its B is zero); on a resume it is switched off instead, which tests that the cached
        reference still belongs to this model and context.

        Raises:
            TrainingError: a branch's log-probability is not its reference, the loss is not ln 2 (or 1/(4β²)), or the
                reference equals the bare base although a context acts.
        """
        packed = self.pack(composition[0])
        with bank.using({**weights, name: 1.0} if fresh else weights):
            scores = branch_logprobs(self.model, packed[0])
        found = float(preference_terms(scores, packed[1], **self._loss()).loss.mean())
        expected = preference_at_zero(self.settings.loss, self.settings.beta)
        # Branch by branch: a mean would hide errors that cancel. It is the batch that was scored, so rounding is alike.
        exact = self._dtype() == torch.float32
        tolerance = 1e-5 if exact else 1e-4
        agree = torch.allclose(scores.sums, packed[1], rtol=tolerance, atol=tolerance)
        if not (agree and math.isclose(found, expected, rel_tol=1e-6 if exact else 1e-2)):
            raise TrainingError(
                f"stage {name!r}: with the new adapter at zero the preference loss must be {expected:.6f}; it is "
                f"{found:.6f}. Policy and reference differ before training; delete the unfinished step and run again"
            )
        if any(weights.values()):
            with bank.using({}):
                bare = branch_logprobs(self.model, packed[0]).sums
            if torch.equal(bare, packed[1]):
                raise TrainingError(
                    f"stage {name!r}: the reference equals the bare base although a context acts ({dict(weights)}); "
                    "the context was lost, or its adapters are zero"
                )
        return found

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _loss(self) -> dict[str, Any]:
        s = self.settings
        return {"loss": s.loss, "beta": s.beta, "label_smoothing": s.label_smoothing}
