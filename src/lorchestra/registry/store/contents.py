"""An adapter's directory ⇄ its files as blobs. A directory that is pushed is untrusted, and so is a list of files.

Only plain files by the kinds of :data:`KINDS` are taken, from the directory itself and from nowhere else. They are
copied once, to a directory of our own, and what is checked, loaded and stored is that copy: whoever writes into the
directory meanwhile changes nothing of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from lorchestra.adapter.directory import whole_directory
from lorchestra.base.safetensors_file import entries
from lorchestra.errors import AdapterError, LorchestraError, SourceError
from lorchestra.registry.manifest import FileEntry
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.store.blobs import Blobs
from lorchestra.registry.store.stored import CHUNK

if TYPE_CHECKING:
    from lorchestra.adapter.adapter import Adapter

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "lorchestra.json"
GATE = "gate.json"  # of what is none
MOST_FILES = 64
LONGEST = 128  # characters of a file's name
LARGEST = 32 << 30  # bytes of all files together
HEADER = 16 << 20  # bytes of the header of a safetensors file
_MiB = 1 << 20
# What may be in a directory, and up to how many bytes. The first that fits counts.
KINDS: tuple[tuple[str, int], ...] = (
    (re.escape(CONFIG), 16 * _MiB),
    (re.escape(WEIGHTS), LARGEST),
    (re.escape(SIDECAR), 16 * _MiB),
    (r"serve\.yaml", _MiB),
    (r"chat_template\.jinja", _MiB),
    (r"README\.md", _MiB),
    (r"prototypes\.safetensors", 16 * _MiB),  # what a router knows of it
    (r".+\.(?:json|txt|model)", 128 * _MiB),  # a tokenizer's
)
NEEDED = (CONFIG, WEIGHTS)
IGNORED = frozenset(
    {".cache", ".git", ".gitattributes", ".gitignore", ".DS_Store"}
)  # what tools leave beside the files
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_PICKLED = re.compile(r".+\.(?:bin|pt|pth|pkl|pickle|ckpt|npy|npz|joblib)", re.IGNORECASE)
_EXACT = {name.lower(): name for name in (CONFIG, WEIGHTS, SIDECAR, "serve.yaml", "chat_template.jinja", "README.md")}
_DEVICES = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")  # no file has such a name on Windows


@dataclass(frozen=True, eq=False)
class Contents:
    """What a directory held at one moment: copied, checked and loaded.

    It keeps its copy until it is closed (or forgotten); use it as a context manager.

    Args:
        files: name → digest and bytes.
        adapter: as loaded from those very bytes.
    """

    files: Mapping[str, FileEntry]
    adapter: Adapter
    _copy: Path = field(repr=False)
    _remove: weakref.finalize[..., object] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_remove", weakref.finalize(self, shutil.rmtree, self._copy, ignore_errors=True))

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Read an adapter's directory.

        Raises:
            AdapterError: it holds something that is not taken, or no adapter; the message says what to do. Also where
                it changes while it is read.
            RegistryError: no room for the copy.
        """
        from lorchestra.adapter.adapter import Adapter

        _check_not_around(directory)
        copy = Path(tempfile.mkdtemp(prefix="lorchestra-push-"))
        try:
            files = _copied(directory, copy)
            _check_header(copy / WEIGHTS)
            return cls(files, Adapter.load(copy), copy)
        except BaseException as error:
            shutil.rmtree(copy, ignore_errors=True)
            if isinstance(error, (AdapterError, SourceError)):  # they name the copy, which is nobody's business
                raise AdapterError(str(error).replace(str(copy), str(directory))) from error
            raise

    def store(self, blobs: Blobs) -> dict[str, FileEntry]:
        """Put every file into ``blobs``.

        Returns:
            Name → digest and bytes of what was put.

        Raises:
            RegistryError: the store is full or down, or the copy was changed.
        """
        for name, entry in self.files.items():
            put = blobs.put_file(self._copy / name)
            if put != (entry.sha256, entry.size):
                raise RegistryError(f"the copy of {name} in {self._copy} was changed by somebody; push again")
        return dict(self.files)

    def close(self) -> None:
        """Remove the copy; twice is no mistake."""
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write(files: Mapping[str, FileEntry], blobs: Blobs, directory: Path) -> Path:
    """Write the files into ``directory``, whole or not at all, each checked by its digest.

    Args:
        files: name → digest and bytes.
        blobs: where they are.
        directory: empty or not there yet; its parent is made.

    Raises:
        AdapterError: a name or size that is not taken, or no adapter's; nothing is written.
        DamagedError: a blob is missing, or not what it should be.
        RegistryError: the store is down, or the disk is full.
        StorageError: the directory is not empty, or cannot be written.
    """
    check_files({name: entry.size for name, entry in files.items()})
    with whole_directory(directory, "the adapter") as partial:
        for name, entry in files.items():
            size = blobs.fetch(entry.sha256, partial / name)
            if size != entry.size:
                raise DamagedError(
                    f"{name} should have {entry.size:,} bytes and the blob {entry.sha256} has {size:,}: the list of "
                    "files is damaged; restore a backup",
                    entry.sha256,
                )
    return directory


