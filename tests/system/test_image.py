"""The container image, run as the DaemonSet runs it: its capabilities, its mounts, a root file system that is read-only.

Building the image takes minutes (Debian's packages, all wheels), so this runs when it is asked for:
FLANNELD_TEST_IMAGE=build builds one on a base made by debootstrap, FLANNELD_TEST_IMAGE=FILE takes a docker archive that
script/image --output FILE wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from flanneld.lab.daemons import Daemon
from flanneld.lab.hosts import Host, Lab
from flanneld.lab.netns import end
from flanneld.lab.wait import wait_until
from tests.testbed.fake_kube import FakeKube
from tests.testbed.runtimes import missing, remove

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/flannel:dev"
WANTED = os.environ.get("FLANNELD_TEST_IMAGE", "")
DEFAULT_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL"
    " AUDIT_WRITE"
).split()

pytestmark = [
    pytest.mark.skipif(not WANTED, reason="takes minutes: set FLANNELD_TEST_IMAGE=build, or to an image's archive"),
    pytest.mark.timeout(1500),
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as a docker archive."""
    if absent := missing("containerd", "ctr", "runc"):
        pytest.skip(f"not installed: {', '.join(absent)} (Debian: containerd, runc)")
    if WANTED != "build":
        return Path(WANTED)
    path = tmp_path_factory.mktemp("image") / "flannel.tar"
    subprocess.run([str(ROOT / "script" / "image"), "--debootstrap", "--output", str(path)], check=True, timeout=1200)
    return path


class Node:
    """A host with a containerd of its own, in which the DaemonSet's containers run as kubelet would run them."""

    def __init__(self, host: Host, archive: Path, kube: FakeKube) -> None:
        self.host = host
        self.kube = kube
        self.directory = Path(tempfile.mkdtemp(prefix="flim-", dir="/tmp"))
        self.namespace = self.directory.name
        self.run_flannel = self.directory / "run-flannel"
        self.mounts = {
            "run": self.run_flannel,
            "cni-plugin": self.directory / "cni-bin",
            "cni": self.directory / "net.d",
            "flannel-cfg": self.directory / "cfg",
            "xtables-lock": self.directory / "xtables.lock",
            "tmp": self.directory / "tmp",
        }
        for name, path in self.mounts.items():
            path.touch() if name == "xtables-lock" else path.mkdir()
        for name, text in one("ConfigMap")["data"].items():
            (self.mounts["flannel-cfg"] / name).write_text(text)
        config = self.directory / "config.toml"
        config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        self.socket = self.directory / "c.sock"
        self.log = self.directory / "flanneld.log"
        self.containerd = host.ns.start([
            "containerd", f"--config={config}", f"--root={self.directory}/root", f"--state={self.directory}/state",
            f"--address={self.socket}",
        ], log=self.directory / "log")  # fmt: skip
        wait_until(lambda: self.ctr("version"), 30, (self.directory / "log").read_text)
        self.ctr("image", "import", "--snapshotter=native", str(archive), timeout=300)
        self.task: subprocess.Popen[bytes] | None = None

    def argv(self, *words: str) -> list[str]:
        return ["ctr", f"--address={self.socket}", f"--namespace={self.namespace}", *words]

    def ctr(self, *words: str, timeout: float = 60) -> str:
        return self.host.run(self.argv(*words), timeout=timeout)

    def command(self, name: str, container: dict[str, Any], extra: Sequence[str] = ()) -> list[str]:
        """A container of the DaemonSet as a command for ctr: what its manifest says, and nothing more."""
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and security["capabilities"]["drop"] == ["ALL"]
        words = ["run", "--rm", "--snapshotter=native", "--net-host", "--read-only"]
        added = security["capabilities"].get("add", [])
        words += [f"--cap-drop=CAP_{c}" for c in DEFAULT_CAPABILITIES if c not in added]
        words += [f"--cap-add=CAP_{c}" for c in added if c not in DEFAULT_CAPABILITIES]
        for mount in container["volumeMounts"]:
            options = (
                f"type=bind,src={self.mounts[mount['name']]},dst={mount['mountPath'].rstrip('/')},options=rbind:rw"
            )
            words += ["--mount", options]
        words += ["--env", f"NODE_NAME={self.host.name}"]
        return self.argv(*words, IMAGE, name, *container["command"], *container["args"], *extra)

    def init(self) -> str:
        """Run the init containers in their order; what they said."""
        said = [
            self.host.run(self.command(container["name"], container), timeout=120)
            for container in pod()["initContainers"]
        ]
        return "".join(said)

    def start(self) -> None:
        """Run the daemon; the API server's address is what a service account would have told it."""
        (container,) = [c for c in pod()["containers"] if c["name"] == "kube-flannel"]
        argv = self.command("kube-flannel", container, [f"--kube-api-url={self.kube.url}"])
        self.task = self.host.ns.start(argv, log=self.log)

    def close(self) -> None:
        if self.task is not None:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                self.ctr("task", "kill", "--signal=KILL", "kube-flannel")
                self.task.wait(10)
            end(self.task)
        end(self.containerd)
        shutil.rmtree(Path("/run/containerd/runc", self.namespace), ignore_errors=True)
        remove(self.directory)


