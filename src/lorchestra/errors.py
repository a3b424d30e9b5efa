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


class StorageError(LorchestraError):
    """The disk is full, a directory cannot be written, a stored step does not match its digest."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, where it matters what was kept: the message says so, and where the next run goes on. Exit code 130."""
