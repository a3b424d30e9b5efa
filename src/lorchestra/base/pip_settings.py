"""Where pip looks for packages: its configuration files and ``PIP_…`` variables, read as pip reads them.

pip itself need not be installed (environments made by uv have none).
"""

from __future__ import annotations

import configparser
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lorchestra.errors import SourceError

PYPI = "https://pypi.org/simple"


@dataclass(frozen=True)
class PipSettings:
    """What matters for finding and fetching a file.

    Args:
        index_urls: ``index-url``, then ``extra-index-url``; empty with ``no-index``.
        find_links: directories, pages or files.
        trusted_hosts: hosts whose certificates are not checked.
        proxy: for all requests; empty for the environment's.
        cert: CA bundle; empty for the system's.
        client_cert: PEM file of a client certificate, or empty.
        timeout: seconds.
        retries: of a broken connection.
    """

    index_urls: tuple[str, ...] = (PYPI,)
    find_links: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    proxy: str = ""
    cert: str = ""
    client_cert: str = ""
    timeout: float = 15.0
    retries: int = 5

    @classmethod
    def read(cls) -> PipSettings:
        """From files and environment: global, user, environment's own file, ``PIP_CONFIG_FILE``, variables.

        Raises:
            SourceError: a configuration file, or a number in it, that cannot be read.
        """
        values = _files()
        values |= {_key(k.removeprefix("PIP_")): v for k, v in os.environ.items() if k.startswith("PIP_") and v}
        urls = (values.get("index-url", PYPI), *values.get("extra-index-url", "").split())
        closed = values.get("no-index", "").lower() in ("1", "true", "yes", "on", "y", "t")
        bundles = (values.get("cert"), os.environ.get("REQUESTS_CA_BUNDLE"), os.environ.get("CURL_CA_BUNDLE"))
        try:
            timeout = float(values.get("timeout") or values.get("default-timeout") or 15)
            retries = int(values.get("retries", 5))
        except ValueError as error:
            raise SourceError(f"pip's timeout or retries is no number ({error}); mend its configuration") from error
        return cls(
            index_urls=() if closed else tuple(url.rstrip("/") for url in urls),
            find_links=tuple(os.path.expanduser(link) for link in values.get("find-links", "").split()),
            trusted_hosts=tuple(values.get("trusted-host", "").split()),
            proxy=values.get("proxy", ""),
            cert=next((bundle for bundle in bundles if bundle), ""),
            client_cert=values.get("client-cert", ""),
            timeout=timeout,
            retries=retries,
        )


def _files() -> dict[str, str]:
    """Key → value of ``[global]`` and, over it, ``[download]``; later files win."""
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}}
    for path in _paths():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise SourceError(f"pip's configuration {path} cannot be read: {error}") from error
        for section, values in found.items():
            if parser.has_section(section):
                values |= {_key(key): value for key, value in parser.items(section) if value}
    return {**found["global"], **found["download"]}


def _paths() -> list[Path]:
    """pip's configuration files, the weakest first."""
    import platformdirs

    chosen = os.environ.get("PIP_CONFIG_FILE", "")
    if chosen == os.devnull:
        return []
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    if sys.platform == "darwin":
        site = [Path("/Library/Application Support/pip")]
        user = Path("~/Library/Application Support/pip").expanduser()
        user = user if user.is_dir() else Path("~/.config/pip").expanduser()
    else:
        folders = platformdirs.site_config_dir("pip", appauthor=False, multipath=True).split(os.pathsep)
        site = [Path(folder) for folder in folders]
        site += [] if sys.platform == "win32" else [Path("/etc")]
        user = Path(platformdirs.user_config_dir("pip", appauthor=False, roaming=True))
    legacy = Path("~/pip" if sys.platform == "win32" else "~/.pip").expanduser()
    users = [] if chosen and Path(chosen).exists() else [legacy / name, user / name]
    return [
        *(folder / name for folder in site),
        *users,
        Path(sys.prefix) / name,
        *([Path(chosen)] if chosen else []),
    ]


def _key(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("--")
