"""What the unit, the image and the manifests take from the server, it can do without: root, capabilities, every place
to write but its cache. Tried on a real server, in a mount namespace with a root that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil
import pytest
from tests.serve.real_server import make_adapter, make_base, make_keys

from lorchestra.registry.registry import Registry

USER = 10001
START = 600.0
# The root as it is, read-only; one directory can be written; then nobody's rights.
CONFINED = """
set -eu
mount --rbind / "$ROOT"
mount -o remount,bind,ro "$ROOT"
mount --rbind "$WRITTEN" "$ROOT$WRITTEN"
if [ -n "$CLOSED" ]; then  # a directory that only root may enter, and Python lies in it
  mount -t tmpfs -o mode=0755 tmpfs "$ROOT$CLOSED"
  mkdir "$ROOT$INSIDE"
  mount --rbind "$INSIDE" "$ROOT$INSIDE"
  mount -o remount,ro "$ROOT$CLOSED"
fi
if touch "$ROOT$CHECKOUT/written" 2>/dev/null; then echo "the root can be written" >&2; exit 9; fi
exec chroot "$ROOT" setpriv --reuid USER --regid USER --clear-groups --no-new-privs --bounding-set=-all \
  --inh-caps=-all "$@"
""".replace("USER", str(USER))


@pytest.fixture
def place():
    """A directory that everybody may look into: pytest's own are root's."""
    directory = Path(tempfile.mkdtemp(prefix="lorchestra-confined-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
def test_the_server_needs_no_root_and_writes_to_its_cache_alone(place):
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root on Linux mounts file systems and gives its rights away")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    base, written, root = make_base(place / "base"), place / "cache", place / "root"
    root.mkdir()
    make_adapter(1, 8).save(place / "clinic")
    with Registry.open(str(written / "registry"), create=True, actor="test") as registry:
        registry.push(place / "clinic", "clinic", alias="production")
    secrets = make_keys(place / "keys.yaml", {"acme": ["clinic"]})
    for path in [place / "keys.yaml", written, *written.rglob("*")]:
        os.chown(path, USER, USER)
    for path in base.iterdir():  # transformers writes weights for their owner alone
        path.chmod(0o644)
    (written / "tmp").mkdir()
    (written / "tmp").chmod(0o777)
    words = [sys.executable, "-m", "lorchestra", "serve", str(base), "--port", "0", "--engine", "embedded"]
    words += ["--dtype", "float32", "--device", "cpu", "--keys", str(place / "keys.yaml")]
    environment = {
        "PATH": os.environ["PATH"], "ROOT": str(root), "WRITTEN": str(written),
        "CHECKOUT": str(Path(__file__).parents[2]),
        "HOME": str(written), "TMPDIR": str(written / "tmp"), "LORCHESTRA_HOME": str(written / "home"),
        "LORCHESTRA_REGISTRY": str(written / "registry"), "LORCHESTRA_ACTOR": "serve", "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "CLOSED": "",
    }  # fmt: skip
    python = Path(sys.executable).resolve()
    closed = [path for path in (*reversed(python.parents), python) if not path.stat().st_mode & 0o001]
    if closed:
        environment |= {"CLOSED": str(closed[0]), "INSIDE": str(closed[0] / python.relative_to(closed[0]).parts[0])}
    told = place / "stderr"
    with told.open("wb") as stderr:
        process = psutil.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", CONFINED, "sh", *words],
            stdout=subprocess.DEVNULL, stderr=stderr, env=environment, cwd="/",
        )  # fmt: skip
    try:
        url = address(process, told)
        assert set(process.uids()) == {USER}
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert {line.split()[1] for line in status.splitlines() if line.startswith("Cap")} == {"0" * 16}
        headers = {"authorization": f"Bearer {secrets['acme']}"}
        body = {"model": "clinic", "prompt": "Fever", "max_tokens": 3, "logit_bias": {"2": -100.0}}
        answer = httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        process.wait(60)
    assert process.returncode == 0, told.read_text(errors="replace")


def address(process: psutil.Popen, told: Path) -> str:
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        for line in told.read_text(errors="replace").splitlines():
            if line.startswith("ready at "):
                return line.removeprefix("ready at ").removesuffix("/v1").strip()
        time.sleep(0.05)
    raise AssertionError(f"the server did not come up: {told.read_text(errors='replace')[-2000:]}")