def _check_not_around(directory: Path) -> None:
    """A run's directory, or one of several adapters, is not told file by file that it is none."""
    if (directory / CONFIG).exists():
        return
    if (directory / GATE).exists():
        raise AdapterError(
            f"{directory} is a gate, and a registry keeps adapters: push those that it chooses among, and give the "
            f"gate to a server, lorchestra serve BASE --registry URL --gate NAME={directory}"
        )
    found = sorted(path.parent for form in (f"*/{CONFIG}", f"final/*/{CONFIG}") for path in directory.glob(form))
    if found:
        more = f" (or {len(found) - 1} more there)" if len(found) > 1 else ""
        raise AdapterError(f"{directory} has no {CONFIG}, so it is no adapter; did you mean {found[0]}{more}?")


def check_files(sizes: Mapping[str, int]) -> None:
    """Whether files of these names and bytes make an adapter's directory; their content is not looked at.

    Raises:
        AdapterError: they do not; the message says what to do.
    """
    if len(sizes) > MOST_FILES:
        raise AdapterError(f"an adapter of {len(sizes):,} files; at most {MOST_FILES} may be")
    for name, size in sizes.items():
        _check_name(name)
        if size > _limit(name):
            raise AdapterError(f"{name} has {size:,} bytes; at most {_limit(name):,} may be")
    if sum(sizes.values()) > LARGEST:
        raise AdapterError(f"the files have {sum(sizes.values()):,} bytes together; at most {LARGEST:,} may be")
    _check_apart(sizes)
    for name in NEEDED:
        if name not in sizes:
            raise AdapterError(f"there is no {name} among {', '.join(sorted(sizes)) or 'no files'}: no PEFT adapter")


