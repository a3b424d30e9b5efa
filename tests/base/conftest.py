"""A loopback web server for sources: serves bytes with ranges, and remembers what was asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Served:
    """``files``: path → bytes; ``pages``: path → (content type, text); ``stall_after`` bytes of a file: silence."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, tuple[str, str]] = {}
        self.headers: dict[str, str] = {}
        self.missing: dict[str, str] = {}  # path → the hub's code for why it is not there
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.authorisations: list[str] = []
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.go_on = threading.Event()
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self._answer(body=False)

            def do_GET(self):
                self._answer(body=True)

            def _answer(self, body):
                path = self.path.partition("?")[0]
                asked = self.headers.get("Range", "")
                served.asked.append((self.command, path, asked))
                served.authorisations.append(self.headers.get("Authorization", ""))
                if path in served.pages:
                    kind, text = served.pages[path]
                    self._send(200, text.encode(), {"Content-Type": kind, **served.headers}, body)
                elif path in served.files:
                    self._file(served.files[path], asked, body)
                else:
                    self._send(404, b"", {"X-Error-Code": served.missing.get(path, "RepoNotFound")}, body)

            def _file(self, data, asked, body):
                extra = {"ETag": f'"{hash(data) & 0xFFFFFFFF:x}"', "Accept-Ranges": "bytes", **served.headers}
                found = re.fullmatch(r"bytes=(\d+)-", asked)
                if not found:
                    self._send(200, data, extra, body)
                elif (start := int(found[1])) >= len(data):
                    self._send(416, b"", extra | {"Content-Range": f"bytes */{len(data)}"}, body)
                else:
                    extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    self._send(206, data[start:], extra, body)

            def _send(self, status, data, headers, body):
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if not body:
                    return
                stall = served.stall_after if status in (200, 206) and "ETag" in headers else None
                try:
                    self.wfile.write(data[:stall])
                    if stall is not None and stall < len(data):
                        self.wfile.flush()
                        served.stalled.set()
                        served.go_on.wait(60)
                        self.wfile.write(data[stall:])
                except OSError:
                    self.close_connection = True  # the other side was killed

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def gets(self, path: str) -> list[str]:
        """Ranges of the GET requests for ``path``."""
        return [asked for method, where, asked in self.asked if method == "GET" and where == path]


@pytest.fixture
def served():
    found = Served()
    yield found
    found.go_on.set()
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def pip_environment(monkeypatch):
    """No configuration of pip but what the test sets."""
    for key in [k for k in os.environ if k.startswith("PIP_") or k.endswith("_CA_BUNDLE")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return monkeypatch


LOCATE = """
import json, os, sys
if limit := int(os.environ.get("TEST_FILE_SIZE", 0)):  # root may write anywhere, but not beyond this
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
from lorchestra.base.locate import locate
from lorchestra.errors import LorchestraError

class Reporter:
    def task(self, name, total=None, unit="it"):
        from contextlib import contextmanager
        @contextmanager
        def opened():
            done = []
            class Task:
                def advance(self, amount=1.0, **figures):
                    done.append(amount)
            yield Task()
            print(json.dumps({"task": name, "total": total, "unit": unit, "done": sum(done)}))
        return opened()
    def event(self, kind, /, **fields): pass
    def say(self, text): print(json.dumps({"said": text}), flush=True)

try:
    path = locate(sys.argv[1], reporter=Reporter(), repo_type=sys.argv[2])
    print(json.dumps({"path": str(path)}))
except LorchestraError as error:
    print(json.dumps({"error": type(error).__name__, "code": error.exit_code, "text": str(error)}))
"""


@pytest.fixture
def locating():
    """Start ``locate`` in a process of its own (huggingface_hub reads its environment when it is imported)."""
    started = []

    def start(source: str, repo_type: str = "model", **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", LOCATE, source, repo_type],
            stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def located(locating):
    """Run ``locate`` in a process of its own; everything it said, as one dictionary a kind."""
    import json

    def run(*args, **environment) -> dict:
        lines = [json.loads(line) for line in locating(*args, **environment).communicate(timeout=60)[0].splitlines()]
        found = {key: value for line in lines for key, value in line.items() if "task" not in line}
        return found | {"tasks": [line for line in lines if "task" in line]}

    return run


@pytest.fixture
def links(tmp_path, pip_environment):
    """A find-links directory, and nothing else."""
    directory = tmp_path / "links"
    directory.mkdir()
    pip_environment.setenv("PIP_FIND_LINKS", str(directory))
    pip_environment.setenv("PIP_NO_INDEX", "1")
    return directory
