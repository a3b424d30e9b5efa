"""An adapter into the base's weights, file by file and tile by tile.

Every changed tensor is read a few rows at a time, added to in float32, rounded once to the output dtype and written in
its place; neither a file nor a tensor is ever whole in memory. The directory appears whole or not at all. A merge that
was killed goes on from its last finished file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.belonging import check_base
from lorchestra.adapter.directory import discard, whole_directory
from lorchestra.adapter.lineage import BaseId
from lorchestra.base.fingerprint import fingerprint
from lorchestra.base.home import home
from lorchestra.base.lock import locked
from lorchestra.base.safetensors_file import INDEX
from lorchestra.errors import Interrupted, LorchestraError, SourceError, StorageError
from lorchestra.events import SILENT, Reporter, Task
from lorchestra.fusion.assign import DTYPES, Output, Shard, plan_shards
from lorchestra.fusion.merge_journal import NAME, Done, Journal, file_digest
from lorchestra.fusion.rounding import Addend, Sums, matrix, move_rows, pieces, write_at
from lorchestra.fusion.workers import one_thread_each

# Entries that a thread takes at once.
JOB = 1 << 22
FORMAT = 1  # of the output's bytes; raised when the same inputs give others
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_NOT_COPIED = ("lorchestra.json", "adapter_config.json", "config.json", INDEX, NAME)
_TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "*.tiktoken",
)  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Shares are between 0 and 1.

    Args:
        dtype: of the output's changed tensors (``float32``, …).
        modules: changed tensors.
        update_ratio: ‖ΔW‖ / ‖W‖ over the changed tensors.
        rounding_lost: share of ‖ΔW‖ that rounding to the output dtype lost. An entry loses at most itself; what
            rounding does to W alone is ``base_rounding``.
        entries_lost: share of the entries that the update reaches on which it left no trace.
        base_rounding: ‖R − W‖ / ‖W‖, R the base in the output dtype: what rounding costs without any adapter; 0 unless
            the output is narrower than the base.
        worst: the module that lost most, and its ``rounding_lost`` and ``entries_lost``.
        resumed: files taken over from an earlier, killed merge.
        seconds: it took.
    """

    dtype: str
    modules: int
    update_ratio: float
    rounding_lost: float
    entries_lost: float
    base_rounding: float
    worst: Mapping[str, Any]
    resumed: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def merge(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    *,
    dtype: str = "auto",
    untie: bool = False,
    identity: BaseId | None = None,
    tokenizer_from: Path | None = None,
    check: Callable[[Path, MergeReport], None] = lambda directory, report: None,
    durable: bool = False,
    reporter: Reporter = SILENT,
) -> MergeReport:
    """Write base + adapter as a Hugging Face directory.

    Args:
        base: a model directory with safetensors, one file or sharded.
        adapter: its ΔW are added to the weights of the same names.
        out: a directory that does not exist yet, or is empty. A killed merge into it is taken up where it was.
        dtype: ``auto`` keeps each tensor's; else floating tensors are written in it.
        untie: where input and output embedding share a weight and the adapter changes one of them, write two.
        identity: which base this is; by default computed where the adapter names its own.
        tokenizer_from: where tokenizer and chat template come from, if not from the base.
        check: looks at the finished directory, and what will be reported of it, before it gets its name; a
            LorchestraError from it undoes the merge.
        durable: flush everything to the disk before the name is given, so that it outlives a power failure too.
        reporter: progress.

    Raises:
        AdapterError: an adapter of another base, a module that the base does not have, or of another shape.
        SourceError: no safetensors, a quantised base, an unknown dtype.
        UserError: an entry that the output's dtype cannot hold.
        StorageError: ``out`` is taken, cannot be written, or the disk has no room.
    """
    started = time.perf_counter()
    base, out = Path(base), Path(out)
    if dtype != "auto" and dtype not in DTYPES:
        raise SourceError(f"dtype {dtype!r} is unknown; there are auto, {', '.join(DTYPES)}")
    if out.resolve() != base.resolve() and out.resolve().is_relative_to(base.resolve()):
        raise SourceError(f"{out} lies inside the base {base}; choose a directory outside it")
    config = _config(base)
    shards = plan_shards(base, config, adapter, dtype, untie)
    if adapter.base.weights:
        identity = identity or fingerprint(base)
        check_base({adapter.lineage.name or "to be merged": adapter}, identity)
    companions = _companions(base, tokenizer_from)
    task = {
        "format": FORMAT,
        "adapter": adapter.digest,
        "transposed": sorted(adapter.transposed),
        "base": asdict(identity or adapter.base),
        "files": [[s.source.name, s.source.stat().st_size, s.source.stat().st_mtime_ns] for s in shards],
        "dtype": dtype,
        "untie": untie,
    }
    with (
        _alone(out, reporter),
        whole_directory(out, "the merged model", keeps=NAME, synced=durable) as partial,
    ):
        journal = Journal(partial, task)
        if journal.recover({shard.source.name: shard.size for shard in shards}):
            reporter.say(f"{partial} held another merge, or a damaged file; that is made anew")
        resumed = len(journal.done)
        journal.write()
        _clear(partial, journal.done)
        with _kept_if_worth_it(journal, len(shards), partial):
            _check_room(partial, out, [shard for shard in shards if shard.source.name not in journal.done])
            _write_shards(shards, partial, adapter, journal, reporter)
            _write_rest(partial, base, config, shards, journal, adapter, dtype, companions)
        report = _report(shards, journal, resumed, time.perf_counter() - started)
        try:
            check(partial, report)
        except LorchestraError:
            discard(partial, NAME)
            raise
    return replace(report, seconds=time.perf_counter() - started)