def one(kind: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "manifests" / "kube-flannel.yml").read_text())
    (found,) = [document for document in documents if document and document["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    found: dict[str, Any] = one("DaemonSet")["spec"]["template"]["spec"]
    return found


@pytest.fixture
def node(make_lab: Callable[..., Lab], archive: Path) -> Iterator[Node]:
    lab = make_lab(1, etcd=False)
    with contextlib.ExitStack() as stack:
        with lab.etcd_ns.inside():
            kube = stack.enter_context(FakeKube(address=str(lab.underlay[2])))
        node = Node(lab.hosts[0], archive, kube)
        stack.callback(node.close)
        yield node


@pytest.mark.field_problem(31)
def test_the_daemon_set_pod_installs_itself_and_becomes_ready_with_two_capabilities(node):
    host, kube = node.host, node.kube
    kube.add_node(host.name, "10.244.1.0/24")
    kube.add_peer("other", "10.244.2.0/24", "172.30.0.99", "02:00:00:00:00:02")
    (node.mounts["cni-plugin"] / "portmap").write_text("the host's own")

    node.init()
    installed = {path.name for path in node.mounts["cni-plugin"].iterdir()}
    assert {"flannel", "bridge", "host-local", "loopback", "portmap"} <= installed
    assert (node.mounts["cni-plugin"] / "portmap").read_text() == "the host's own"
    assert not [name for name in installed if name.startswith(".flannel.") and not name.startswith(".flannel.d-")], (
        "nothing half-done is left"
    )
    conflist = json.loads((node.mounts["cni"] / "10-flannel.conflist").read_text())
    assert conflist["name"] == "cbr0"
    version = subprocess.run(
        [str(node.mounts["cni-plugin"] / "flannel")], env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True
    )
    assert "1.0.0" in json.loads(version.stdout)["supportedVersions"]
    assert "up to date" in node.init(), "a second time there is nothing to do"

    node.start()
    daemon = Daemon.__new__(Daemon)  # only its questions are needed: the process is containerd's
    daemon.host, daemon.healthz_port, daemon.log = host, 8081, node.log
    wait_until(lambda: daemon.ready, 60, daemon.why_not)
    assert "FLANNEL_SUBNET=10.244.1.1/24" in (node.run_flannel / "subnet.env").read_text()
    assert "10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink" in host.run("ip route")
    assert kube.annotations(host.name)["flannel.alpha.coreos.com/public-ip"] == host.address
    assert "FLANNEL-POSTRTG" in host.run("iptables -t nat -S")
    host.run("ip route del 10.244.2.0/24")
    wait_until(lambda: "10.244.2.0/24" in host.run("ip route"), 10, daemon.why_not)
