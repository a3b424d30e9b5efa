"""When the C library hands freed memory back to the system: not while training steps follow each other, but at once
where large blocks of many sizes come and go for days.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Names of mallopt's settings in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGE = 4 << 20  # bytes of a block that serving maps for itself
SETTINGS = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 64 << 20}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with the process; afterwards what is free goes back to the system.

    glibc maps every large block anew, and the system clears its pages each time they are touched: on a CPU up to a
    fifth of a training. Other C libraries, and memory on a GPU, are left as they are. The settings outlast the context,
    because glibc cannot be asked what they were.
    """
    library = _glibc()
    if library is None:
        yield
        return
    for name, value in SETTINGS.items():
        library.mallopt(name, value)  # a refusal (0) leaves it as it was
    try:
        yield
    finally:
        library.malloc_trim(0)


def large_blocks_go_back() -> None:
    """From now on a freed block of 4 MB or more goes back to the system.

    By itself glibc stops doing so as soon as one was freed, and a server's adapters, coming and going in all sizes,
    then leave holes in the heap: it grows for hours. Other C libraries are left as they are.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, LARGE)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it has glibc's settings."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version") else None
