"""The engine's process: ``python -m lorchestra.serve.embedded.child``, started by a server and ended with it.

It has no event loop. One thread hears what it is to do, one steps the model and tells after each step what happened.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import sys
import threading
from typing import IO, Any

if __name__ == "__main__":
    # The terminal's Ctrl-C, and a service manager's SIGTERM, go to every process of a server; it is the server that
    # says when this one ends. Before anything large is imported, which takes seconds.
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, signal.SIG_IGN)

from lorchestra.errors import LorchestraError
from lorchestra.serve.embedded.core import Core, Failure, Setup
from lorchestra.serve.embedded.messages import (
    Drop,
    Leave,
    Load,
    Order,
    Push,
    Ready,
    Relayed,
    See,
    Stop,
    packed,
    receive,
    send,
)

log = logging.getLogger(__name__)


def main() -> None:
    """Load, step until told to stop."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    inward, outward = _pipes()
    tell = _Teller(outward)
    try:
        setup = receive(inward)
    except EOFError:
        return
    cores: queue.SimpleQueue[Core] = queue.SimpleQueue()
    stopped = threading.Event()
    threading.Thread(target=_listen, args=(inward, cores, stopped), name="lorchestra-orders", daemon=True).start()
    core = _loaded(setup, tell)
    if core is None:
        return
    gc.collect()
    gc.freeze()  # what is there stays there, and is not looked through again and again
    tell(Ready(core.max_length, core.rows, core.end_ids))
    core.start(tell)
    cores.put(core)
    stopped.wait()


class _Teller:
    """Sends messages whole, from any thread. Where nobody hears them the process ends."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def __call__(self, message: Any) -> None:
        data = packed(message)
        with self._lock:
            try:
                send(self._pipe, data)
            except OSError:
                os._exit(1)


def _pipes() -> tuple[IO[bytes], IO[bytes]]:
    """To hear from and to speak to; whatever else reads or prints here, or in a process of this one, has others."""
    inward, outward = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(inward, "rb"), os.fdopen(outward, "wb")


def _loaded(setup: Setup, tell: _Teller) -> Core | None:
    from lorchestra.serve.embedded.local import loaded

    try:
        core, _ = loaded(setup, Relayed(tell))
        return core
    except LorchestraError as error:
        tell(Failure(0, error))
    except Exception as error:
        log.exception("the engine cannot start")
        said = f"the engine cannot start ({type(error).__name__}: {error}); what was logged says where"
        tell(Failure(0, LorchestraError(said)))
    return None


def _listen(inward: IO[bytes], cores: queue.SimpleQueue[Core], stopped: threading.Event) -> None:
    """A thread: do what the server says, and end with it at once, whatever is under way."""
    try:
        order: Order = receive(inward)
        core = cores.get()
        while not isinstance(order, Stop):
            _carry_out(order, core)
            order = receive(inward)
        core.stop()
        stopped.set()
    except EOFError:
        os._exit(1)
    except BaseException:
        log.exception("the engine's process ends")
        os._exit(1)


def _carry_out(order: Order, core: Core) -> None:
    match order:
        case Push(number, generation):
            core.push(number, generation)
        case Leave(number):
            core.leave(number)
        case See(number, prompt, layers, last):
            core.see(number, prompt, layers, last)
        case Load(number, adapter):
            core.load(number, adapter)
        case Drop(number, key):
            core.drop(number, key)


if __name__ == "__main__":
    main()
