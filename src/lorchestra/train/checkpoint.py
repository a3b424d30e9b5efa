"""Checkpoints of a stage: whole or not there, the newest kept, beside the best adapter so far."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorchestra.bank import TrainableMember
from lorchestra.errors import StorageError


@dataclass
class Progress:
    """Where a stage stands; everything here is JSON and goes on exactly after a kill.

    ``history`` and ``validation`` are the rows of the report; ``best_loss`` and ``best_step`` of the validation;
    ``waited`` counts validations without improvement; ``tokens`` and ``seconds`` are totals so far.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0
    stopped: bool = False
    tokens: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The ``scratch/`` directory of one stage's unfinished step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, accelerator: Any, progress: Progress) -> None:
        """Write member, optimiser, schedule and random states; older checkpoints go once the new one stands.

        Raises:
            StorageError: torch could not write a file (it does not say why). Other writers raise ``OSError``.
        """
        final = self.directory / f"step-{progress.step:08d}"
        partial = self.directory / f"{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            accelerator.save_state(str(partial / "state"))
        except RuntimeError as error:
            raise StorageError(
                f"checkpoint {final} could not be written ({error}); most likely the disk is full. Free some space and "
                "run again; finished steps and the checkpoint before this one are kept"
            ) from error
        (partial / "progress.json").write_text(json.dumps(asdict(progress)))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self._all():
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        found = self._all()
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def restore(self, accelerator: Any) -> Progress:
        """Load the newest checkpoint into what ``accelerator`` has prepared; a fresh start without one."""
        found = self._all()
        if not found:
            return Progress()
        accelerator.load_state(str(found[-1] / "state"))
        return Progress(**json.loads((found[-1] / "progress.json").read_text()))

    def save_best(self, member: TrainableMember, step: int) -> None:
        """Keep the factors of ``step`` aside; written before the checkpoint that refers to them."""
        from safetensors.torch import save_file

        tensors = {key: value.detach().cpu().contiguous() for key, value in member.state_dict().items()}
        partial = self.directory / f"best-{step:08d}.partial"
        save_file(tensors, partial)
        partial.rename(self._best(step))

    def load_best(self, member: TrainableMember, step: int) -> None:
        """Put the factors of ``step`` back into ``member``."""
        from safetensors.torch import load_file

        member.load_state_dict(load_file(self._best(step)))

    def drop_best(self, keep: int) -> None:
        """Remove the factors of other steps than ``keep``."""
        for path in self.directory.glob("best-*.safetensors"):
            if path != self._best(keep):
                path.unlink(missing_ok=True)

    def _best(self, step: int) -> Path:
        return self.directory / f"best-{step:08d}.safetensors"

    def _all(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if p.suffix != ".partial" and p.is_dir())
