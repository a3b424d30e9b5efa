"""A base on its device: located, converted if it is GGUF, loaded frozen."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.adapter.lineage import BaseId
from lorchestra.base.fingerprint import fingerprint
from lorchestra.base.home import home
from lorchestra.base.locate import file_sha256, locate
from lorchestra.base.lock import locked
from lorchestra.base.nf4 import NF4, hush, keep_as_packed, refuse_quantised, require_bitsandbytes, settings
from lorchestra.base.reading import absent, read_json, reading
from lorchestra.errors import NotHereError, SourceError, UserError
from lorchestra.events import SILENT, Reporter

if TYPE_CHECKING:
    import torch

# Format of converted bases; raise it when the conversion changes.
CONVERSION = 1


@dataclass(frozen=True)
class NumberFormat:
    """How a base is held.

    Args:
        dtype: of what is computed, and of every weight that is not quantised.
        quantised: ``nf4`` where the weights of linear modules are held in 4 bits; else empty.
    """

    dtype: torch.dtype
    quantised: str = ""

    @property
    def plain(self) -> NumberFormat:
        """Not quantised: how adapters are merged and served."""
        return replace(self, quantised="")

    @property
    def name(self) -> str:
        """``bfloat16``, or ``nf4 (bfloat16)``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.quantised} ({dtype})" if self.quantised else dtype

    def __str__(self) -> str:
        """As the digests of steps have it: ``torch.bfloat16``, or ``nf4 (torch.bfloat16)``."""
        return f"{self.quantised} ({self.dtype})" if self.quantised else str(self.dtype)


