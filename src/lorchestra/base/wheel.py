"""``pip:`` sources: a wheel (or an sdist, unpacked and never built) from the index that pip is set up for."""

from __future__ import annotations

import re
import shutil
import tarfile
import zipfile
from pathlib import Path

from lorchestra.base.archive import DAMAGED, ZIPPED, survey
from lorchestra.base.home import home
from lorchestra.base.locate import check_pin, file_sha256
from lorchestra.base.lock import locked
from lorchestra.base.package_index import PackageIndex
from lorchestra.base.pip_settings import PipSettings
from lorchestra.base.source import Source
from lorchestra.errors import NotHereError, SourceError
from lorchestra.events import Reporter

DONE = ".complete"


def fetch_wheel(source: Source, reporter: Reporter, fetch: bool = True) -> Path:
    """The unpacked distribution of ``source``, downloaded once.

    Nothing of it is run: wheels are zip files, and an sdist is unpacked, not built.

    Raises:
        NotHereError: it has not been downloaded yet, and ``fetch`` is false.
        SourceError: the index does not have it, it does not match its pin, or is not fit to be unpacked.
    """
    name = re.sub(r"[-_.]+", "-", source.name).lower()
    directory = home() / "sources" / f"{name}-{source.version}"
    marker = directory / DONE
    if not fetch and not marker.exists():
        raise NotHereError(f"source {source.text!r} has not been fetched yet")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_name(directory.name + ".lock"), f"the download of {source.text}", reporter.say):
        if not marker.exists():
            _fetch(source, directory, reporter)
        kept = marker.read_text(encoding="utf-8")
        if source.sha256 and kept != source.sha256:
            raise SourceError(
                f"source {source.text!r}: sha256 is {kept}, the pin says {source.sha256}. Mend the pin if you trust "
                f"this file; if the index has another one now, delete {directory} and run again"
            )
    return directory


def _fetch(source: Source, directory: Path, reporter: Reporter) -> None:
    download = directory.with_name(directory.name + ".download")
    unpacked = directory.with_name(directory.name + ".partial")
    for leftover in (directory, unpacked):
        shutil.rmtree(leftover, ignore_errors=True)
    index = PackageIndex(PipSettings.read())
    try:
        archive = index.download(index.find(source), download, source, reporter)
    finally:
        index.close()
    try:
        check_pin(archive, source)
        unpacked.mkdir()
        _unpack(archive, unpacked, source)
    except SourceError:
        archive.unlink()  # not wanted as it is: another try fetches it anew
        shutil.rmtree(unpacked, ignore_errors=True)
        raise
    (unpacked / DONE).write_text(file_sha256(archive), encoding="utf-8")
    unpacked.rename(directory)
    shutil.rmtree(download, ignore_errors=True)


def _unpack(archive: Path, directory: Path, source: Source) -> None:
    """The archive's files; an sdist's without its leading ``name-version/``."""
    try:
        survey(archive, directory, source)
        if archive.suffix == ".whl":
            _extract(archive, directory)
            return
        staging = directory / ".sdist"
        staging.mkdir()
        _extract(archive, staging)
    except tarfile.FilterError as error:
        raise SourceError(f"source {source.text!r}: {error}; refused") from error
    except DAMAGED as error:
        raise SourceError(f"source {source.text!r}: {archive.name} is damaged ({error}); fetch it again") from error
    tops = list(staging.iterdir())
    root = tops[0] if len(tops) == 1 and tops[0].is_dir() else staging
    for part in list(root.iterdir()):
        part.rename(directory / part.name)
    shutil.rmtree(staging)


def _extract(archive: Path, directory: Path) -> None:
    if archive.suffix in ZIPPED:
        with zipfile.ZipFile(archive) as bundle:
            bundle.extractall(directory)
    else:
        with tarfile.open(archive) as bundle:
            bundle.extractall(directory, filter="data")
