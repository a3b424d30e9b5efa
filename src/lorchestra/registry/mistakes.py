"""What can go wrong with a registry: failures (exit code 1) and mistakes (2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorchestra.errors import LorchestraError, UserError

if TYPE_CHECKING:
    from lorchestra.registry.gates import Outcome


class RegistryError(LorchestraError):
    """The catalog or the store cannot be reached, is full, or is of a format that this version does not know."""


class DamagedError(RegistryError):
    """Something that is kept is not what it was when it was put there.

    Args:
        message: what, and what to do.
        subject: the object: a blob's digest, a version's reference, a table.
    """

    def __init__(self, message: str, subject: str = "") -> None:
        super().__init__(message)
        self.subject = subject

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # it is raised in other processes too
        return type(self), (str(self), self.subject)


class NoRegistryError(UserError):
    """There is no registry at that place."""


class UnknownReferenceError(UserError):
    """A reference that leads to no version; the message names the nearest that do."""


class RevokedError(UserError):
    """A version that was revoked, asked for as if it were not."""


class TakenError(UserError):
    """A number or a name that something else has already."""


class NeededError(UserError):
    """A version that cannot be removed: an alias, a canary or another version's lineage needs it."""


class PromotionRefused(LorchestraError):  # noqa: N818  # it is an answer, and called so everywhere
    """A gate, or several, did not let a version through; nothing was changed.

    Args:
        message: each gate with what was asked and measured.
        outcomes: the same as values.
    """

    def __init__(self, message: str, outcomes: Iterable[Outcome] = ()) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (str(self), self.outcomes)
