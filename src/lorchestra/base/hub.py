"""``hf:`` sources: a model, adapter or data set of the Hugging Face hub, or of its mirror (``HF_ENDPOINT``)."""

from __future__ import annotations

import difflib
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from lorchestra.base.download import DamagedError, download
from lorchestra.base.home import home
from lorchestra.base.lock import locked
from lorchestra.base.source import Source
from lorchestra.errors import NotHereError, SourceError
from lorchestra.events import Reporter, Task

RepoType = Literal["model", "dataset"]

# A base or an adapter is safetensors, JSON and tokenizer files; pickled weights are never fetched. A GGUF file is
# named (hf:org/name/file.gguf): repositories hold a dozen sizes of one model.
WANTED = {
    "model": ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.md"],
    "dataset": ["*.jsonl", "*.ndjson", "*.json", "*.csv", "*.tsv", "*.parquet", "*.txt", "*.md", "*.gz"],
}
# The same weights once more, in other forms.
UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
LARGE = 10_000_000  # bytes; from here on a part is worth keeping


def fetch_hub(source: Source, reporter: Reporter, repo_type: RepoType, fetch: bool = True) -> Path:
    """The local snapshot of ``source``, or the file inside; a killed download goes on where it stopped.

    Raises:
        NotHereError: it has not been downloaded (as a whole) yet, and ``fetch`` is false.
        SourceError: there is no such repository, revision or file, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

    cache = home() / "hub"
    wanted: dict[str, Any] = {
        "repo_id": source.name,
        "revision": source.version or None,
        "repo_type": repo_type,
        "cache_dir": cache,
        "allow_patterns": [source.inside] if source.inside else WANTED[repo_type],
        "ignore_patterns": None if source.inside else UNWANTED,
    }
    if not fetch:
        try:
            snapshot = Path(snapshot_download(**wanted, local_files_only=True))
        except FileNotFoundError as error:
            raise NotHereError(f"source {source.text!r} has not been fetched yet") from error
        return _inside(snapshot, source, repo_type, fetch)
    cache.mkdir(parents=True, exist_ok=True)
    lock = cache / f"{repo_type}-{source.name.replace('/', '--')}.lock"
    try:
        with locked(lock, f"the download of {source.text}", reporter.say):
            try:
                planned = snapshot_download(**wanted, dry_run=True)
                missing = [file for file in planned if file.will_download]
            except DryRunError:
                missing = []  # the hub cannot be asked: what is here already may do
            if missing:
                total = sum(file.file_size for file in missing)
                with reporter.task(f"fetch {source.text}", total, "B") as task:
                    counter = _Counter(task)
                    for file in missing:
                        if file.file_size >= LARGE:
                            _fetch_large(source, repo_type, file.commit_hash, file.filename, counter, reporter)
                    snapshot = Path(snapshot_download(**wanted, tqdm_class=counter.bar()))
                    counter.complete(total)
            else:
                snapshot = Path(snapshot_download(**wanted))
        return _inside(snapshot, source, repo_type, fetch)
    except DamagedError as error:
        raise SourceError(f"source {source.text!r}: {error}; it was removed, try again") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise SourceError(_message(source, error)) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise SourceError(_message(source, error)) from error
    except Exception as error:  # the hub's HTTP client has its own hierarchy, not OSError
        if type(error).__module__.split(".")[0] not in ("httpx2", "httpcore2", "httpx", "httpcore", "requests"):
            raise
        raise SourceError(_message(source, error)) from error


def _fetch_large(
    source: Source, repo_type: RepoType, commit: str, filename: str, counter: _Counter, reporter: Reporter
) -> None:
    """Put one file into the hub's cache, where huggingface_hub then finds it.

    Since version 2 it begins a file anew after a kill, and gigabytes may be lost; here the part is kept.
    """
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(source.name, filename, repo_type=repo_type, revision=commit)
    etag = get_hf_file_metadata(url).etag
    if not etag:
        return  # huggingface_hub will say what is wrong with it
    blob = home() / "hub" / repo_folder_name(repo_id=source.name, repo_type=repo_type) / "blobs" / etag
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    # Large files are named by their SHA-256; the authorisation does not follow a redirect to another host.
    sha256 = etag if len(etag) == 64 else ""
    with httpx2.Client(timeout=30, follow_redirects=True) as client:
        download(
            client,
            url,
            blob,
            sha256=sha256,
            same=True,
            headers=build_hf_headers(),
            meter=lambda total: nullcontext(counter),
            say=reporter.say,
        )


class _Counter:
    """Passes the bytes that several threads receive on to one task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.done = 0.0
        self._lock = threading.Lock()

    def advance(self, amount: float = 1.0, **figures: Any) -> None:
        with self._lock:
            self.done += amount
            self.task.advance(amount, **figures)

    def complete(self, total: float) -> None:
        """Early versions of huggingface_hub count files only."""
        if self.done < total:
            self.advance(total - self.done)

    def bar(self) -> type[Any]:
        """What huggingface_hub takes for a progress bar."""
        from huggingface_hub.utils.tqdm import tqdm

        counter = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                # One bar counts what is written; "Downloading bytes" counts the same as it comes over the network.
                self.counts = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
                super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                if self.counts and n:
                    counter.advance(n)

        return Bar


def _inside(snapshot: Path, source: Source, repo_type: RepoType, fetch: bool) -> Path:
    path = snapshot / source.inside if source.inside else snapshot
    if path.exists():
        return path
    if not fetch:
        raise NotHereError(f"source {source.text!r} has not been fetched yet")
    from huggingface_hub import HfApi

    names = HfApi().list_repo_files(source.name, revision=source.version or None, repo_type=repo_type)
    near = difflib.get_close_matches(source.inside, names, 3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise SourceError(f"source {source.text!r}: the repository has no {source.inside!r}{hint}")


def _message(source: Source, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    why = lines[0] if lines else type(error).__name__
    if isinstance(error, GatedRepoError):
        why = "the repository is gated; ask for access on its page, then set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        why = f"there is no repository {source.name!r}, or it is private"
    elif isinstance(error, RevisionNotFoundError):
        why = f"the repository has no revision {source.version!r}"
    elif constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set, and it has not been fetched before"
    return (
        f"source {source.text!r} could not be fetched from {constants.ENDPOINT}: {why}\n"
        "  - a mirror: set HF_ENDPOINT, for example HF_ENDPOINT=https://hf-mirror.com\n"
        "  - a private or gated repository: set HF_TOKEN\n"
        "  - offline: fetch it elsewhere, copy the directory here and write its path instead of the name"
    )
