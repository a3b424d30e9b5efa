"""pip's configuration as pip reads it; where pip is at hand it is the oracle."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorchestra.base.pip_settings import PYPI, PipSettings
from lorchestra.errors import SourceError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_any_configuration(pip_environment):
    assert PipSettings.read() == PipSettings((PYPI,), (), (), "", "", "", 15.0, 5)


def test_a_file_and_its_sections(pip_environment, tmp_path):
    path = write(
        tmp_path / "pip.conf",
        "[global]\nindex-url = https://one.example/simple/\ntimeout = 3\ntrusted-host = a.example\n    b.example\n"
        "[install]\nindex-url = https://not-for-us.example/simple\n"
        "[download]\nextra_index_url =\n    https://two.example/simple\n    https://three.example/simple\n"
        "find-links = /wheels ~/wheels\nretries = 0\ncert = /ca.pem\nproxy = http://proxy.example:3128\n",
    )
    pip_environment.setenv("PIP_CONFIG_FILE", str(path))
    pip_environment.setenv("HOME", "/home/someone")
    found = PipSettings.read()
    assert found.index_urls == (
        "https://one.example/simple", "https://two.example/simple", "https://three.example/simple"
    )  # fmt: skip
    assert found.find_links == ("/wheels", "/home/someone/wheels")
    assert found.trusted_hosts == ("a.example", "b.example")
    assert (found.timeout, found.retries, found.cert, found.proxy) == (
        3.0, 0, "/ca.pem", "http://proxy.example:3128"
    )  # fmt: skip


def test_variables_win_over_files_and_empty_ones_do_not(pip_environment, tmp_path):
    path = write(tmp_path / "pip.conf", "[global]\nindex-url = https://one.example/simple\nfind-links = /wheels\n")
    pip_environment.setenv("PIP_CONFIG_FILE", str(path))
    pip_environment.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    pip_environment.setenv("PIP_FIND_LINKS", "")
    found = PipSettings.read()
    assert found.index_urls == ("https://mirror.example/simple",)
    assert found.find_links == ("/wheels",)


@pytest.mark.parametrize("value", ["1", "true", "Yes", "on"])
def test_no_index(pip_environment, value):
    pip_environment.setenv("PIP_NO_INDEX", value)
    pip_environment.setenv("PIP_EXTRA_INDEX_URL", "https://two.example/simple")
    assert PipSettings.read().index_urls == ()


def test_the_users_file(pip_environment, tmp_path):
    pip_environment.delenv("PIP_CONFIG_FILE")
    pip_environment.setenv("HOME", str(tmp_path))
    pip_environment.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    pip_environment.setenv("XDG_CONFIG_DIRS", str(tmp_path / "site"))
    for folder, host in (("site/pip", "site"), (".pip", "legacy"), ("xdg/pip", "user")):
        write(tmp_path / folder / "pip.conf", f"[global]\nindex-url = https://{host}.example/simple\n{host} = 1\n")
    pip_environment.setattr(sys, "prefix", str(tmp_path / "prefix"))
    pip_environment.setattr(sys, "platform", "linux")
    assert PipSettings.read().index_urls == ("https://user.example/simple",)
    write(tmp_path / "prefix" / "pip.conf", "[global]\nindex-url = https://venv.example/simple\n")
    assert PipSettings.read().index_urls == ("https://venv.example/simple",)
    chosen = write(tmp_path / "chosen.conf", "[global]\nfind-links = /wheels\n")
    pip_environment.setenv("PIP_CONFIG_FILE", str(chosen))
    assert PipSettings.read().find_links == ("/wheels",)


def test_pip_itself_says_the_same(pip_environment, tmp_path):
    path = write(tmp_path / "pip.conf", "[global]\nindex-url = https://one.example/simple\nretries = 2\n")
    pip_environment.setenv("PIP_CONFIG_FILE", str(path))
    pip_environment.setenv("PIP_FIND_LINKS", "/wheels")
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    lines = dict(line.split("=", 1) for line in told.stdout.splitlines())
    found = PipSettings.read()
    assert lines["global.index-url"] == repr(found.index_urls[0])
    assert lines["global.retries"] == repr(str(found.retries))
    assert lines[":env:.find-links"] == repr(found.find_links[0])


@pytest.mark.parametrize(
    ("text", "says"),
    [("index-url = x\n", "cannot be read"), ("[global]\ntimeout = soon\n", "no number")],
)
def test_a_bad_file_is_named(pip_environment, tmp_path, text, says):
    pip_environment.setenv("PIP_CONFIG_FILE", str(write(tmp_path / "pip.conf", text)))
    with pytest.raises(SourceError, match=says):
        PipSettings.read()
