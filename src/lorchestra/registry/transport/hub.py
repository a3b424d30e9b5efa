"""Versions to the Hugging Face hub or its mirror (``HF_ENDPOINT``), and adapters from there.

What is pushed is the version's files as they are, its manifest, and a card for people where it has no README of its
own. What is pulled is an untrusted directory like any other; where a manifest of ours lies beside it, its files are
held to it, and note, tags and metrics come along. Weights are safetensors and nothing else, both ways.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorchestra.base.hub import fetch_hub
from lorchestra.base.source import Source
from lorchestra.errors import SourceError, UserError, counted
from lorchestra.events import SILENT, Reporter
from lorchestra.registry.manifest import LARGEST, Manifest, Metric, ParentEntry
from lorchestra.registry.mistakes import DamagedError, RegistryError
from lorchestra.registry.store.contents import CONFIG, WEIGHTS, write

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Version

MANIFEST, CARD = "lorchestra-manifest.json", "README.md"
# Of a repository, what an adapter's directory may hold; training leftovers and other forms of the weights stay there.
_TAKEN = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|lorchestra\.json|serve\.yaml|chat_template\.jinja|README\.md|"
    r"tokenizer(?:_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|"
    r"(?:tokenizer|spiece|sentencepiece\.bpe)\.model"
)
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class _Found:
    """What a repository holds beside the files: what our manifest told, if there was one."""

    note: str = ""
    tags: tuple[str, ...] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)


def push(registry: Registry, reference: str, repository: str, *, private: bool = False, branch: str = "") -> str:
    """Upload a version; the repository is made if it is not there, and other files in it stay.

    Args:
        registry: it is in.
        reference: to it.
        repository: ``org/name``.
        private: a new repository is.
        branch: on which; by default the main one.

    Returns:
        The address of the commit.

    Raises:
        UserError: ``repository`` is no name of one.
        RevokedError: the version is revoked.
        RegistryError: the hub cannot be reached, or does not let us.
    """
    from huggingface_hub import HfApi

    from lorchestra.registry.changing import check_ready

    _check_repository(repository)
    version = registry.resolve(reference)
    check_ready(version)
    with tempfile.TemporaryDirectory(prefix="lorchestra-hub-") as temporary:
        place = write(version.manifest.files, registry.blobs, Path(temporary) / "adapter")
        (place / MANIFEST).write_bytes(version.manifest.canonical())
        if CARD not in version.manifest.files:
            (place / CARD).write_text(card(version.manifest), encoding="utf-8")
        api = HfApi()
        with _talking(f"{version.reference} could not be pushed to {repository}"):
            api.create_repo(repository, private=private or None, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository,
                folder_path=place,
                revision=branch or None,
                commit_message=f"{version.reference} ({version.manifest.digest[:19]}…)",
                allow_patterns=[*version.manifest.files, MANIFEST, CARD],
            )
    return str(done.commit_url)


def pull(registry: Registry, source: str, name: str, *, why: str = "", reporter: Reporter = SILENT) -> Version:
    """Fetch an adapter and push it into the registry.

    Args:
        registry: to push it into.
        source: ``org/name`` or ``org/name@revision``.
        name: in the registry.
        why: for the audit log; where it came from is said there anyway.
        reporter: progress.

    Raises:
        SourceError: there is no such repository, it holds no adapter, or the hub cannot be reached.
        AdapterError: it holds an adapter that is not taken.
        DamagedError: its files are not those of the manifest beside them.
    """
    repository, _, revision = source.removeprefix("hf:").partition("@")
    _check_repository(repository)
    text = f"hf:{repository}" + (f"@{revision}" if revision else "")

    def of(inside: str = "") -> Source:
        return Source("hf", text, repository, revision, inside)

    try:
        fetch_hub(of(CONFIG), reporter, "model")  # a whole model is no adapter, and large
    except SourceError as error:
        if f"no {CONFIG!r}" not in str(error):
            raise
        raise SourceError(
            f"{text} holds no {CONFIG}, so it is no PEFT adapter; push its own directory instead"
        ) from error
    snapshot = fetch_hub(of(), reporter, "model")
    if not (snapshot / WEIGHTS).is_file():
        raise SourceError(
            f"{text} has no {WEIGHTS}. Pickled weights (adapter_model.bin) are not fetched: load the adapter in PEFT, "
            "save it again (save_pretrained) and push that directory"
        )
    with tempfile.TemporaryDirectory(prefix="lorchestra-hub-") as temporary:
        place = Path(temporary)
        found = _collected(snapshot, place, text)
        reason = f"from {text} at {snapshot.name}" + (f": {why}" if why else "")
        return registry.push(place, name, note=found.note, tags=found.tags, metrics=found.metrics or None, why=reason)


def card(manifest: Manifest) -> str:
    """A model card: the hub's header (base, library, tags), then what the manifest says, for people."""
    base = manifest.base.name
    head: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter"} if _REPOSITORY.fullmatch(base) else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": sorted({"lora", "peft", "lorchestra", *manifest.tags}),
    }
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]
    lines += [f"# {manifest.reference}", ""]
    lines += [manifest.note, ""] if manifest.note else []
    lowest, highest = min(manifest.ranks.values(), default=0), max(manifest.ranks.values(), default=0)
    rank = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    lines += [
        f"A LoRA adapter of {counted(len(manifest.ranks), 'module')}, rank {rank}, "
        f"{manifest.parameters:,} parameters, for {_code(base) if base else 'a base without a name'}.",
        "",
        f"Digest of its weights: {_code(manifest.digest)}",
        "",
    ]
    if manifest.base.weights:
        lines += [f"Digest of the base's weights: {_code(manifest.base.weights)}", ""]
    lines += _metrics(manifest.metrics)
    lines += _lineage(manifest)
    lines += ["Pushed from a lorchestra registry; the whole manifest is in " + _code(MANIFEST) + ".", ""]
    return "\n".join(lines)


