"""Real container runtimes, each confined to a host of the lab: own namespace, own directories, own sockets."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flanneld.lab.hosts import Host
from flanneld.lab.netns import end
from flanneld.lab.wait import wait_until
from tests.testbed import busybox
from tests.testbed.cni import DEBIAN_PLUGINS


def conflist(host: Host, directory: Path, **flannel: Any) -> dict[str, Any]:
    """flannel's conflist (kube-flannel.yml), with the host's subnet file and directories of its own."""
    return {
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            {
                "type": "flannel",
                "subnetFile": str(host.daemon.subnet_file),
                "dataDir": str(directory / "data"),
                "ipam": {"dataDir": str(directory / "networks")},
                "delegate": {"hairpinMode": True, "isDefaultGateway": True},
                **flannel,
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def remove(directory: Path) -> None:
    """Remove a runtime's directory, and first what it left mounted there."""

    def gone() -> bool:
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in reversed(points):
            if point.startswith(f"{directory}/"):
                subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    wait_until(gone, 10, f"{directory} to be gone", 0.2)  # shims end a moment after their containerd


class Runtime:
    """What the runtimes share: directories, the CNI configuration, a command line in the host's namespace."""

    def __init__(self, host: Host, plugin: Path, configuration: dict[str, Any] | None = None) -> None:
        self.host = host
        # A short path: the sockets below it may have 108 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="flrt-", dir="/tmp"))
        self.bin, self.net_d = self.directory / "bin", self.directory / "net.d"
        self.net_d.mkdir()
        shutil.copytree(DEBIAN_PLUGINS, self.bin)
        if plugin.is_file():
            shutil.copy(plugin, self.bin / "flannel")
        configuration = configuration or conflist(host, self.directory)
        (self.net_d / "10-flannel.conflist").write_text(json.dumps(configuration))

    def run(self, argv: Sequence[str], timeout: float = 60, check: bool = True) -> str:
        return self.host.run(list(argv), timeout=timeout, check=check)

    @property
    def reservations(self) -> set[str]:
        store = self.directory / "networks" / "cbr0"
        return {path.name for path in store.iterdir() if path.name[0].isdigit()} if store.exists() else set()

    @property
    def caches(self) -> set[str]:
        data = self.directory / "data"
        return {path.name for path in data.iterdir()} if data.exists() else set()

    def close(self) -> None:
        remove(self.directory)