@contextmanager
def _kept_if_worth_it(journal: Journal, files: int, partial: Path) -> Iterator[None]:
    """Whatever ends the merge: without a finished file nothing is kept; after Ctrl-C it is said what is."""
    try:
        yield
    except BaseException as error:
        if not journal.done:
            discard(partial, NAME)
        elif isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"stopped; {len(journal.done)} of {files} files are kept in {partial}: the same command goes on there"
            ) from error
        raise


@contextmanager
def _alone(out: Path, reporter: Reporter) -> Iterator[None]:
    """No other process merges into ``out``."""
    place = home() / "merging"
    place.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.path.realpath(out).encode()).hexdigest()[:32]
    with locked(place / f"{name}.lock", f"{out}", reporter.say):
        yield


def _report(shards: Sequence[Shard], journal: Journal, resumed: int, seconds: float) -> MergeReport:
    modules = {path: sums for shard in shards for path, sums in journal.done[shard.source.name].sums.items()}
    whole = Sums.of(modules.values())
    path, worst = max(modules.items(), key=lambda item: (item[1].rounding_lost, item[0]))
    changed = [output for shard in shards for output in shard.outputs if output.module is not None]
    return MergeReport(
        dtype=str(changed[0].kind).removeprefix("torch."),
        modules=len(modules),
        update_ratio=whole.update_ratio,
        rounding_lost=whole.rounding_lost,
        entries_lost=whole.entries_lost,
        base_rounding=whole.base_rounding,
        worst={"module": path, "rounding_lost": worst.rounding_lost, "entries_lost": worst.entries_lost},
        resumed=resumed,
        seconds=seconds,
    )


def _write_shards(
    shards: Sequence[Shard], partial: Path, adapter: Adapter, journal: Journal, reporter: Reporter
) -> None:
    """Every shard that is not done. While one is computed, the one before is read again for its digest."""
    sealing: tuple[str, dict[str, Sums], Future[str]] | None = None
    with (
        ExitStack() as opened,
        one_thread_each("merge") as pool,
        reporter.task("merge", sum(shard.size for shard in shards), "B") as task,
    ):
        for shard in shards:
            if shard.source.name in journal.done:
                task.advance(shard.size)
                continue
            unfinished = partial / f"{shard.source.name}.part"
            reading = opened.enter_context(shard.source.open("rb", buffering=0))
            writing = opened.enter_context(unfinished.open("wb", buffering=0))
            jobs = _start(shard, (reading.fileno(), writing.fileno()), adapter, pool)
            _note(sealing, journal)
            sums = _collect(shard, jobs, adapter, task)
            opened.close()
            sealing = shard.source.name, sums, pool.submit(_sealed, unfinished)
        _note(sealing, journal)


def _start(shard: Shard, files: tuple[int, int], adapter: Adapter, pool: Executor) -> list[list[Future[Sums]]]:
    """Everything there is to do for one file, tensor by tensor."""
    jobs = []
    write_at(files[1], memoryview(shard.header), 0)
    start = len(shard.header)
    for output in shard.outputs:
        addend = _addend(adapter, output)
        jobs.append([pool.submit(move_rows, files, output, start, rows, addend) for rows in _jobs(output)])
        start += output.size
    return jobs


