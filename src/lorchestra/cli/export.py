"""``lorchestra export``: an adapter or a merged model in the form that other engines read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from lorchestra.cli.completion import among, models
from lorchestra.cli.options import Json
from lorchestra.errors import SourceError, UserError

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.events import Reporter
    from lorchestra.export.gguf_model import Written

# As people write them → as they are called.
DTYPES = {
    "float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
    "f16": "float16", "fp16": "float16", "q8_0": "q8_0",
}  # fmt: skip
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "q8_0": "q8_0"}
# Texts on which the logits of a GGUF file are compared with the model's.
PROBES = ("What should a patient with a fever do first?", "患者发热三天,伴咳嗽,下一步如何处理?", "1 + 1 =")
LOGITS_BYTES = 6  # a parameter, while one float32 model is in memory


def export(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER|MODEL", help="A PEFT adapter, or a merged model.", autocompletion=models)
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", "-o", metavar="DIR", help="A new directory.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="peft (adapters) or gguf. By default peft, of a model gguf.",
            autocompletion=among("peft", "gguf"),
        ),
    ] = "",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of an adapter: at most this rank.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="f32, bf16, f16, or in GGUF q8_0. By default f32, in GGUF f16.",
            autocompletion=among("f32", "bf16", "f16", "q8_0"),
        ),
    ] = "",
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="BASE", help="Of an adapter as GGUF; by default the one it names.", autocompletion=models
        ),
    ] = None,
    tokenizer_from: Annotated[
        str | None,
        typer.Option(
            "--tokenizer_from",
            metavar="GGUF",
            help="A GGUF file of the same base, to copy the tokenizer of.",
            autocompletion=models,
        ),
    ] = None,
    parity: Annotated[
        bool | None,
        typer.Option(
            "--parity/--no-parity",
            help="Compare a GGUF model's logits with the model's. By default if a float32 model fits into memory.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter or a merged model for other engines, and check what was written.

    An adapter becomes a PEFT directory with its scale folded in (any engine applies it right), at a chosen rank and
    number format, or a GGUF file for llama.cpp and Ollama. A merged model becomes a GGUF file. With GGUF comes an
    Ollama Modelfile.

    **Examples**

    `lorchestra export my-adapter -o small --rank 8 --dtype bf16`

    `lorchestra export my-adapter -o for-ollama --format gguf`

    `lorchestra export merged -o for-ollama --dtype q8_0`
    """
    from lorchestra.base.locate import locate
    from lorchestra.cli.models import is_adapter
    from lorchestra.cli.progress import make_reporter

    if dtype and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; there are f32, bf16, f16, and in GGUF q8_0")
    if form not in ("", "peft", "gguf"):
        raise UserError(f"--format {form!r} is unknown; there are peft and gguf")
    reporter = make_reporter()
    directory = locate(source, relative_to=Path.cwd(), reporter=reporter)
    adapter = is_adapter(directory)
    form = form or ("peft" if adapter else "gguf")
    kind = DTYPES[dtype or ("f32" if form == "peft" else "f16")]
    _check(directory, output_dir, adapter, form, kind, rank)
    if form == "peft":
        told = _peft(directory, output_dir, kind, rank)
    elif adapter:
        told = _gguf_adapter(source, directory, output_dir, kind, rank, base, reporter)
    else:
        told = _gguf_model(directory, output_dir, kind, tokenizer_from, parity, reporter)
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    for line in _lines(told):
        typer.echo(line)


def _check(directory: Path, out: Path, adapter: bool, form: str, dtype: str, rank: int | None) -> None:
    """What cannot go together, before anything is read."""
    if not adapter and not (directory / "config.json").is_file():
        raise UserError(f"{directory} is neither an adapter (adapter_config.json) nor a model (config.json)")
    if not adapter and form == "peft":
        raise UserError(f"{directory} is a whole model, and peft is a format of adapters; leave --format out, or gguf")
    if not adapter and rank is not None:
        raise UserError("--rank is for adapters; a model has none")
    if form == "peft" and dtype == "q8_0":
        raise UserError("--dtype q8_0 is for GGUF; in a PEFT directory there are f32, bf16 and f16")
    if out.resolve() == directory.resolve():
        raise UserError(f"--output_dir {out} is what is to be exported; choose another")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose a new directory")


def _adapter(directory: Path, rank: int | None) -> tuple[Adapter, float]:
    """The adapter at the rank, and the share of ‖ΔW‖² that is kept."""
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.fusion.methods import compress

    loaded = Adapter.load(directory)
    if rank is None or all(update.rank <= rank for update in loaded.modules.values()):
        return loaded, 1.0
    return compress(loaded, rank=rank)


def _peft(directory: Path, out: Path, dtype: str, rank: int | None) -> dict[str, Any]:
    from lorchestra.export.factors import export_peft
    from lorchestra.serve.vllm_process import others

    adapter, kept = _adapter(directory, rank)
    done = export_peft(adapter, out, dtype)
    base = adapter.base.name if Path(adapter.base.name).is_dir() else "BASE"
    commands = others(base, {out.resolve().name: out}, done.rank)
    return {
        "output_dir": str(out),
        "format": "peft",
        "dtype": dtype,
        "rank": done.rank,
        "size": done.size,
        "retained": kept,
        "error": done.error,
        "serve": {engine: shlex.join(words) for engine, words in commands.items()},
        "next": shlex.join(["lorchestra", "inspect", str(out)]),
    }


