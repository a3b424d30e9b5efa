"""One hierarchy of errors; the command line turns them into a sentence and an exit code.

A message says what was being done, what was found, what was expected, and what to do next.
"""

from __future__ import annotations


def counted(count: int, one: str, many: str = "") -> str:
    """``1 example``, ``1,200 examples``: how every message counts."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


class LorchestraError(Exception):
    """Something lorchestra can explain. ``exit_code`` is the command line's: 1, a failure."""

    exit_code = 1


class UserError(LorchestraError):
    """What was asked for cannot be done as asked: a recipe, flag, file or name to mend. Exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that does not hold together; names the file, the line and the nearest valid key."""


class SourceError(UserError):
    """A base, adapter or data source that cannot be found, fetched or trusted."""


class NotHereError(SourceError):
    """A source that would have to be fetched or converted first, asked for without the network."""


class AdapterError(UserError):
    """An adapter that cannot be read, or not used exactly: unsupported, damaged, of another base."""


class DataError(UserError):
    """Examples that cannot be read, rendered or split as the recipe asks."""


class TrainingError(LorchestraError):
    """A stage whose laws do not hold: a frozen tensor changed, a loss is not finite."""


class DivergedError(TrainingError):
    """A loss or gradient that is not finite.

    Args:
        message: what happened.
        step: where.
        steps: of the whole.
        validation: step and loss of the validations before it.
    """

    def __init__(self, message: str, step: int, steps: int = 0, validation: tuple[tuple[int, float], ...] = ()) -> None:
        super().__init__(message)
        self.step, self.steps, self.validation = step, steps, validation

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # it is raised in other processes too
        return type(self), (str(self), self.step, self.steps, self.validation)


class PausedError(LorchestraError):
    """A stage that was asked to pause has done so: its checkpoint is kept, and training again goes on from there.

    Args:
        step: of the validation at which it was to pause.
        steps: of the whole.
        loss: of the validation there.
    """

    def __init__(self, step: int, steps: int, loss: float) -> None:
        super().__init__(f"paused after step {step} of {steps}")
        self.step, self.steps, self.loss = step, steps, loss


class StorageError(LorchestraError):
    """The disk is full, a directory cannot be written, a stored step does not match its digest."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, where it matters what was kept: the message says so, and where the next run goes on. Exit code 130."""
