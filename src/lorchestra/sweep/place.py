"""The directory of a sweep's or a matrix's results, held by one process at a time while the work goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lorchestra.errors import Interrupted
from lorchestra.events import Reporter
from lorchestra.pipeline.cache import run_lock, storage, sweep
from lorchestra.pipeline.journal import Journal


@contextmanager
def held(
    where: Path, kept: str, reporter: Reporter, inside: Reporter | None, wait: bool
) -> Iterator[tuple[Journal, Journal]]:
    """The lock on ``where``, and the reporters of the whole and of what is within one piece of work.

    Both write what they hear to ``events.jsonl`` there.

    Args:
        where: the directory.
        kept: what Ctrl-C leaves finished: ``cells``, ``departments``.
        reporter: progress of the whole.
        inside: progress within a piece of work; ``reporter`` unless given.
        wait: wait for another process in the same directory instead of refusing.

    Raises:
        UserError: the directory is in use.
        StorageError: the disk is full or cannot be written.
        Interrupted: Ctrl-C, with what is kept.
    """
    events = where / "events.jsonl"
    with storage(where), run_lock(where, wait, reporter.say):
        sweep(where)
        with closing(Journal(reporter, events)) as journal, closing(Journal(inside or reporter, events)) as quiet:
            try:
                yield journal, quiet
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped; finished {kept} are kept, and the same command goes on from there"
                ) from None