class Containerd(Runtime):
    """containerd, driven by ``ctr run --cni``, which is its own CNI client and looks in the standard directories."""

    def __init__(self, host: Host, plugin: Path, image: Path, configuration: dict[str, Any] | None = None) -> None:
        super().__init__(host, plugin, configuration)
        self.socket = self.directory / "c.sock"
        # runc keeps its state outside of our directories, by containerd's namespace.
        self.namespace = self.directory.name.replace("_", "0")  # containerd takes no underscore at the end
        config = self.directory / "config.toml"
        config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        self.process = host.ns.start([
            "containerd", f"--config={config}", f"--root={self.directory}/root", f"--state={self.directory}/state",
            f"--address={self.socket}",
        ], log=self.directory / "log")  # fmt: skip
        self.tasks: list[subprocess.Popen[bytes]] = []
        wait_until(self._answers, 30, (self.directory / "log").read_text)
        self.ctr("image", "import", "--snapshotter=native", "--no-unpack", str(image))

    def _answers(self) -> bool:
        with contextlib.suppress(RuntimeError):
            self.ctr("version")
            return True
        return False

    def argv(self, *words: str) -> list[str]:
        return ["ctr", f"--address={self.socket}", f"--namespace={self.namespace}", *words]

    def ctr(self, *words: str, timeout: float = 60) -> str:
        return self.run(self.argv(*words), timeout=timeout)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Run a container until it is killed; ctr calls ADD before and DEL after it."""
        mounts = (
            "mount --make-rprivate / && mount -t tmpfs t /opt && mkdir -p /opt/cni/bin && mount --bind $1 /opt/cni/bin"
            " && mount -t tmpfs t /etc/cni && mkdir /etc/cni/net.d && mount --bind $2 /etc/cni/net.d"
            ' && mount -t tmpfs t /var/lib && shift 2 && exec "$@"'
        )
        run = self.argv("run", "--snapshotter=native", "--cni", "--rm", busybox.NAME, name, *command)
        task = self.host.ns.start(
            ["unshare", "--mount", "sh", "-c", mounts, "sh", str(self.bin), str(self.net_d), *run],
            log=self.directory / f"{name}.log",
        )
        self.tasks.append(task)
        return task

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def exec(self, name: str, *command: str) -> str:
        return self.ctr("task", "exec", "--exec-id", f"x{uuid.uuid4().hex[:8]}", name, *command)

    def address(self, name: str) -> str:
        """Wait until the container has its address."""

        def look() -> str:
            with contextlib.suppress(RuntimeError):
                shown = self.exec(name, "ip", "-4", "-o", "addr", "show", "dev", "eth0")
                return shown.split("inet ")[1].split("/")[0] if "inet " in shown else ""
            return ""

        return wait_until(look, 30, lambda: f"{name} has no address:\n{self.log(name)}")

    def stop(self, name: str, task: subprocess.Popen[bytes]) -> int:
        """Kill the container; the exit code of ctr, which calls DEL."""
        self.ctr("task", "kill", "--signal=KILL", name)
        return task.wait(30)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            for name in self.ctr("task", "ls", "-q").split():
                # ctr passes a signal on to the container, whose first process ignores all but this one.
                self.ctr("task", "kill", "--signal=KILL", name)
        for task in self.tasks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                task.wait(5)
            end(task)
        with contextlib.suppress(RuntimeError):
            for name in self.ctr("task", "ls", "-q").split():  # those whose ADD failed
                self.ctr("task", "rm", "--force", name)
        shutil.rmtree(Path("/run/containerd/runc", self.namespace), ignore_errors=True)
        end(self.process)
        super().close()


class Podman(Runtime):
    """podman with its CNI backend (no daemon of its own)."""

    def __init__(self, host: Host, plugin: Path, image: Path, configuration: dict[str, Any] | None = None) -> None:
        super().__init__(host, plugin, configuration)
        self.conf = self.directory / "containers.conf"
        self.conf.write_text(
            f'[network]\nnetwork_backend="cni"\ncni_plugin_dirs=["{self.bin}"]\nnetwork_config_dir="{self.net_d}"\n'
            '[engine]\ncgroup_manager="cgroupfs"\nruntime="runc"\nevents_logger="none"\n'
            '[containers]\nlog_driver="k8s-file"\ndefault_ulimits=["nofile=1024:1024","nproc=1024:1024"]\n'
        )
        (self.directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.podman("load", "--signature-policy", str(self.directory / "policy.json"), "-q", "-i", str(image))

    def podman(self, *words: str, timeout: float = 60) -> str:
        return self.run([
            "env", f"CONTAINERS_CONF={self.conf}", "podman", f"--root={self.directory}/root",
            f"--runroot={self.directory}/run", f"--tmpdir={self.directory}/tmp", "--storage-driver=vfs",
            *words,
        ], timeout=timeout)  # fmt: skip

    def start(self, name: str, *command: str, flags: Sequence[str] = ()) -> str:
        """Run a container in the background; its address."""
        self.podman("run", "-d", "--name", name, "--network=cbr0", *flags, busybox.NAME, *command)
        pid = self.podman("inspect", "--format={{.State.Pid}}", name).strip()
        shown = self.run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-4", "-o", "addr", "show", "dev", "eth0"])
        return shown.split("inet ")[1].split("/")[0]

    def stop(self, name: str) -> None:
        self.podman("rm", "--force", "--time=0", name)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.podman("rm", "--all", "--force", "--time=0")
        super().close()


class Docker:
    """dockerd with the options that ``flannelctl docker-opts`` wrote, or with others."""

    def __init__(self, host: Host, options: Sequence[str], root: Path) -> None:
        self.host = host
        self.root = root
        self.directory = Path(tempfile.mkdtemp(prefix="fldk-", dir="/tmp"))
        self.socket = self.directory / "d.sock"
        self.log = self.directory / "log"
        self.start(options)
        self.docker("import", str(root), busybox.NAME)

    def start(self, options: Sequence[str]) -> None:
        self.process = self.host.ns.start([
            "dockerd", f"--host=unix://{self.socket}", f"--data-root={self.directory}/data",
            f"--exec-root={self.directory}/exec", f"--pidfile={self.directory}/pid", "--storage-driver=vfs", *options,
        ], log=self.log)  # fmt: skip
        wait_until(lambda: self.docker("version") or self.process.poll(), 60, self.log.read_text)

    def docker(self, *words: str, timeout: float = 60) -> str:
        return self.host.run(["docker", f"--host=unix://{self.socket}", *words], timeout=timeout)

    def run(self, name: str, *command: str, flags: Sequence[str] = ()) -> str:
        """Run a container in the background; its address."""
        self.docker("run", "--detach", "--name", name, *flags, busybox.NAME, *command)
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return self.docker("inspect", f"--format={template}", name).strip()

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            if names := self.docker("ps", "--all", "--quiet").split():
                self.docker("rm", "--force", *names)
        end(self.process, timeout=20)

    def close(self) -> None:
        self.stop()
        remove(self.directory)


@contextlib.contextmanager
def closing_all() -> Iterator[list[Runtime | Docker]]:
    """A list of runtimes; all are closed at the end, whatever happened."""
    made: list[Runtime | Docker] = []
    try:
        yield made
    finally:
        for runtime in reversed(made):
            with contextlib.suppress(OSError, RuntimeError, AssertionError):
                runtime.close()


def missing(*programs: str) -> list[str]:
    """Programs that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [program for program in programs if shutil.which(program, path=path) is None]
