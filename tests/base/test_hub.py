"""``hf:`` sources, from a hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lorchestra.base.load import load_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Speaks as much of the hub's API as huggingface_hub asks for; ``served`` remembers the requests."""

    def __init__(self, served) -> None:
        self.served = served
        served.headers = {"X-Repo-Commit": COMMIT}
        # huggingface_hub is told of the endpoint by its environment, so every fetch runs in a process of its own.
        self.environment = {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def publish(self, name: str, files: dict[str, bytes], kind: str = "model", revisions=("main", "v1")) -> None:
        prefix = "" if kind == "model" else "datasets/"
        listing = [
            {"type": "file", "path": path, "size": len(data), "oid": f"{i:040x}"}
            for i, (path, data) in enumerate(files.items())
        ]
        info = {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": path} for path in files]}  # fmt: skip
        answer = ("application/json", json.dumps(info))
        self.served.pages[f"/api/{kind}s/{name}"] = answer
        for revision in (*revisions, COMMIT):
            self.served.pages[f"/api/{kind}s/{name}/revision/{revision}"] = answer
            self.served.pages[f"/api/{kind}s/{name}/tree/{revision}"] = ("application/json", json.dumps(listing))
            for path, data in files.items():
                self.served.files[f"/{prefix}{name}/resolve/{revision}/{path}"] = data

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were sent."""
        return {p.split(f"/resolve/{COMMIT}/")[1] for m, p, _ in self.served.asked if m == "GET" and "/resolve/" in p}


@pytest.fixture
def hub(served):
    return Hub(served)


@pytest.fixture
def model_files(tiny_dir):
    return {path.name: path.read_bytes() for path in tiny_dir.iterdir()}


@pytest.mark.parametrize("source", ["org/tiny", "hf:org/tiny@v1"])
def test_a_model_is_fetched_once_and_loads(hub, model_files, located, tiny_dir, source):
    more = {"pytorch_model.bin": b"pickle", "weights.pt": b"pickle", "onnx/model.onnx": b"", "README.md": b"hello",
            "consolidated.safetensors": b"the same once more", "tiny-q4.gguf": b"another form"}  # fmt: skip
    hub.publish("org/tiny", model_files | more)
    found = located(source, **hub.environment)
    assert hub.fetched() == {*model_files, "README.md"}, "no pickles, nothing twice"
    size = sum(map(len, model_files.values())) + len(b"hello")
    assert found["tasks"] == [{"task": f"fetch {source}", "total": size, "unit": "B", "done": size}]
    fetched, original = load_base(Path(found["path"])), load_base(tiny_dir)
    assert fetched.id.weights == original.id.weights
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(fetched.model(ids).logits, original.model(ids).logits, rtol=0, atol=0)
    before = len(hub.served.asked)
    again = located(source, **hub.environment)
    assert again["path"] == found["path"]
    assert again["tasks"] == []
    assert {method for method, path, _ in hub.served.asked[before:] if "/resolve/" in path} <= {"HEAD"}
    hub.served.server.shutdown()
    hub.served.server.server_close()
    assert located(source, **hub.environment)["path"] == found["path"], "the hub is gone and not needed"
    assert located(source, HF_HUB_OFFLINE="1")["path"] == found["path"]


def test_a_data_set(hub, located):
    rows = b'{"prompt": "a", "completion": "b"}\n'
    hub.publish("org/data", {"train.jsonl": rows, "old.pkl": b"pickle", "loader.py": b"code"}, kind="dataset")
    found = located("hf:org/data", "dataset", **hub.environment)
    assert "path" in found
    assert hub.fetched() == {"train.jsonl"}
    one = located("hf:org/data/train.jsonl", "dataset", **hub.environment)
    assert Path(one["path"]).read_bytes() == rows


def test_one_file_of_a_model_with_a_pin(hub, located):
    data = b"GGUF and more"
    hub.publish("org/tiny", {"tiny-q4.gguf": data, "tiny-q8.gguf": b"other"})
    pin = hashlib.sha256(data).hexdigest()
    assert located(f"hf:org/tiny@v1/tiny-q4.gguf#sha256={pin}", **hub.environment)["path"].endswith("tiny-q4.gguf")
    assert hub.fetched() == {"tiny-q4.gguf"}
    wrong = located(f"hf:org/tiny/tiny-q4.gguf#sha256={'0' * 64}", **hub.environment)
    assert (wrong["error"], wrong["code"]) == ("SourceError", 2)
    assert f"sha256 is {pin}" in wrong["text"]
    missing = located("hf:org/tiny/tiny-q5.gguf", **hub.environment)
    assert "the repository has no 'tiny-q5.gguf'; nearest: " in missing["text"]


def test_a_killed_download_goes_on(hub, locating, located, tmp_path):
    weights = bytes(range(256)) * 80_000  # 20 MB
    hub.publish("org/big", {"config.json": b"{}", "model.safetensors": weights})
    hub.served.stall_after = 15_000_000
    first = locating("org/big", **hub.environment)
    assert hub.served.stalled.wait(60)
    blobs = tmp_path / "home" / "hub" / "models--org--big" / "blobs"
    pause = threading.Event()
    while not any(p.stat().st_size >= 10_000_000 for p in blobs.glob("*.part")):
        assert not pause.wait(0.02)
    first.kill()
    first.wait()
    (part,) = blobs.glob("*.part")
    start = part.stat().st_size
    hub.served.stall_after = None
    hub.served.go_on.set()
    found = located("org/big", **hub.environment)
    assert hub.served.gets(f"/org/big/resolve/{COMMIT}/model.safetensors") == ["", f"bytes={start}-"]
    assert Path(found["path"], "model.safetensors").read_bytes() == weights
    assert found["tasks"][0]["done"] == found["tasks"][0]["total"] == len(weights) + 2


@pytest.mark.slow
def test_large_files_are_checked_against_their_digest(hub, located):
    weights = bytes(range(256)) * 80_000
    hub.publish("org/big", {"model.safetensors": weights})
    hub.served.headers["X-Linked-Etag"] = f'"{"0" * 64}"'
    found = located("org/big", **hub.environment)
    assert found["code"] == 2
    assert f"damaged on its way: sha256 is {hashlib.sha256(weights).hexdigest()}" in found["text"]
    hub.served.headers["X-Linked-Etag"] = f'"{hashlib.sha256(weights).hexdigest()}"'
    assert "path" in located("org/big", **hub.environment)


@pytest.mark.slow
def test_two_processes_fetch_once(hub, locating):
    hub.publish("org/big", {"model.safetensors": bytes(range(256)) * 80_000})
    hub.served.stall_after = 15_000_000
    first = locating("org/big", **hub.environment)
    assert hub.served.stalled.wait(60)
    second = locating("org/big", **hub.environment)
    assert "another process is making the download of org/big" in second.stdout.readline()
    hub.served.go_on.set()
    ends = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in (first, second)]
    assert ends[0] == ends[1]
    assert "path" in ends[0]
    assert len(hub.served.gets(f"/org/big/resolve/{COMMIT}/model.safetensors")) == 1


def test_an_unreachable_hub_says_what_was_tried_and_the_ways_out(located):
    found = located("hf:org/tiny", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert (found["error"], found["code"]) == ("SourceError", 2)
    assert "'hf:org/tiny' could not be fetched from http://127.0.0.1:9: " in found["text"]
    for way in ("HF_ENDPOINT=", "HF_TOKEN", "copy the directory here and write its path"):
        assert way in found["text"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:org/nothing", "there is no repository 'org/nothing'"),
        ("hf:org/tiny@v9", "the repository has no revision 'v9'"),
        ("hf:-org/--tiny", "Repo id must"),
    ],
)
def test_what_the_hub_does_not_have(hub, located, source, says):
    hub.publish("org/tiny", {"config.json": b"{}"})
    hub.served.missing["/api/models/org/tiny/revision/v9"] = "RevisionNotFound"
    found = located(source, **hub.environment)
    assert (found["error"], found["code"]) == ("SourceError", 2)
    assert says in found["text"]


def test_offline_before_it_was_ever_fetched(located):
    found = located("hf:org/tiny", HF_HUB_OFFLINE="1")
    assert found["code"] == 2
    assert "HF_HUB_OFFLINE is set" in found["text"]


@pytest.mark.slow
def test_the_command_line_says_it_in_words_and_exits_2(tmp_path):
    rows = [json.dumps({"prompt": f"question {i}?", "completion": f"answer {i}."}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipe.yaml").write_text("name: x\nbase: org/tiny\nstages:\n  - {name: one, data: rows.jsonl}\n")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lorchestra", "run", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "could not be fetched from http://127.0.0.1:9" in " ".join(done.stderr.split())
    assert "HF_ENDPOINT=" in done.stderr
    assert "Traceback" not in done.stderr