def _addend(adapter: Adapter, output: Output) -> Addend | None:
    if output.module is None:
        return None
    return Addend.of(adapter.modules[output.module], output.module in adapter.transposed)


def _jobs(output: Output) -> list[range]:
    rows, columns = matrix(output.source.shape)
    return pieces(range(rows), JOB // columns) if output.size else []


def _collect(shard: Shard, jobs: Sequence[Sequence[Future[Sums]]], adapter: Adapter, task: Task) -> dict[str, Sums]:
    """Module path → sums, in the order of the rows whatever the order of the work."""
    found = {}
    for output, running in zip(shard.outputs, jobs, strict=True):
        sums = Sums.of(job.result() for job in running)
        addend = _addend(adapter, output)
        if addend is not None and output.module is not None:
            found[output.module] = replace(sums, update=addend.square, reached=addend.reached)
        task.advance(output.size)
    return found


def _sealed(unfinished: Path) -> str:
    """Digest of a file that is whole, and its own name for it."""
    digest = file_digest(unfinished)
    os.replace(unfinished, unfinished.with_suffix(""))
    return digest


def _note(sealing: tuple[str, dict[str, Sums], Future[str]] | None, journal: Journal) -> None:
    if sealing is not None:
        name, sums, digest = sealing
        journal.add(name, Done(digest.result(), sums))


def _write_rest(
    partial: Path,
    base: Path,
    config: dict[str, Any],
    shards: Sequence[Shard],
    journal: Journal,
    adapter: Adapter,
    dtype: str,
    companions: Iterable[Path],
) -> None:
    """Configuration, index, tokenizer and the note of what this is."""
    for path in companions:
        shutil.copyfile(path, partial / path.name)
    if dtype != "auto":
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    held = {output.name for shard in shards for output in shard.outputs}
    if held - {output.source.name for shard in shards for output in shard.outputs}:
        config["tie_word_embeddings"] = False
    _write(partial / "config.json", config)
    if (base / INDEX).exists():
        index = _read(base / INDEX)
        index["weight_map"] = {output.name: shard.source.name for shard in shards for output in shard.outputs}
        total = sum(output.size for shard in shards for output in shard.outputs)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        _write(partial / INDEX, index)
    note = {
        "schema": 1,
        "made_by": "merge",
        "adapter": adapter.digest,
        "base": journal.task["base"],
        "lineage": asdict(adapter.lineage),
        "files": {shard.source.name: journal.done[shard.source.name].digest for shard in shards},
    }
    _write(partial / "lorchestra.json", note)


def _clear(partial: Path, done: Iterable[str]) -> None:
    """What a killed merge left, but its finished files and its journal."""
    for path in partial.iterdir():
        if path.name not in {*done, NAME}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_room(partial: Path, out: Path, shards: Iterable[Shard]) -> None:
    needed, free = sum(shard.size for shard in shards), shutil.disk_usage(partial).free
    if needed > free:
        raise StorageError(
            f"cannot write the merged model to {out}: the disk is full: {needed / 1e9:.2f} GB are needed and "
            f"{free / 1e9:.2f} GB are free; free some space and try again, or choose another disk"
        )


def _config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.exists():
        raise SourceError(f"{base} has no config.json, so it is not a model directory")
    config = _read(path)
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise SourceError(
            f"{base} is quantised ({method}): what is stored are no weights that something can be added to. Merge into "
            "the unquantised model and quantise the result; or dequantise it first (lorchestra merge --dequantise), "
            "knowing that its rounding stays; or serve the adapter beside the quantised base"
        )
    return config


def _companions(base: Path, tokenizer: Path | None) -> list[Path]:
    """Files to copy: the base's, with its tokenizer's replaced by those of ``tokenizer``."""

    def found(directory: Path, patterns: Iterable[str]) -> list[Path]:
        names = (p for p in sorted(directory.iterdir()) if p.is_file() and p.name not in _NOT_COPIED)
        return [path for path in names if any(fnmatch(path.name, pattern) for pattern in patterns)]

    copied = found(base, _COPIED)
    if tokenizer is None:
        return copied
    own = found(tokenizer, _TOKENIZER)
    if not own:
        raise SourceError(f"{tokenizer} holds no tokenizer (tokenizer.json, …)")
    return [path for path in copied if not any(fnmatch(path.name, pattern) for pattern in _TOKENIZER)] + own


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is damaged: {error}; fetch the model again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} should hold a JSON object; it holds {type(value).__name__}")
    return value


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
