"""The grammar of sources."""

from __future__ import annotations

import pytest

from lorchestra.base.source import Source, parse_source
from lorchestra.errors import SourceError

SHA = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "kind", "name", "version", "inside"),
    [
        ("data/train.jsonl", "path", "data/train.jsonl", "", ""),
        ("./data/train.jsonl", "path", "./data/train.jsonl", "", ""),
        ("train.jsonl", "path", "train.jsonl", "", ""),
        ("/somewhere/a base", "path", "/somewhere/a base", "", ""),
        ("~/models/base", "path", "~/models/base", "", ""),
        ("C:\\models\\base", "path", "C:\\models\\base", "", ""),
        ("a/b/c", "path", "a/b/c", "", ""),
        ("医学/数据", "path", "医学/数据", "", ""),
        ("org/name", "hf", "org/name", "", ""),
        ("org/name@v1.0", "hf", "org/name", "v1.0", ""),
        ("hf:org/name", "hf", "org/name", "", ""),
        ("hf:org/name@main", "hf", "org/name", "main", ""),
        ("hf:org/na.me-2@refs", "hf", "org/na.me-2", "refs", ""),
        ("hf:org/name/sub/file.jsonl", "hf", "org/name", "", "sub/file.jsonl"),
        ("hf:org/name@main/sub/file.jsonl", "hf", "org/name", "main", "sub/file.jsonl"),
        ("pip:some-data==1.2.3", "pip", "some-data", "1.2.3", ""),
        ("pip:some_data==1.0.post1+cpu/a b/c.jsonl", "pip", "some_data", "1.0.post1+cpu", "a b/c.jsonl"),
    ],
)
def test_forms(text, kind, name, version, inside):
    assert parse_source(text) == Source(kind, text, name, version, inside)
    assert parse_source(f"{text}#sha256={SHA.upper()}") == Source(kind, text, name, version, inside, SHA)


def test_what_exists_here_is_a_path():
    assert parse_source("org/name", is_path=True).kind == "path"
    assert parse_source("hf:org/name", is_path=True).kind == "hf", "hf: says so"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("#sha256=" + SHA, "empty"),
        ("hf:", "hf:org/name"),
        ("hf:name", "hf:org/name"),
        ("hf:org/name@", "hf:org/name"),
        ("hf:org/name/../../etc", "climb"),
        ("hf:org/name//etc", "climb"),
        ("pip:name", "pip:distribution==version"),
        ("pip:name>=1", "pip:distribution==version"),
        ("pip:name==1.0/../x", "climb"),
        ("pip:name==1.0//x", "climb"),
        ("pip:-rrequirements.txt==1", "pip:distribution==version"),
        ("https://example.org/model", "unknown kind"),
        ("s3://bucket/model", "unknown kind"),
        ("git+https://example.org/x", "unknown kind"),
    ],
)
def test_bad_forms(text, says):
    with pytest.raises(SourceError, match=says):
        parse_source(text)
