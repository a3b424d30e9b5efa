"""Which examples a step sees: a function of the seed and the step number alone, so that a resume goes on exactly."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from lorchestra.train.settings import TrainSettings

# Batches at most that are sorted by length together; and a quarter of the data at most, as in transformers' sampler.
# Were all of few data sorted, each batch would be of one kind, and nine steps on 65 examples end at a higher loss.
SORTED = 16


class BatchPlan:
    """The micro-batches of every optimiser step.

    Items of like length share a micro-batch. With ``fixed`` the composition of the micro-batches never changes
    and only their order is shuffled (a cached reference then meets the very same batches every epoch);
    otherwise each epoch composes them anew: see :data:`SORTED`.

    Args:
        lengths: positions of each item.
        settings: batch size, accumulation, epochs or steps.
        seed: of the data order.
        fixed: see above.
        stop: end after this step of the whole, schedules being those of the whole; ``None`` to go to its end.
    """

    def __init__(
        self, lengths: Sequence[int], settings: TrainSettings, seed: int, fixed: bool, stop: int | None = None
    ) -> None:
        self.lengths = lengths
        self.size = settings.batch_size
        self.accumulation = settings.gradient_accumulation
        self.seed = seed
        self.fixed = fixed
        self.micro_batches = math.ceil(len(lengths) / self.size)
        self.steps_per_epoch = math.ceil(self.micro_batches / self.accumulation)
        self.steps = settings.max_steps or max(1, round(settings.epochs * self.steps_per_epoch))
        self.last = self.steps if stop is None else min(stop, self.steps)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def composition(self) -> list[list[int]]:
        """The micro-batches (lists of item indices) of a ``fixed`` plan, shortest items first."""
        order = sorted(range(len(self.lengths)), key=lambda i: (self.lengths[i], i))
        return [order[k : k + self.size] for k in range(0, len(order), self.size)]

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of optimiser step ``step`` (counted from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._compose(epoch))
        first = position * self.accumulation
        return self._epoch[1][first : first + self.accumulation]

    def _compose(self, epoch: int) -> list[list[int]]:
        chance = random.Random(f"{self.seed}:{epoch}")
        if self.fixed:
            composed = self.composition()
        else:
            # Sorted within chunks of a shuffled order: like lengths together, other company every epoch.
            order = list(range(len(self.lengths)))
            chance.shuffle(order)
            chunk = self.size * min(SORTED, max(1, len(order) // (4 * self.size)))
            composed = []
            for k in range(0, len(order), chunk):
                part = sorted(order[k : k + chunk], key=lambda i: (self.lengths[i], i))
                composed += [part[j : j + self.size] for j in range(0, len(part), self.size)]
        chance.shuffle(composed)
        return composed
