"""The file of a distribution on the package index that pip is set up for: found, and downloaded resumably.

pip's own ``download`` would run an sdist's build to learn its metadata; here nothing of a package is ever run. The
index pages are read by unearth, PDM's finder.
"""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorchestra.base.download import DamagedError, download, reason
from lorchestra.base.pip_settings import PipSettings
from lorchestra.base.source import Source
from lorchestra.errors import SourceError
from lorchestra.events import Reporter


@dataclass(frozen=True)
class Archive:
    """A wheel or an sdist on an index: where, its file name, and the index's SHA-256 of it (or empty)."""

    url: str
    filename: str
    sha256: str


class PackageIndex:
    """The find-links places and index pages of ``settings``; close it with :meth:`close`."""

    def __init__(self, settings: PipSettings) -> None:
        from unearth.auth import MultiDomainBasicAuth
        from unearth.fetchers.sync import PyPIClient

        self.settings = settings
        self._session = PyPIClient(
            trusted_hosts=settings.trusted_hosts,
            verify=_certificates(settings),
            timeout=settings.timeout,
            proxy=settings.proxy or None,
            follow_redirects=True,
        )
        self._session.auth = MultiDomainBasicAuth(prompting=False, index_urls=settings.index_urls)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def find(self, source: Source) -> Archive:
        """The best file of ``source``'s version: a wheel before an sdist, a pure wheel before one for a platform.

        Whether it could be installed here does not matter: its files are read, nothing is run.

        Raises:
            SourceError: no place has it; the message says what was tried.
        """
        found: list[Any] = []
        said: list[str] = []
        versions: set[str] = set()
        for kind, place in [
            *(("find_links", link) for link in self.settings.find_links),
            *(("index_urls", url) for url in self.settings.index_urls),
        ]:
            if any(package.link.is_wheel for package in found):
                break  # what lies at hand needs no network
            packages, problem = self._packages(kind, place, source.name)
            same = [package for package in packages if _is_version(package.version, source)]
            found += same
            versions |= {package.version for package in packages}
            if not same:
                said.append(f"{_redacted(place)}: {problem or _other_versions(packages, source.version)}")
        if not found:
            raise SourceError(_not_found(source, said))
        link = max(found, key=_preference).link
        hashes = link.hash_option or {}
        return Archive(link.url_without_fragment, link.filename, next(iter(hashes.get("sha256", [])), ""))

    def download(self, archive: Archive, directory: Path, source: Source, reporter: Reporter) -> Path:
        """The file in ``directory``; an earlier, killed download goes on where it stopped.

        Raises:
            SourceError: it cannot be fetched, or does not have the index's SHA-256.
        """
        import httpx2

        final = directory / archive.filename
        if final.exists():
            return final
        directory.mkdir(parents=True, exist_ok=True)
        try:
            download(
                self._session,
                archive.url,
                final,
                sha256=archive.sha256,
                retries=self.settings.retries,
                meter=lambda total: reporter.task(f"fetch {source.name} {source.version}", total, "B"),
                say=reporter.say,
            )
        except httpx2.HTTPError as error:
            raise SourceError(_not_found(source, [f"{_redacted(archive.url)}: {reason(error)}"])) from error
        except DamagedError as error:
            raise SourceError(f"source {source.text!r}: {error}; it was removed, try again") from error
        return final

    def _packages(self, kind: str, place: str, name: str) -> tuple[list[Any], str]:
        """All files of ``name`` at one place, and what went wrong there."""
        import httpx2
        from unearth import PackageFinder

        if kind == "find_links" and "://" not in place and not os.path.exists(place):
            return [], "there is no such directory"
        heard = _Heard()
        logger = logging.getLogger("unearth")
        logger.addHandler(heard)
        try:
            sources: dict[str, Any] = {kind: [place]}
            finder = PackageFinder(self._session, ignore_compatibility=True, **sources)
            return list(finder.find_all_packages(name, allow_yanked=True)), heard.last
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            return [], reason(error)
        finally:
            logger.removeHandler(heard)


class _Heard(logging.Handler):
    """Keeps the last warning: unearth logs why a page could not be read, and goes on."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.last = str(record.args[-1]) if isinstance(record.args, tuple) and record.args else record.getMessage()


def _certificates(settings: PipSettings) -> ssl.SSLContext | bool:
    if not (settings.cert or settings.client_cert):
        return True
    try:
        folder = settings.cert if os.path.isdir(settings.cert) else None
        context = ssl.create_default_context(cafile=None if folder else settings.cert or None, capath=folder)
        if settings.client_cert:
            context.load_cert_chain(settings.client_cert)
    except OSError as error:
        raise SourceError(f"pip's cert or client-cert cannot be read: {error}; mend its configuration") from error
    return context


def _is_version(version: str, source: Source) -> bool:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(f"=={source.version}").contains(version, prereleases=True)
    except InvalidSpecifier:
        raise SourceError(f"source {source.text!r}: {source.version!r} is no version; write 1.2.3") from None


def _preference(package: Any) -> tuple[bool, bool, bool, str]:
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    link = package.link
    if not link.is_wheel:
        return False, False, False, link.filename
    tags = parse_wheel_filename(link.filename)[-1]
    pure = any(tag.abi == "none" and tag.platform == "any" for tag in tags)
    return True, pure, not tags.isdisjoint(sys_tags()), link.filename


def _other_versions(packages: list[Any], wanted: str) -> str:
    from packaging.version import Version

    versions = sorted({package.version for package in packages}, key=Version)
    return f"it has {', '.join(versions[-5:])}, not {wanted}" if versions else "it has no file of this name"


def _not_found(source: Source, said: list[str]) -> str:
    tried = "".join(f"\n  tried {line}" for line in said) or "\n  no index and no find-links: PIP_NO_INDEX is set"
    return (
        f"source {source.text!r} could not be fetched; {source.name}=={source.version}:{tried}\n"
        "  - another index or a mirror: set PIP_INDEX_URL, or index-url in pip's configuration\n"
        "  - offline: put the wheel into a directory and set PIP_FIND_LINKS to it, or unpack it and write the path "
        "of the file inside"
    )


def _redacted(place: str) -> str:
    """Without the user and password of a URL."""
    scheme, mark, rest = place.partition("://")
    if not mark:
        return place
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
