"""To a hub and back: one on the loopback interface, which speaks what huggingface_hub asks for. The real hub's own
checks (who may write where, its scan of pickles, Xet) were not run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from tests.base.conftest import Served
from tests.base.test_hub import COMMIT, Hub
from tests.registry.conftest import Zygote

from lorchestra.adapter.adapter import Adapter
from lorchestra.errors import UserError
from lorchestra.registry.manifest import Manifest, Metric
from lorchestra.registry.mistakes import RevokedError
from lorchestra.registry.registry import Registry
from lorchestra.registry.transport.hub import CARD, MANIFEST, card, pull, push

TOKEN = "hf_" + "secret" * 5


class WritableHub(Hub):
    """Takes commits too, small files in them and large ones by Git LFS; what was committed can be fetched."""

    def __init__(self, served: Served) -> None:
        super().__init__(served)
        self.environment |= {"HF_TOKEN": TOKEN}
        self.created: list[dict] = []
        self.branches: list[str] = []
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.forbidden = False
        hub = self

        class Handler(served.server.RequestHandlerClass):
            def do_POST(self):
                hub.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def do_PUT(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                hub.large[hashlib.sha256(data).hexdigest()] = data
                self._send(200, b"", {}, True)

        served.server.RequestHandlerClass = Handler

    def answer(self, request, body: bytes) -> None:
        path = request.path.partition("?")[0]
        told = {}
        if self.forbidden:
            request._send(403, b'{"error": "you may not"}', {"Content-Type": "application/json"}, True)
            return
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            told = {"url": f"{self.served.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            told = {
                "files": [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in files
                ]
            }  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{self.served.url}/large"}}
            told = {"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"], "actions": upload} for o in json.loads(body)["objects"]
            ]}  # fmt: skip
        elif "/commit/" in path:
            name, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            self.branches.append(branch)
            self.commit(name, [json.loads(line) for line in body.splitlines()])
            told = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.served.url}/{name}/commit/{COMMIT}"}
        request._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"}, True)

    def commit(self, name: str, lines: list[dict]) -> None:
        files = self.repositories.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        self.publish(name, files)


@pytest.fixture
def hub():
    served = Served()
    yield WritableHub(served)
    served.go_on.set()
    served.server.shutdown()
    served.server.server_close()


SCRIPT = """
import json, os, sys
import lorchestra.registry.store.contents, lorchestra.registry.registry
import lorchestra.adapter.peft_format, safetensors.torch
from lorchestra.cli import main
assert "huggingface_hub" not in sys.modules
def run(line):
    told = json.loads(line)
    out = os.open(told["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(told["environment"])
    sys.argv = ["lorchestra", "registry", *told["argv"]]
    try:
        main()
    except SystemExit as ended:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(int(ended.code or 0))
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    script = tmp_path_factory.mktemp("forks") / "script.py"
    script.write_text(SCRIPT)
    zygote = Zygote(script, sys.executable)
    yield zygote
    zygote.stop()


@pytest.fixture
def lorchestra(forks, tmp_path):
    """The command in a process of its own: huggingface_hub reads its environment when it is imported."""

    def run(*argv: object, code: int = 0, **environment: str) -> str:
        environment = {"LORCHESTRA_HOME": str(tmp_path / "home"), **environment}
        out = tmp_path / "said"
        forks.child(json.dumps({"argv": list(map(str, argv)), "environment": environment, "out": str(out)}))
        ended = os.waitstatus_to_exitcode(forks.ended())
        said = out.read_text(encoding="utf-8")
        assert ended == code, said
        assert TOKEN not in said
        assert "Traceback" not in said
        return said

    return run


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_there_and_back(hub, local, make, lorchestra, tmp_path):
    loss = Metric(value=1.2, low=1.1, high=1.3, n=40, split="sealed", sealed="sha256:" + "e" * 64)
    source = make(1)
    pushed = local.push(source, "clinic", note="for the clinic", tags=["sft"], metrics={"loss": loss}).manifest
    here, there = tmp_path / "registry", tmp_path / "there"
    said = lorchestra("hub", "push", "clinic", "acme/clinic-lora", "--private", "--registry", here, **hub.environment)
    assert said.strip() == f"{hub.served.url}/acme/clinic-lora/commit/{COMMIT}"
    assert (hub.created[0]["name"], hub.branches) == ("clinic-lora", ["main"])
    assert hub.created[0].get("private") or hub.created[0]["visibility"] == "private", "by the client's version"
    uploaded = hub.repositories["acme/clinic-lora"]
    assert set(uploaded) == {*files(source), MANIFEST, CARD}
    assert {name: uploaded[name] for name in files(source)} == files(source), "bit-identical"
    assert Manifest.parse(uploaded[MANIFEST]) == pushed
    assert hashlib.sha256(files(source)["adapter_model.safetensors"]).hexdigest() in hub.large, "by LFS"

    Registry.open(str(there), create=True).close()
    said = lorchestra("hub", "pull", "acme/clinic-lora@v1", "ward", "--registry", there, **hub.environment)
    assert "ward@v1" in said
    with Registry.open(str(there)) as registry:
        found = registry.resolve("ward").manifest
        assert (found.digest, found.content) == (pushed.digest, pushed.content)
        assert (found.note, found.tags, found.metrics) == (pushed.note, pushed.tags, pushed.metrics)
        assert registry.history()[0].why == f"from hf:acme/clinic-lora@v1 at {COMMIT}"
        assert registry.verify() == []


def test_anybodys_adapter_without_its_leftovers(hub, local, make, lorchestra, tmp_path):
    source = make(1)
    (source / "lorchestra.json").unlink()
    more = {"optimizer.pt": b"pickle", "training_args.bin": b"pickle", "README.md": b"hello",
            "trainer_state.json": b"{}", "eval/results.json": b"{}", ".gitattributes": b"x"}  # fmt: skip
    hub.publish("org/foreign", files(source) | more)
    lorchestra("hub", "pull", "org/foreign", "foreign", "--registry", tmp_path / "registry", **hub.environment)
    version = local.resolve("foreign")
    assert set(version.manifest.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert not {"optimizer.pt", "training_args.bin"} & hub.fetched(), "never even fetched"
    local.pull("foreign", tmp_path / "out")
    assert Adapter.load(tmp_path / "out").digest == version.manifest.digest


def test_what_is_not_taken(hub, local, make, lorchestra, tmp_path):
    good = files(make(1))
    where = ("--registry", tmp_path / "registry")
    hub.publish("org/pickled", {"adapter_config.json": good["adapter_config.json"], "adapter_model.bin": b"pickle"})
    said = lorchestra("hub", "pull", "org/pickled", "a", *where, code=2, **hub.environment)
    assert "has no adapter_model.safetensors. Pickled weights (adapter_model.bin) are not fetched" in said
    hub.publish("org/model", {"config.json": b"{}", "model.safetensors": b"gigabytes"})
    said = lorchestra("hub", "pull", "org/model", "a", *where, code=2, **hub.environment)
    assert "holds no adapter_config.json, so it is no PEFT adapter" in said
    assert not any("model.safetensors" in path for _, path, _ in hub.served.asked)
    said = lorchestra("hub", "pull", "org/nothing", "a", *where, code=2, **hub.environment)
    assert "there is no repository 'org/nothing'" in said
    hub.publish("org/broken", {**good, "adapter_model.safetensors": b"x" * 100})
    lorchestra("hub", "pull", "org/broken", "a", *where, code=2, **hub.environment)
    assert local.names() == []


@pytest.mark.parametrize("name", ["clinic", "../etc", "a/b/c", "-org/x", "/abs", "a/b@c/d", ""])
def test_what_is_no_repository(local, make, name):
    local.push(make(1), "clinic")
    with pytest.raises(UserError, match="is no repository of the hub"):
        push(local, "clinic", name)
    if "@" not in name:
        with pytest.raises(UserError, match="is no repository of the hub"):
            pull(local, name, "a")


def test_weights_that_were_changed_after_they_were_pushed(hub, local, make, lorchestra, tmp_path):
    version = local.push(make(1), "clinic")
    changed = {**files(make(2)), MANIFEST: version.manifest.canonical()}
    hub.publish("org/changed", changed)
    where = ("--registry", tmp_path / "registry")
    said = lorchestra("hub", "pull", "org/changed", "a", *where, code=1, **hub.environment)
    assert f"is not what its {MANIFEST} says" in said
    hub.publish("org/none", {**files(make(2)), MANIFEST: b"{}"})
    said = lorchestra("hub", "pull", "org/none", "a", *where, code=2, **hub.environment)
    assert f"its {MANIFEST} is damaged: this is no manifest of format 1" in said
    assert local.names() == ["clinic"]


def test_a_push_that_cannot_be(hub, local, make, lorchestra, tmp_path):
    local.push(make(1), "clinic")
    command = ("hub", "push", "clinic", "acme/x", "--registry", tmp_path / "registry")
    hub.forbidden = True
    said = lorchestra(*command, code=1, **hub.environment)
    assert "clinic@v1 could not be pushed to acme/x" in said
    assert "set HF_TOKEN to a token that may write there" in said
    nowhere = hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "http://127.0.0.1:9 cannot be reached" in lorchestra(*command, code=1, **nowhere)
    assert "HF_HUB_OFFLINE is set" in lorchestra(*command, code=1, **(hub.environment | {"HF_HUB_OFFLINE": "1"}))
    local.revoke("clinic@v1", "wrong")
    with pytest.raises(RevokedError):
        push(local, "clinic@v1", "acme/x")
    assert hub.repositories == {}


def test_a_readme_of_its_own_stays(hub, local, make, lorchestra, tmp_path):
    source = make(1)
    (source / "README.md").write_text("# ours")
    local.push(source, "clinic")
    lorchestra("hub", "push", "clinic", "acme/x", "--registry", tmp_path / "registry", **hub.environment)
    assert hub.repositories["acme/x"][CARD] == b"# ours"


def test_the_card(local, make):
    from huggingface_hub import ModelCard

    from lorchestra.adapter.lineage import BaseId

    terms = local.push(make(1, name="terms"), "terms").manifest
    base = BaseId("acme/base-7b", "sha256:" + "a" * 64)
    evil = "x | y\n# heading `code` <script>"
    loss = Metric(value=1.2, low=1.1, high=1.3, n=40, split="sealed")
    source = make(2, base=base, made_by="fusion", parents=[terms], data={evil: "sha256:" + "d" * 64})
    manifest = local.push(source, "clinic", note="for the clinic", metrics={evil: loss}, tags=["sft"]).manifest
    text = card(manifest)
    head = ModelCard(text).data
    assert head.base_model == "acme/base-7b"
    assert head.library_name == "peft"
    assert head.tags == ["lora", "lorchestra", "peft", "sft"]
    lines = text.splitlines()
    assert "| x \\| y \\# heading \\`code\\` \\<script\\> | 1.2 | 1.1 to 1.3 | lower | sealed, n = 40 |" in lines
    assert f"- Sum of 0.5 · terms `{terms.digest}`" in lines
    assert [line for line in lines if line.startswith("#")] == ["# clinic@v1", "## Metrics", "## Lineage"]
    assert f"Digest of its weights: `{manifest.digest}`" in lines


def test_a_base_that_is_a_directory_is_not_told(local, make):
    from lorchestra.adapter.lineage import BaseId

    manifest = local.push(make(1, base=BaseId("models/mine/base", "sha256:" + "a" * 64)), "clinic").manifest
    assert "base_model" not in card(manifest)
