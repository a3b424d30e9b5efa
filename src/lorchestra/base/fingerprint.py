"""What a base is: digests of its weights, its tokenizer and its chat template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lorchestra.adapter.digest import json_digest
from lorchestra.adapter.lineage import BaseId
from lorchestra.base.home import home
from lorchestra.base.lock import locked
from lorchestra.base.reading import read_json, reading
from lorchestra.base.safetensors_file import entries
from lorchestra.errors import SourceError
from lorchestra.events import SILENT, Reporter

# Format of the cached fingerprints; raise it when the digests are computed differently.
VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")


def fingerprint(directory: Path, name: str = "", reporter: Reporter = SILENT) -> BaseId:
    """Digests of a Hugging Face model directory.

    The weights digest is SHA-256 over sorted (tensor name, dtype, shape, bytes) of all safetensors, so it does not
    depend on how they are spread over files. It is remembered by the files' names, sizes and times.

    Args:
        directory: holds ``*.safetensors``.
        name: what to call the base; the directory's name otherwise.
        reporter: progress, where gigabytes are to be read.

    Raises:
        SourceError: no safetensors, or a damaged file.
    """
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise SourceError(
            f"{directory} holds no *.safetensors; pickled weights (.bin, .pt) are not read. Convert the model with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    with reading(directory):
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    key = json_digest([VERSION, str(directory.resolve()), stats]).removeprefix("sha256:")[:32]
    cached = home() / "fingerprints" / f"{key}.json"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with locked(cached.with_suffix(".lock"), f"the fingerprint of {directory}", lambda text: None):
            if not cached.exists():
                note = {"weights": _weights_digest(shards, reporter)}
                partial = cached.with_suffix(".partial")
                partial.write_text(json.dumps(note), encoding="utf-8")
                partial.replace(cached)
    weights = json.loads(cached.read_text(encoding="utf-8"))["weights"]
    template = _template(directory)
    return BaseId(
        name=name or directory.name,
        weights=weights,
        tokenizer=_files_digest([directory / f for f in TOKENIZER_FILES]),
        template="sha256:" + hashlib.sha256(template.encode()).hexdigest() if template else "",
    )


def _weights_digest(shards: list[Path], reporter: Reporter) -> str:
    tensors: dict[str, tuple[Path, int, int, str, tuple[int, ...]]] = {}
    for shard in shards:
        with reading(shard):
            found = entries(shard)
        for entry in found:
            if entry.name in tensors:
                raise SourceError(
                    f"{shard} holds {entry.name!r}, which {tensors[entry.name][0].name} holds too; remove one of them"
                )
            tensors[entry.name] = (shard, entry.first, entry.size, entry.dtype, entry.shape)
    sha = hashlib.sha256()
    with reporter.task("hash the base", sum(size for _, _, size, _, _ in tensors.values()), "B") as task:
        for name, (shard, offset, size, dtype, shape) in sorted(tensors.items()):
            sha.update(f"{name}\0{dtype}\0{shape}\0".encode())
            with reading(shard), shard.open("rb") as stream:
                stream.seek(offset)
                left = size
                while left:
                    block = stream.read(min(left, 1 << 22))
                    if not block:
                        raise SourceError(f"{shard} ends before its tensor {name!r} does; fetch the file again")
                    sha.update(block)
                    left -= len(block)
                    task.advance(len(block))
    return "sha256:" + sha.hexdigest()


def config_digest(directory: Path) -> str:
    """SHA-256 of what ``config.json`` says of the computation: without names, versions and the number format."""
    config = read_json(directory / "config.json")
    apart = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return json_digest({key: value for key, value in config.items() if key not in apart})


def _files_digest(files: list[Path]) -> str:
    sha = hashlib.sha256()
    found = [path for path in files if path.exists()]
    for path in found:
        sha.update(f"{path.name}\0".encode())
        with reading(path):
            sha.update(path.read_bytes())
    return "sha256:" + sha.hexdigest() if found else ""


def _template(directory: Path) -> str:
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    settings = read_json(config) if config.exists() else {}
    if file.exists():
        with reading(file):
            return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