def _gguf_adapter(
    source: str, directory: Path, out: Path, dtype: str, rank: int | None, base: str | None, reporter: Reporter
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from lorchestra.adapter.belonging import check_base
    from lorchestra.adapter.directory import whole_directory
    from lorchestra.base.fingerprint import fingerprint
    from lorchestra.base.load import source_name
    from lorchestra.cli.models import base_directory, base_of
    from lorchestra.export.gguf_adapter import export_adapter
    from lorchestra.export.gguf_model import read_config
    from lorchestra.export.modelfile import modelfile

    adapter, kept = _adapter(directory, rank)
    home = base_directory(base, reporter) if base else base_of(source, adapter, reporter)
    check_base({source: adapter}, fingerprint(home, source_name(home)))
    config = read_config(home)
    name = f"adapter-{_SHORT[dtype]}.gguf"
    where = _own_gguf(base or adapter.base.name) or home
    with whole_directory(out, "the export") as partial:
        notes = {"lorchestra.digest": adapter.digest, "lorchestra.base": adapter.base.name}
        done = export_adapter(adapter, config, partial / name, dtype, notes=notes, reporter=reporter)
        text, has_template = modelfile(str(where), AutoTokenizer.from_pretrained(home), adapter=f"./{name}")
        (partial / "Modelfile").write_text(text, encoding="utf-8")
    told = _told(out, name, dtype, done, has_template)
    return {**told, "rank": max(u.rank for u in adapter.modules.values()), "retained": kept, "from": str(where)}


def _gguf_model(
    directory: Path, out: Path, dtype: str, tokenizer_from: str | None, parity: bool | None, reporter: Reporter
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from lorchestra.adapter.directory import whole_directory
    from lorchestra.base.locate import locate
    from lorchestra.export.gguf_model import export_model
    from lorchestra.export.modelfile import modelfile

    note = _note(directory)
    named = str((note.get("base") or {}).get("name") or note.get("name") or "")
    if tokenizer_from:
        tokens: Path | None = locate(tokenizer_from, relative_to=Path.cwd(), reporter=reporter)
    else:
        tokens = _own_gguf(named)
    prompts = PROBES if (_fits(directory, reporter) if parity is None else parity) else ()
    name = f"model-{_SHORT[dtype]}.gguf"
    notes = {f"lorchestra.{key}": str(note[key]) for key in ("adapter",) if note.get(key)}
    with whole_directory(out, "the export") as partial:
        done = export_model(
            directory, partial / name, dtype, tokenizer_from=tokens, notes=notes, prompts=prompts, reporter=reporter
        )
        text, has_template = modelfile(f"./{name}", AutoTokenizer.from_pretrained(directory))
        (partial / "Modelfile").write_text(text, encoding="utf-8")
    return _told(out, name, dtype, done, has_template)


def _told(out: Path, name: str, dtype: str, done: Written, has_template: bool) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "format": "gguf",
        "file": name,
        "dtype": dtype,
        "size": done.size,
        "tensors": done.tensors,
        "error": done.error,
        "logits": done.logits,
        "template": has_template,
        "next": shlex.join(["ollama", "create", out.resolve().name.lower(), "-f", str(out / "Modelfile")]),
    }


def _note(directory: Path) -> dict[str, Any]:
    """What lorchestra noted beside a model; empty if it is not of ours."""
    file = directory / "lorchestra.json"
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{file} is damaged: {error}") from error
    return value if isinstance(value, dict) else {}


def _own_gguf(name: str) -> Path | None:
    """The GGUF file that a base was made from, if it is one and is here."""
    from lorchestra.base.locate import locate
    from lorchestra.events import SILENT

    if not name.endswith(".gguf"):
        return None
    try:
        found = locate(name, relative_to=Path.cwd(), reporter=SILENT, fetch=False)
    except SourceError:
        return None
    return found.resolve() if found.is_file() else None


def _fits(directory: Path, reporter: Reporter) -> bool:
    """Whether a float32 model has room in memory; if not, it is said that the logits are not compared."""
    from lorchestra.base.safetensors_file import WIDTHS, entries, weight_files

    parameters = sum(e.size // WIDTHS.get(e.dtype, 1) for file in weight_files(directory) for e in entries(file))
    needed, free = LOGITS_BYTES * parameters, psutil.virtual_memory().available
    if needed <= free:
        return True
    reporter.say(
        f"the logits are not compared: that takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free "
        "(--parity does it all the same); every tensor is checked"
    )
    return False


def _lines(told: Mapping[str, Any]) -> list[str]:
    what = f"{told['output_dir']}/{told['file']}" if "file" in told else told["output_dir"]
    size = told["size"]
    amount = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    out = [f"{what}: {amount}, {told['dtype']}" + (f", rank {told['rank']}" if "rank" in told else "")]
    if told.get("retained", 1.0) < 1.0:
        out.append(f"the rank keeps {told['retained']:.2%} of ‖ΔW‖²")
    out.append(f"read back: {told['error']:.3%} off, by the rounding of {told['dtype']}")
    if told.get("logits") is not None:
        out.append(f"logits, as transformers reads the file: {told['logits']:.2%} of their spread off")
    if told.get("template") is False:
        out.append("the chat template cannot be put into Ollama's language; Ollama goes by the one in the GGUF file")
    out += [f"{engine}: {command}" for engine, command in told.get("serve", {}).items()]
    out.append(f"Next: {told['next']}")
    return out
