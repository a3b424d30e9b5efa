"""One URL names database and blobs: where they are found, and that no password is ever shown."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from lorchestra.errors import UserError
from lorchestra.registry.location import Location, local_path, masked

PASSWORD = "Geheim9"


@pytest.mark.parametrize("url", ["/srv/adapters", "/srv/adapters/", "file:///srv/adapters", "file://localhost/srv/adapters",
                                 "file:/srv/adapters", "/srv/x/../adapters", "FILE:///srv/adapters"])  # fmt: skip
def test_a_directory(url):
    location = Location.parse(url)
    assert location == Location("sqlite:////srv/adapters/catalog.db", "/srv/adapters/blobs", "/srv/adapters")
    assert str(location) == "/srv/adapters"


def test_a_path_from_here_and_from_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert Location.parse("reg").blobs == str(tmp_path / "reg" / "blobs")
    assert Location.parse("~/reg").blobs == str(tmp_path / "me" / "reg" / "blobs")
    there = Location.parse("sqlite:///reg/other.db")
    assert make_url(there.database).database == str(tmp_path / "reg" / "other.db")
    assert there.blobs == str(tmp_path / "reg" / "blobs")
    assert Location.parse("sqlite:///reg/c.db?blobs=b").blobs == str(tmp_path / "b")


@given(st.text(st.characters(exclude_characters="/\0\r\n", exclude_categories=["Cs"]), min_size=1, max_size=20))
@example("a b%20c#d?e&f=g")
@example("a:b")
def test_any_directory_is_found_as_it_is_called(name):
    if name in (".", ".."):
        return
    for url in (f"/srv/{name}", f"file:///srv/{quote(name)}"):
        location = Location.parse(url)
        assert make_url(location.database).database == f"/srv/{name}/catalog.db"
        assert location.blobs == f"/srv/{name}/blobs"
        assert local_path(location.blobs) == Path(location.blobs)


def test_sqlite_opens_what_the_url_names(tmp_path):
    directory = tmp_path / "a b%20#?ü"
    directory.mkdir()
    engine = create_engine(Location.parse(str(directory)).database)
    with engine.begin() as connection:
        connection.execute(text("create table t (x)"))
    engine.dispose()
    assert os.listdir(directory) == ["catalog.db"]


def test_sqlite_with_blobs_elsewhere():
    location = Location.parse("sqlite:////srv/a/catalog.db?blobs=s3://bucket/pre%26fix")
    assert location.database == "sqlite:////srv/a/catalog.db"
    assert location.blobs == "s3://bucket/pre&fix"
    assert location.shown == "sqlite:////srv/a/catalog.db?blobs=s3://bucket/pre&fix"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_postgresql(scheme):
    location = Location.parse(
        f"{scheme}://me:{PASSWORD}@db.local:5433/adapters?sslmode=require&blobs=s3://b/p&x=%2Ftmp"
    )
    url = make_url(location.database)
    assert (url.drivername, url.username, url.password) == ("postgresql+psycopg", "me", PASSWORD)
    assert (url.host, url.port, url.database) == ("db.local", 5433, "adapters")
    assert dict(url.query) == {"sslmode": "require", "x": "/tmp"}
    assert location.blobs == "s3://b/p"
    assert location.shown == "postgresql://me:***@db.local:5433/adapters?sslmode=require&x=%2Ftmp&blobs=s3://b/p"


def test_postgresql_on_a_socket_with_a_directory_of_blobs():
    location = Location.parse("postgresql:///adapters?host=/run/postgresql&blobs=/srv/blobs")
    url = make_url(location.database)
    assert (url.host, url.database, url.query["host"]) == (None, "adapters", "/run/postgresql")
    assert location.blobs == "/srv/blobs"


@given(st.text(min_size=1, max_size=20).map(lambda text: "Pa" + text + "55"))
def test_a_quoted_password_arrives_and_is_never_shown(password):
    try:
        quoted = quote(password, safe="")
    except UnicodeEncodeError:
        return
    for part in (f"postgresql://u:{quoted}@h/d?blobs=/b", f"postgresql://h/d?password={quoted}&blobs=/b"):
        location = Location.parse(part)
        url = make_url(location.database)
        assert password in (url.password, url.query.get("password"))
        for shown in (location.shown, str(location), repr(location), f"{location}"):
            assert quoted not in shown
            assert "***" in shown
    blobs = Location.parse(f"postgresql://h/d?blobs={quote(f'sftp://u:{quoted}@h/b', safe='')}")
    assert quoted in blobs.blobs
    assert quoted not in repr(blobs)


@pytest.mark.parametrize("end", ["", "?blobs=/b", "/d", "/d?blobs=/b", ":5x/d?blobs=/b"])
@pytest.mark.parametrize("letter", [*list("/@:#?& %"), "[", "::"])
@pytest.mark.parametrize("start", ["postgresql", "sqlite", "mysql", "s3", "http", "postgresql+asyncpg"])
def test_an_unquoted_password_is_not_shown_either(start, letter, end):
    url = f"{start}://u:{PASSWORD}{letter}{PASSWORD}@host{end}"
    try:
        shown = repr(Location.parse(url))
    except UserError as error:
        shown = str(error)
    assert PASSWORD not in shown


@pytest.mark.parametrize("letter", list("/@:#? "))
def test_an_unquoted_password_of_the_blobs_is_not_shown_either(letter):
    url = f"sqlite:////c.db?blobs=sftp://u:{PASSWORD}{letter}{PASSWORD}@host/b"
    try:
        shown = repr(Location.parse(url))
    except UserError as error:
        shown = str(error)
    assert PASSWORD not in shown


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "it is empty"),
        ("/srv/a\0b", "line break or NUL"),
        ("s3://bucket/prefix", "s3 can keep blobs, not the catalog"),
        ("https://hub/x", "https can keep blobs"),
        ("postgress://h/d", "did you mean postgres"),
        ("sqlit:///d/c.db", "did you mean sqlite"),
        ("mysql://h/d", "'mysql' is no kind of registry"),
        ("postgresql+asyncpg://h/d?blobs=/b", "write postgresql://"),
        ("postgresql://h/d", "does not say where the blobs are"),
        ("postgresql://h?blobs=/b", "names no database"),
        ("postgresql:h/d?blobs=/b", "names no database"),
        ("postgresql://h:port/d?blobs=/b", "host or port cannot be read"),
        ("postgresql://h/d?blobs=", "nothing follows blobs="),
        ("postgresql://h/d?blobs=/a&blobs=/b", "twice"),
        ("postgresql://h/d?blobs=sqlite:///x.db", "names no store of files"),
        ("postgresql://h/d?blobs=simplecache::s3://b", "names no store of files"),
        ("sqlite://", "needs a file"),
        ("sqlite:///", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:////srv/a/", "needs a file"),
        ("sqlite:////c.db?mode=ro", "no parameter but blobs=, not 'mode'"),
        ("/srv/a?blobs=s3://b", "blobs= goes with a database"),
    ],
)
def test_what_names_no_registry_is_answered_with_examples(url, says):
    with pytest.raises(UserError) as caught:
        Location.parse(url)
    assert says in str(caught.value)
    assert "postgresql://user:password@host/db?blobs=s3://bucket/prefix" in str(caught.value)


@pytest.mark.parametrize("url", ["file://machine/srv/a", "file://machine"])
def test_another_machines_directory_is_none(url):
    with pytest.raises(UserError, match="taken for a machine"):
        Location.parse(url)


def test_what_is_masked():
    assert masked("sftp://u:p@h/x?token=abc&x=1") == "sftp://u:***@h/x?token=***&x=1"
    assert masked("sftp://u:p@ss@h/x") == "sftp://u:***@h/x"
    assert masked("sftp://u@h/x") == "sftp://u@h/x"
    assert masked("/srv/a@b:c") == "/srv/a@b:c"
