"""A warm process that carries out runs in forked children and kills them: imports are paid once.

Run as a script. It says ``ready``, then reads orders, a JSON object a line: recipe, data, directory, home, result, and
how to die: by SIGKILL after ``seconds``, or just before the ``events``-th change to the file system; with ``limit`` no
file may grow beyond so many bytes. It answers each with a line ``{"killed", "code", "error": [class, text]}``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

WARM = (
    "accelerate", "scipy.stats", "tokenizers", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers", "lorchestra.data.load", "lorchestra.pipeline.execute",
)  # fmt: skip
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree", "shutil.copyfile"}


def warm_up() -> None:
    """Import what a run needs; no tensor is touched, so that no thread exists when children are forked."""
    for name in WARM:
        importlib.import_module(name)


def kill_at_change(count: int, inside: tuple[str, ...]) -> None:
    """Arrange for SIGKILL just before the ``count``-th change of a file or directory under ``inside``."""
    left = count

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writing = event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in ("w", "a", "x")
        if (writing or event in CHANGES) and str(arguments[0]).startswith(inside):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def carry_out(order: dict) -> None:
    """The child: one run."""
    os.environ["LORCHESTRA_HOME"] = order["home"]
    from lorchestra.errors import LorchestraError
    from lorchestra.pipeline.execute import run
    from lorchestra.recipe.recipe import Recipe

    if order.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], resource.RLIM_INFINITY))
    if order.get("events"):
        kill_at_change(order["events"], (order["home"], order["directory"]))
    recipe = Recipe.from_dict(order["recipe"], Path(order["data"]))
    try:
        result = run(recipe, directory=Path(order["directory"]))
    except LorchestraError as error:
        told = {"error": [type(error).__name__, str(error)]}
    else:
        told = {"digests": dict(result.digests), "weights": dict(result.weights)}
    if order.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(order["result"]).write_text(json.dumps(told))


def main() -> None:
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                carry_out(order)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        deadline = time.monotonic() + (order.get("seconds") or 600)
        done, status = 0, 0
        while not done:
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)  # it is not reaped yet, so the number is still its own
                done, status = os.waitpid(child, 0)
            elif not done:
                time.sleep(0.005)
        answer = {"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status)}
        if answer["code"] == 0:
            answer["error"] = json.loads(Path(order["result"]).read_text()).get("error")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
