"""Files that cannot be read, as they come: links to nowhere, directories, half a file, a disk that fails."""

from __future__ import annotations

import errno
import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest

from lorchestra.base.fingerprint import config_digest, fingerprint
from lorchestra.base.load import load_base, load_tokenizer, prepare_base
from lorchestra.base.locate import content_sha256, file_sha256, locate
from lorchestra.base.reading import read_json, reading
from lorchestra.data.load import DataSpec, load_examples
from lorchestra.errors import DataError, LorchestraError, SourceError

FAILING = Path("/proc/self/mem")  # reading its first byte is an input/output error, for root too
ADVICE = r"fetch|copy|mend|expected|cannot be loaded|Check its permissions|check the path|is damaged|write another path"


def nowhere(path):
    path.unlink()
    path.symlink_to(path.with_name("gone") / path.name)


def directory(path):
    path.unlink()
    path.mkdir()


def half(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def failing(path):
    path.unlink()
    path.symlink_to(FAILING)


def latin(path):
    path.write_bytes("température".encode("latin-1"))


HARMS = [nowhere, directory, half, latin]
if FAILING.exists():
    HARMS.append(failing)


@pytest.fixture
def base(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_base_that_cannot_be_read(base, name, harm):
    harm(base / name)

    def use():
        found = prepare_base(str(base))
        fingerprint(found)
        config_digest(found)
        load_tokenizer(found)
        load_base(found, device="cpu", dtype="float32")

    with pytest.raises(LorchestraError, match=f"(?s){base}.*({ADVICE})|has no config.json|holds no"):
        use()


def test_a_chat_template_that_is_not_utf_8(base):
    latin(base / "chat_template.jinja")
    with pytest.raises(SourceError, match=r"chat_template\.jinja is damaged: 'utf-8' codec.*fetch or copy it again"):
        fingerprint(base)


ROWS = "".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(50))


def parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"] * 500, "completion": ["b"] * 500}), path)


MAKE = {
    "x.jsonl": lambda path: path.write_text(ROWS),
    "x.json": lambda path: path.write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 9)),
    "x.csv": lambda path: path.write_text("prompt,completion\n" + 'a,"b, c"\n' * 9 + 'd,"e'),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(ROWS.encode())),
    "x.parquet": parquet,
}


@pytest.mark.parametrize("harm", [harm for harm in HARMS if harm is not latin])
@pytest.mark.parametrize("name", MAKE)
def test_data_that_cannot_be_read(tmp_path, name, harm):
    MAKE[name](tmp_path / name)
    harm(tmp_path / name)
    with pytest.raises(LorchestraError) as caught:
        load_examples(DataSpec(str(tmp_path / name)), "sft")
    assert isinstance(caught.value, SourceError | DataError)
    assert "x." in str(caught.value)


def test_a_link_is_read_as_what_it_is_called(tmp_path):
    """Stores of large files keep them under a digest, without a suffix."""
    (tmp_path / "0f3a").write_text(ROWS)
    (tmp_path / "x.jsonl").symlink_to("0f3a")
    assert len(load_examples(DataSpec("x.jsonl"), "sft", relative_to=tmp_path).examples) == 50


def test_a_link_to_nowhere_is_called_one(tmp_path):
    (tmp_path / "x.jsonl").symlink_to("../gone.jsonl")
    with pytest.raises(SourceError, match=r"'x\.jsonl': it is a link to \.\./gone\.jsonl, which is not there; mend"):
        locate("x.jsonl", relative_to=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_digests_of_what_the_disk_refuses(tmp_path):
    for digest, path in ((file_sha256, FAILING), (content_sha256, tmp_path)):
        (tmp_path / "x").unlink(missing_ok=True)
        (tmp_path / "x").symlink_to(FAILING)
        with pytest.raises(SourceError, match=r"Input/output error\. Check its permissions; if they"):
            digest(path)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EACCES, "Permission denied. Check its permissions"), (errno.EIO, "Input/output error. Check"),
     (errno.ENAMETOOLONG, "File name too long"), (errno.ELOOP, "symbolic links")],
)  # fmt: skip
def test_every_refusal_of_the_system_has_advice(number, message):
    import os

    with pytest.raises(SourceError) as caught, reading(Path("notes.csv")):
        raise OSError(number, os.strerror(number), "inner.csv")
    assert str(caught.value).startswith("cannot read inner.csv: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged: Expecting property name.*fetch or copy"), ("[1]", "should hold a JSON object; it holds list")],
)
def test_json_that_is_none(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_json(tmp_path / "x.json")
