"""A real server process: signals, draining, TLS, ports."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from tests.serve.tenants import write_adapter

from lorchestra.errors import UserError
from lorchestra.serve.lifecycle import check_tls, listen

ROOT = Path(__file__).parents[2]


@contextmanager
def server(place, grace=20.0, *tls):
    """``(process, port)`` of a server that answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.a_server", str(place), str(grace), *map(str, tls)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if line.startswith("port "):
                yield process, int(line.split()[1])
                break
        else:
            raise AssertionError(f"the server did not come up; it ended with {process.wait(10)}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


class Asking(threading.Thread):
    """A streamed request in a thread of its own; ``began`` is set at its first part."""

    def __init__(self, port, tokens):
        super().__init__()
        self.began, self.text, self.failed = threading.Event(), "", None
        self.port, self.tokens = port, tokens
        self.start()

    def run(self):
        body = {"model": "clinic", "prompt": "ab", "max_tokens": self.tokens, "stream": True}
        try:
            with httpx2.stream("POST", f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    self.began.set()
                    if line.startswith("data: {"):
                        self.text += "".join(c.get("text", "") for c in json.loads(line[6:]).get("choices", ()))
                    elif line == "data: [DONE]":
                        self.text += "."
        except httpx2.HTTPError as error:
            self.failed = error


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "clinic", 1)


@pytest.mark.slow
def test_sigterm_finishes_what_runs_takes_nothing_new_and_exits_0(adapter):
    with server(adapter) as (process, port):
        url = f"http://127.0.0.1:{port}"
        assert httpx2.get(f"{url}/ready").status_code == 200
        asking = Asking(port, 20)
        assert asking.began.wait(20)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert httpx2.get(f"{url}/ready").status_code == 503
        assert httpx2.get(f"{url}/health").status_code == 200
        refused = httpx2.post(f"{url}/v1/completions", json={"model": "clinic", "prompt": "x"})
        assert refused.status_code == 503
        asking.join(30)
        assert len(asking.text.split()) == 21, "20 tokens, and the end"
        assert process.wait(20) == 0
        lines = [json.loads(line) for line in process.stdout.read().splitlines()]
        assert [(line["status"], line["generated_tokens"]) for line in lines] == [(503, 0), (200, 20)]
        assert "ended SIGTERM cut 0" in process.stderr.read()


@pytest.mark.slow
def test_a_second_signal_does_not_wait_and_grace_has_an_end(adapter):
    with server(adapter, 60.0) as (process, port):
        asking = Asking(port, 400)
        assert asking.began.wait(20)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - began < 10
        assert "cut 1" in process.stderr.read()
        asking.join(10)
    with server(adapter, 0.5) as (process, port):
        asking = Asking(port, 400)
        assert asking.began.wait(20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "cut 1" in process.stderr.read()
        asking.join(10)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    place = tmp_path_factory.mktemp("tls")
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", place / "key.pem", "-out", place / "cert.pem"],
        capture_output=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"openssl makes no certificate here: {done.stderr.decode()}")
    return place / "cert.pem", place / "key.pem"


@pytest.mark.slow
def test_tls(adapter, certificate):
    with server(adapter, 5.0, *certificate) as (process, port):
        trusted = ssl.create_default_context(cafile=str(certificate[0]))
        assert httpx2.get(f"https://127.0.0.1:{port}/ready", verify=trusted).status_code == 200
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(f"http://127.0.0.1:{port}/ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_what_is_no_certificate_is_told_of(certificate, tmp_path):
    check_tls(*certificate)
    (tmp_path / "no.pem").write_text("nothing")
    for pair in (
        (tmp_path / "gone.pem", None),
        (tmp_path / "no.pem", None),
        (certificate[0], None),
        (certificate[0], certificate[0]),
        (certificate[0], tmp_path / "gone.pem"),
    ):
        with pytest.raises(UserError, match="TLS: "):
            check_tls(*pair)


def test_a_port_that_is_taken_is_told_of():
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match=r":\d+: [^:()]+; choose another --"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot listen"):
        listen("203.0.113.7", 0)
    if socket.has_ipv6:
        try:
            listen("::1", 0).close()
        except UserError as error:
            pytest.skip(f"no IPv6 loopback here: {error}")
