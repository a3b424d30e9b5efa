"""A line a request, and what must never be in it."""

from __future__ import annotations

import contextlib
import io
import json

from lorchestra.serve.request_log import RequestLog


def test_every_line_is_json_whatever_is_in_it():
    out = io.StringIO()
    log = RequestLog(out)
    log.write({"id": "a\nb", "model": "\u2028\x00\ud800 é"})
    log.write({"id": "c"})
    lines = out.getvalue().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a\nb", "c"]
    assert all("time" in json.loads(line) for line in lines)


def test_a_file_is_added_to(tmp_path):
    for i in range(2):
        RequestLog.to(str(tmp_path / "logs" / "r.jsonl")).write({"id": i})
    assert len((tmp_path / "logs" / "r.jsonl").read_text().splitlines()) == 2


def test_nowhere_is_nowhere(capsys):
    RequestLog.to("").write({"id": 1})
    assert capsys.readouterr().out == ""
    RequestLog.to("-").write({"id": 1})
    assert '"id": 1' in capsys.readouterr().out


def test_a_place_that_takes_no_more_stops_the_log_and_not_the_server(caplog):
    with contextlib.suppress(OSError), open("/dev/full", "w") as out:  # closing it fails too
        log = RequestLog(out)
        log.write({"id": 1})
        log.write({"id": 2})
    assert caplog.text.count("cannot be written any more") == 1
