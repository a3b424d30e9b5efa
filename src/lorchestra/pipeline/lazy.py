"""The base of a run: loaded when a step first needs it, released when another model needs the room."""

from __future__ import annotations

import gc
from pathlib import Path

from lorchestra.base.load import Base, choose_device, choose_format, load_base
from lorchestra.events import SILENT, Reporter


class LazyBase:
    """Where the base will be and in which number format, which digests ask for, and the base itself once it must be.

    Args:
        directory: a Hugging Face directory.
        name: what the base is called in lineages.
        device: see :func:`choose_device`.
        dtype: see :func:`choose_format`.
        reporter: progress of loading it.
    """

    def __init__(self, directory: Path, name: str, device: str, dtype: str, reporter: Reporter = SILENT) -> None:
        self.directory = directory
        self.name = name
        self.device = choose_device(device)
        self.dtype = choose_format(self.device, dtype)
        self._asked = device, dtype
        self._reporter = reporter
        self._loaded: Base | None = None

    def load(self) -> Base:
        """The base; the same one until it is released."""
        if self._loaded is None:
            device, dtype = self._asked
            self._loaded = load_base(
                self.directory, name=self.name, device=device, dtype=dtype, reporter=self._reporter
            )
        return self._loaded

    def plain(self) -> LazyBase:
        """The base as adapters meet it once they are delivered: itself, or not quantised; this one is released then."""
        if not self.dtype.quantised:
            return self
        self.release()
        return LazyBase(self.directory, self.name, str(self.device), "auto", self._reporter)

    def release(self) -> None:
        """Give its memory back; the caller holds no other reference to the model."""
        import torch

        self._loaded = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()