@dataclass(frozen=True)
class Base:
    """A loaded base: ``model`` in eval mode with nothing trainable, its ``tokenizer``, where they are and what.

    ``dtype`` is what it computes in; ``quantised`` is ``nf4`` or empty.
    """

    directory: Path
    id: BaseId
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    quantised: str = ""

    @property
    def pad_id(self) -> int:
        """Token id for padding: the tokenizer's, else its end of text (padding is never attended to)."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def prepare_base(
    source: str, *, relative_to: Path | None = None, reporter: Reporter = SILENT, fetch: bool = True
) -> Path:
    """A Hugging Face directory for ``source``; a GGUF file is dequantised to float32 once and kept.

    Raises:
        NotHereError: it would have to be fetched or dequantised, and ``fetch`` is false.
        SourceError: not found, not a model, or an architecture that cannot be read.
    """
    path = locate(source, relative_to=relative_to, reporter=reporter, fetch=fetch)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"base {source!r} is a file, but not GGUF; give a model directory or a .gguf file")
        return _converted(path, reporter, fetch)
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise SourceError(f"base {source!r} is an adapter, not a model; give its base, and this as an adapter")
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(ggufs[:3])}: name the file" if ggufs else ""
        raise SourceError(f"base {source!r}: {path} has no config.json, so it is not a model directory{hint}")
    with reading(path):
        lost = [file for file in sorted(path.iterdir()) if file.is_symlink() and not file.exists()]
    if lost:  # transformers would take an optional file for one that the model does not have
        raise SourceError(f"base {source!r}: cannot read {lost[0]}: {absent(lost[0])}; fetch or copy the model again")
    return path


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: a device that is not there.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    kind = name.split(":")[0]
    if not available.get(kind, False):
        there = ", ".join(k for k, ok in available.items() if ok)
        raise UserError(f"device {name!r} is not available here; there is {there} (or auto)")
    return torch.device(name)


def choose_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """``auto``: bfloat16 where the hardware multiplies it, float16 on older CUDA devices, else float32.

    On a CPU without bfloat16 instructions torch emulates it, a hundred times slower than float32.

    Raises:
        UserError: an unknown name.
    """
    import torch

    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        if name not in named:
            raise UserError(f"dtype {name!r} is unknown; there are auto, {', '.join(named)}, {NF4}")
        return named[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def choose_format(device: torch.device, name: str = "auto") -> NumberFormat:
    """How a base is held: ``name`` is a dtype (see :func:`choose_dtype`), or ``nf4``, which computes in ``auto``'s.

    Raises:
        UserError: an unknown name, or nf4 without bitsandbytes.
    """
    if name == NF4:
        require_bitsandbytes()
        return NumberFormat(choose_dtype(device), NF4)
    return NumberFormat(choose_dtype(device, name))


def load_base(
    directory: Path, *, name: str = "", device: str = "auto", dtype: str = "auto", reporter: Reporter = SILENT
) -> Base:
    """Load a model directory, frozen and in eval mode.

    Args:
        directory: from :func:`prepare_base`.
        name: what the base is called in lineages (its source, so that it can be found again).
        device: see :func:`choose_device`.
        dtype: see :func:`choose_format`.
        reporter: progress.

    Raises:
        SourceError: transformers cannot load it, or it is quantised already and nf4 was asked for.
        UserError: device or dtype.
    """
    where = choose_device(device)
    kind = choose_format(where, dtype)
    if kind.quantised:
        refuse_quantised(directory)
    identity = fingerprint(directory, name or source_name(directory), reporter)
    with reporter.task(f"load {Path(identity.name).name}"):
        model, tokenizer = _loaded(directory, kind, where)
        model.eval().requires_grad_(False)
    if model.get_output_embeddings() is None:
        raise SourceError(f"{directory} is a {type(model).__name__} without an output embedding; not a language model")
    return Base(directory, identity, model, tokenizer, where, kind.dtype, kind.quantised)


def _loaded(directory: Path, kind: NumberFormat, device: torch.device) -> tuple[Any, Any]:
    """Model on ``device`` and tokenizer as transformers reads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    hush()
    # Packed on the device, weight by weight: the plain model need not fit there.
    how = {"quantization_config": settings(kind.dtype), "device_map": {"": device}} if kind.quantised else {}
    try:
        # Said outright, else transformers asks at the terminal whether to run the Python that a model brings along.
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=kind.dtype, use_safetensors=True, trust_remote_code=False, **how
        )
    except Exception as error:  # a foreign directory: the Rust tokenizers raise bare Exceptions, transformers anything
        raise SourceError(f"{directory} cannot be loaded as a causal language model: {error}") from error
    if kind.quantised:
        keep_as_packed(model)
        return model, tokenizer
    return model.to(device), tokenizer


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        SourceError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions
        raise SourceError(f"the tokenizer of {directory} cannot be loaded: {error}") from error


def positions(config: Any) -> int | None:
    """Tokens that a model can tell apart by their place, by its configuration; ``None`` if that does not say."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(own) if own else None


def source_name(directory: Path) -> str:
    """What a prepared directory was made from; a converted GGUF remembers its file's name."""
    note = directory / "lorchestra.json"
    if note.exists():
        return str(read_json(note).get("name", directory.name))
    return str(directory)


def _cpu_multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # not Linux: float32 is right everywhere
    words = set(flags.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _converted(gguf: Path, reporter: Reporter, fetch: bool) -> Path:
    digest = file_sha256(gguf)
    final = home() / "bases" / f"{gguf.stem}-{digest[:16]}-v{CONVERSION}"
    if not fetch and not final.exists():
        raise NotHereError(f"{gguf.name} has not been dequantised yet")
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final.with_name(final.name + ".lock"), f"the dequantised {gguf.name}", reporter.say):
        if not final.exists():
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            with reporter.task(f"dequantise {gguf.name}"):
                _convert(gguf, partial, digest)
            partial.rename(final)
    return final


def _convert(gguf: Path, out: Path, digest: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:  # a foreign file: struct.error, IndexError and whatever its reader meets first
        raise SourceError(
            f"{gguf.name} cannot be read: {error}. transformers reads GGUF of the common architectures; otherwise "
            "use the model's original Hugging Face directory"
        ) from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    note = {"schema": 1, "made_by": "gguf", "name": gguf.name, "sha256": digest}
    (out / "lorchestra.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
