"""The command line: the composition root. One file a verb; heavy imports wait until a verb runs."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Entry point of the ``lorchestra`` command: errors become one sentence and an exit code, never a traceback.

    Exit codes: 0 done; 1 a failure; 2 a mistake in what was asked; 130 interrupted.
    """
    # Libraries report their own progress and advice on every load; ours is enough.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no λ or √ shows ?, and nothing fails
            stream.reconfigure(errors="replace")

    from lorchestra.cli.app import app
    from lorchestra.errors import LorchestraError

    try:
        app(prog_name="lorchestra")
    except LorchestraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this module does not import
            raise
        print(
            "error: the device is out of memory. Lower train.batch_size (and raise gradient_accumulation), lower "
            "max_length, or set train.gradient_checkpointing: true; with ft and dpo these are "
            "--per_device_train_batch_size, --gradient_accumulation_steps, --max_length and --gradient_checkpointing. "
            "Finished steps are kept",
            file=sys.stderr,
        )
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(1)
