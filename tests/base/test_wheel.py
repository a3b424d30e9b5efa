"""``pip:`` sources: fetched once, checked, unpacked, and never run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import zipfile

import pytest

from lorchestra.base.locate import locate
from lorchestra.errors import NotHereError, SourceError

SENTINEL = "the sdist's code was run"


def wheel(directory, name="some_data", version="1.0", members=None, tags="py3-none-any"):
    """A wheel by hand."""
    path = directory / f"{name}-{version}-{tags}.whl"
    info = f"{name}-{version}.dist-info"
    members = members or {f"{name}/rows.jsonl": '{"prompt": "a", "completion": "b"}\n'}
    with zipfile.ZipFile(path, "w") as bundle:
        for member, text in members.items():
            bundle.writestr(member, text)
        bundle.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: " + tags)
        bundle.writestr(f"{info}/RECORD", "")
    return path


def sdist(directory, proof, name="some-data", version="1.0", extra=()):
    """An sdist by hand, whose setup.py and build backend would leave ``proof``."""
    path = directory / f"{name}-{version}.tar.gz"
    trap = f"open({str(proof)!r}, 'w').write({SENTINEL!r})\n"
    members = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "setup.py": trap + "from setuptools import setup\nsetup()\n",
        "backend.py": trap + "from setuptools.build_meta import *\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "some_data/rows.jsonl": "{}\n",
    }
    with tarfile.open(path, "w:gz") as bundle:
        for member, text in members.items():
            entry = tarfile.TarInfo(f"{name}-{version}/{member}")
            entry.size = len(text)
            bundle.addfile(entry, io.BytesIO(text.encode()))
        for entry in extra:
            bundle.addfile(entry, io.BytesIO(b""))
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once(links):
    made = wheel(links)
    source = f"pip:some-data==1.0/some_data/rows.jsonl#sha256={sha256(made)}"
    with pytest.raises(NotHereError, match="not been fetched"):
        locate(source, fetch=False)
    found = locate(source)
    assert json.loads(found.read_text()) == {"prompt": "a", "completion": "b"}
    shutil.rmtree(links)
    assert locate(source) == found, "the index is gone and not needed"
    assert locate("pip:Some_Data==1.0/some_data/rows.jsonl", fetch=False) == found, "one name, however it is spelled"
    assert {p.name for p in found.parents[2].iterdir()} <= {"some-data-1.0", "some-data-1.0.lock"}, "no leftovers"


def test_the_whole_package_and_a_mistyped_path_inside(links):
    wheel(links)
    assert (locate("pip:some-data==1.0") / "some_data" / "rows.jsonl").is_file()
    with pytest.raises(SourceError, match=r"nearest: some_data/rows\.jsonl"):
        locate("pip:some-data==1.0/some_data/row.jsonl")


def test_an_sdist_is_unpacked_and_never_run(links, tmp_path):
    proof = tmp_path / "proof"
    sdist(links, proof)
    found = locate("pip:some-data==1.0/some_data/rows.jsonl")
    assert found.read_text() == "{}\n"
    assert (found.parents[1] / "setup.py").is_file(), "its files are there, without the leading directory"
    assert not proof.exists(), SENTINEL


def test_a_zip_sdist(links):
    with zipfile.ZipFile(links / "some-data-1.0.zip", "w") as bundle:
        bundle.writestr("some-data-1.0/some_data/rows.jsonl", "{}\n")
    assert locate("pip:some-data==1.0/some_data/rows.jsonl").read_text() == "{}\n"


def test_a_wheel_wins_over_an_sdist_and_a_pure_one_over_a_platforms(links, tmp_path):
    sdist(links, tmp_path / "proof")
    wheel(links, members={"some_data/rows.jsonl": "platform\n"}, tags="cp27-cp27m-win_amd64")
    assert locate("pip:some-data==1.0/some_data/rows.jsonl").read_text() == "platform\n", "read anywhere"
    shutil.rmtree(locate("pip:some-data==1.0"))
    wheel(links, members={"some_data/rows.jsonl": "pure\n"})
    assert locate("pip:some-data==1.0/some_data/rows.jsonl").read_text() == "pure\n"


def test_a_wrong_pin(links):
    made = wheel(links)
    wrong = "0" * 64
    with pytest.raises(SourceError, match=f"sha256 is {sha256(made)}, the pin says {wrong}"):
        locate(f"pip:some-data==1.0#sha256={wrong}")
    right = f"pip:some-data==1.0#sha256={sha256(made)}"
    assert locate(right).is_dir(), "a mended pin fetches it"
    with pytest.raises(SourceError, match=r"delete .*some-data-1\.0 and run again"):
        locate(f"pip:some-data==1.0#sha256={wrong}")


@pytest.mark.parametrize("member", ["../evil", "some_data/../../evil", "/tmp/evil"])
def test_a_wheel_that_climbs_out_is_refused(links, tmp_path, member):
    wheel(links, members={member: "evil"})
    with pytest.raises(SourceError, match="climbs out of it; refused"):
        locate("pip:some-data==1.0")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("some-data-1.0/../../evil", tarfile.REGTYPE, ""),
        ("some-data-1.0/link", tarfile.SYMTYPE, "/etc"),
        ("some-data-1.0/link", tarfile.LNKTYPE, "../../outside"),
        ("some-data-1.0/pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_an_sdist_that_reaches_out_is_refused(links, tmp_path, name, kind, target):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    sdist(links, tmp_path / "proof", extra=[entry])
    with pytest.raises(SourceError, match="refused"):
        locate("pip:some-data==1.0")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["some_data-1.0-py3-none-any.whl", "some-data-1.0.tar.gz"])
def test_a_damaged_archive(links, tmp_path, name):
    good = wheel(links) if name.endswith("whl") else sdist(links, tmp_path / "proof")
    whole = good.read_bytes()
    good.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=f"{name} is damaged"):
        locate("pip:some-data==1.0")
    good.write_bytes(whole)
    assert locate("pip:some-data==1.0").is_dir(), "a good file is fetched after all"


def test_no_such_version_says_what_there_is(links):
    wheel(links, version="0.9")
    wheel(links, version="0.10")
    with pytest.raises(SourceError) as caught:
        locate("pip:some-data==1.0")
    assert f"tried {links}: it has 0.9, 0.10, not 1.0" in str(caught.value)
    assert "PIP_INDEX_URL" in str(caught.value)
    assert "PIP_FIND_LINKS" in str(caught.value)


def test_no_index_at_all(pip_environment):
    pip_environment.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match="PIP_NO_INDEX is set"):
        locate("pip:some-data==1.0")


def test_no_such_directory(links, pip_environment):
    pip_environment.setenv("PIP_FIND_LINKS", f"{links}/elsewhere {links}")
    wheel(links)
    assert locate("pip:some-data==1.0").is_dir()
    with pytest.raises(SourceError, match="elsewhere: there is no such directory"):
        locate("pip:other-data==1.0")


@pytest.fixture
def index(served, tmp_path, pip_environment):
    """A package index on the loopback interface with one wheel of 3 MB."""
    (tmp_path / "files").mkdir()
    made = wheel(tmp_path / "files", members={"some_data/rows.bin": bytes(range(256)) * 12_000})
    served.files["/files/" + made.name] = made.read_bytes()
    served.path = "/files/" + made.name
    page = f'<a href="/files/{made.name}#sha256={sha256(made)}">{made.name}</a>'
    served.pages["/simple/some-data/"] = ("text/html", page)
    pip_environment.setenv("PIP_INDEX_URL", served.url + "/simple")
    pip_environment.setenv("PIP_RETRIES", "1")
    served.made = made
    return served


def test_from_an_index_with_progress_in_bytes(index, located):
    size = index.made.stat().st_size
    found = located("pip:some-data==1.0/some_data/rows.bin")
    assert found["tasks"] == [{"task": "fetch some-data 1.0", "total": size, "unit": "B", "done": size}]
    assert located("pip:some-data==1.0/some_data/rows.bin")["tasks"] == []
    assert len(index.gets(index.path)) == 1


def test_a_killed_download_goes_on(index, locating, located, tmp_path):
    index.stall_after = 2_000_000
    first = locating("pip:some-data==1.0")
    assert index.stalled.wait(60)
    part = tmp_path / "home" / "sources" / "some-data-1.0.download" / (index.made.name + ".part")
    deadline = threading.Event()
    while not part.exists() or part.stat().st_size < 1_000_000:
        assert not deadline.wait(0.02)
    first.kill()
    first.wait()
    assert not (tmp_path / "home" / "sources" / "some-data-1.0").exists()
    start = part.stat().st_size
    index.stall_after = None
    index.go_on.set()
    found = located("pip:some-data==1.0")
    assert "path" in found
    assert index.gets(index.path) == ["", f"bytes={start}-"]
    assert found["tasks"][0]["done"] == found["tasks"][0]["total"] == index.made.stat().st_size


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_disk_that_takes_no_more(index, located, tmp_path):
    found = located("pip:some-data==1.0", TEST_FILE_SIZE="1000000")
    assert (found["error"], found["code"]) == ("StorageError", 1)
    assert "cannot write the cache for 'pip:some-data==1.0'" in found["text"]
    assert "Free some space, or set LORCHESTRA_HOME" in found["text"]
    assert not (tmp_path / "home" / "sources" / "some-data-1.0").exists()
    assert "path" in located("pip:some-data==1.0"), "with space it goes on"
    assert index.gets(index.path)[1].startswith("bytes="), "from where it stopped"


def test_what_another_file_has_become_is_not_joined(index, located, tmp_path):
    download = tmp_path / "home" / "sources" / "some-data-1.0.download"
    download.mkdir(parents=True)
    (download / (index.made.name + ".part")).write_bytes(b"x" * 1000)
    found = located("pip:some-data==1.0")
    assert "damaged on its way" in found["text"]
    assert "path" in located("pip:some-data==1.0"), "and the next try starts anew"


def test_two_processes_fetch_once(index, locating):
    index.stall_after = 1_000_000
    first = locating("pip:some-data==1.0")
    assert index.stalled.wait(60)
    second = locating("pip:some-data==1.0")
    assert "another process is making the download of pip:some-data==1.0" in second.stdout.readline()
    index.go_on.set()
    lines = [first.communicate(timeout=60)[0].splitlines()[-1], second.communicate(timeout=60)[0].splitlines()[-1]]
    assert json.loads(lines[0]) == json.loads(lines[1])
    assert "path" in json.loads(lines[0])
    assert len(index.gets(index.path)) == 1


def test_a_broken_index_does_not_hide_another(index, pip_environment):
    pip_environment.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    pip_environment.setenv("PIP_EXTRA_INDEX_URL", index.url + "/simple")
    assert locate("pip:some-data==1.0").is_dir()


def test_an_unreachable_index_is_named_without_its_password(pip_environment):
    pip_environment.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")
    with pytest.raises(SourceError) as caught:
        locate("pip:some-data==1.0")
    assert "tried http://127.0.0.1:9/simple: ConnectError" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_index_that_does_not_have_it(index):
    with pytest.raises(SourceError, match=r"tried http://127\.0\.0\.1:\d+/simple: Client Error\(404\)"):
        locate("pip:other-data==1.0")


def test_a_private_index_takes_the_password_of_its_url(index, pip_environment):
    pip_environment.setenv("PIP_INDEX_URL", index.url.replace("//", "//someone:secret@") + "/simple")
    assert locate("pip:some-data==1.0").is_dir()
    assert set(index.authorisations) == {"Basic " + base64.b64encode(b"someone:secret").decode()}