def _metrics(metrics: Mapping[str, Metric]) -> list[str]:
    if not metrics:
        return []
    lines = ["## Metrics", "", "| metric | value | interval | better | measured on |", "|---|---|---|---|---|"]
    for name, metric in sorted(metrics.items()):
        interval = "–" if metric.low is None or metric.high is None else f"{metric.low:.4g} to {metric.high:.4g}"
        where = ", ".join(filter(None, (metric.split, f"n = {metric.n:,}" if metric.n is not None else ""))) or "–"
        lines.append(f"| {_cell(name)} | {metric.value:.4g} | {interval} | {metric.better} | {_cell(where)} |")
    return [*lines, ""]


def _lineage(manifest: Manifest) -> list[str]:
    made = " ".join(filter(None, (manifest.made_by, manifest.stage, f"({manifest.task})" if manifest.task else "")))
    lines = ["## Lineage", "", f"Made by: {_cell(made)}", ""]
    lines += _members("Sum of", manifest.parents) + _members("Trained beside", manifest.context)
    lines += [f"- data {_cell(name)} {_code(digest)}" for name, digest in manifest.data.items()]
    return [*lines, ""]


def _members(title: str, entries: list[ParentEntry]) -> list[str]:
    return [f"- {title} {entry.coefficient:g} · {_cell(entry.name)} {_code(entry.digest)}" for entry in entries]


def _cell(text: str) -> str:
    """Text that stays in its place, whatever it holds."""
    return " ".join(re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text).split())


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _collected(snapshot: Path, place: Path, text: str) -> _Found:
    """Copies of the files that are taken (a snapshot holds links into the hub's cache), and what a manifest told."""
    names = [path.name for path in snapshot.iterdir() if _TAKEN.fullmatch(path.name) and path.is_file()]
    manifest = _manifest(snapshot / MANIFEST, text)
    if manifest is None:
        for name in names:
            shutil.copyfile(snapshot / name, place / name)
        return _Found()
    for name, entry in manifest.files.items():
        if name not in names:
            raise DamagedError(f"{text} lacks {name}, which its {MANIFEST} names; fetch another revision", name)
        shutil.copyfile(snapshot / name, place / name)
        digest = _sha256(place / name)
        if digest != entry.sha256:
            raise DamagedError(
                f"{name} of {text} is not what its {MANIFEST} says ({digest[:19]}…, expected {entry.sha256[:19]}…): "
                "somebody changed it after it was pushed. Fetch another revision, or push the directory yourself",
                name,
            )
    return _Found(manifest.note, tuple(manifest.tags), manifest.metrics)


def _manifest(path: Path, text: str) -> Manifest | None:
    if not path.is_file():
        return None
    if path.stat().st_size > LARGEST:
        raise SourceError(f"{text}: its {MANIFEST} has {path.stat().st_size:,} bytes; at most {LARGEST:,} may be")
    try:
        return Manifest.parse(path.read_bytes())
    except UserError as error:
        raise SourceError(f"{text}: its {MANIFEST} is damaged: {error}") from error


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _check_repository(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository!r} is no repository of the hub; write org/name, as in acme/clinic-lora")


@contextmanager
def _talking(what: str) -> Iterator[None]:
    """The hub's errors, and its client's, in one sentence.

    Raises:
        RegistryError: instead of them.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{what}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise RegistryError(f"{what}: HF_HUB_OFFLINE is set. Unset it, and try again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        hint = "set HF_TOKEN to a token that may write there" if status in (401, 403) else "try again later"
        raise RegistryError(f"{what}: {constants.ENDPOINT} says {_line(error)}; {hint}") from error
    except Exception as error:  # the client's own hierarchy, and the socket's
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in (
            "httpx",
            "httpcore",
            "httpx2",
            "httpcore2",
        ):
            raise
        raise RegistryError(
            f"{what}: {constants.ENDPOINT} cannot be reached ({_line(error)}). For a mirror set HF_ENDPOINT"
        ) from error


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