def _check_apart(names: Collection[str]) -> None:
    """Names that one file system tells apart and another does not would overwrite each other."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise AdapterError(f"{other} and {name} differ in capitals alone; rename or remove one")


def _check_name(name: str) -> None:
    shown = repr(name if len(name) <= 60 else name[:57] + "…")
    if len(name) > LONGEST:
        raise AdapterError(f"the file name {shown} has {len(name):,} characters; at most {LONGEST} may be")
    if name.startswith("."):
        raise AdapterError(f"{shown} is hidden, perhaps half a download; remove it, or finish what writes it")
    if not _NAME.fullmatch(name) or name.endswith(".") or _DEVICES.fullmatch(name):
        raise AdapterError(
            f"{shown} is no file name that is taken: letters (a to z), digits, '_', '-' and '.', in no directory; "
            "rename or remove it"
        )
    if _PICKLED.fullmatch(name):
        raise AdapterError(
            f"{name} may hold a pickle, which runs code when it is loaded, and is not taken. Weights are "
            f"{WEIGHTS}: load the adapter in PEFT and save it again (save_pretrained). If it is what training left "
            "(optimizer.pt, training_args.bin), leave it behind: `lorchestra export ADAPTER -o DIR` writes the adapter "
            "alone"
        )
    if _EXACT.get(name.lower(), name) != name:
        raise AdapterError(f"{name} should be written {_EXACT[name.lower()]}; rename it")
    if not _limit(name):
        raise AdapterError(
            f"{name} is of no kind that an adapter's directory holds: {CONFIG}, {WEIGHTS}, {SIDECAR}, serve.yaml, "
            "chat_template.jinja, README.md, and a tokenizer's *.json, *.txt and *.model. Remove it, or let "
            "`lorchestra export ADAPTER -o DIR` write the adapter alone"
        )


def _limit(name: str) -> int:
    """Bytes; 0 for a kind that is not taken."""
    return next((most for kind, most in KINDS if re.fullmatch(kind, name)), 0)


def _copied(directory: Path, copy: Path) -> dict[str, FileEntry]:
    with _reading(directory):
        if not directory.is_dir():
            _refuse(directory, f"no directory; an adapter is one with {CONFIG} and {WEIGHTS}")
        names = _names(directory)
        if len(names) > MOST_FILES:
            _refuse(directory, f"it holds {len(names):,} files; at most {MOST_FILES} may be")
        sizes = {}
        for name in names:
            with _naming(directory):
                _check_name(name)
            sizes[name] = _plain(directory / name).st_size
        with _naming(directory):
            check_files(sizes)
        files = {name: _copy(directory / name, copy / name, sizes[name]) for name in names}
        if _names(directory) != names:
            _refuse(directory, "files came or went while it was read; push again when nothing writes there")
    return files


def _names(directory: Path) -> list[str]:
    return sorted(set(os.listdir(directory)) - IGNORED)


def _plain(path: Path) -> os.stat_result:
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        _refuse(
            path, f"a link, and links are not followed; push a copy with the files themselves (cp -rL {path.parent} …)"
        )
    if stat.S_ISDIR(found.st_mode):
        _refuse(path, "a directory, and an adapter's files lie side by side; move it elsewhere")
    if not stat.S_ISREG(found.st_mode):
        _refuse(path, "a pipe, socket or device, no file; remove it")
    return found


def _copy(path: Path, target: Path, size: int) -> FileEntry:
    """The bytes of one opening, no more than were announced; a change of size or time meanwhile is told of."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags), "rb", buffering=0) as source:
        before = os.fstat(source.fileno())
        if not stat.S_ISREG(before.st_mode):
            _refuse(path, "it was replaced by something else while it was read")
        sha, read = hashlib.sha256(), 0
        with _room(target), target.open("xb") as out:
            while read <= size and (chunk := source.read(CHUNK)):
                sha.update(chunk)
                read += out.write(chunk)
        after = os.fstat(source.fileno())
    if read != size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        _refuse(path, "it changed while it was read; push again when nothing writes to it")
    return FileEntry(sha256=f"sha256:{sha.hexdigest()}", size=size)


def _check_header(weights: Path) -> None:
    """The header's size before anything parses it, then that it and the file fit together."""
    with weights.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    if size > HEADER:
        raise AdapterError(
            f"{weights} has a header of {size:,} bytes, at most {HEADER:,} may be: it is damaged, or of another format"
        )
    entries(weights)


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise AdapterError(f"cannot read {getattr(error, 'filename', None) or directory}: {why}") from error


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{directory}: {error}") from None


@contextmanager
def _room(target: Path) -> Iterator[None]:
    try:
        yield
    except LorchestraError:
        raise
    except OSError as error:
        raise RegistryError(
            f"cannot copy {target.name} to {target.parent} for the push: {error.strerror}. Free some space there, or "
            "set TMPDIR to a directory with more"
        ) from error


def _refuse(path: Path, why: str) -> NoReturn:
    raise AdapterError(f"{path}: {why}")
