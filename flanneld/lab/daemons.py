"""One flanneld process of the lab: started, asked over HTTP, stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flanneld.lab import wait
from flanneld.lab.netns import end
from flanneld.lab.wait import wait_until

if TYPE_CHECKING:
    from flanneld.lab.hosts import Host

HEALTHZ_PORT: Final = 8081


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer of a daemon."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Daemon:
    """One flanneld process on a host. ``log`` is its file, ``run_dir`` holds subnet.env and the status file."""

    def __init__(self, host: Host, instance: str, flags: Sequence[str], env: Mapping[str, str]) -> None:
        self.host = host
        self.run_dir = host.directory / (f"flannel-{instance}" if instance else "flannel")
        self.run_dir.mkdir(exist_ok=True)
        self.subnet_file = self.run_dir / "subnet.env"
        self.log = host.directory / (f"flanneld-{instance}.log" if instance else "flanneld.log")
        self.healthz_port = HEALTHZ_PORT + len(host.daemons)
        self.argv = [
            *host.lab.program,
            f"--etcd-endpoints={host.lab.etcd.endpoint}" if host.lab.has_etcd else "",
            f"--subnet-file={self.subnet_file}",
            "--healthz-ip=127.0.0.1",
            f"--healthz-port={self.healthz_port}",
            f"--node-name={host.name}",
            *flags,
        ]
        self.argv = [word for word in self.argv if word]
        # The key's usual places are the machine's, and all hosts of a lab are on one machine.
        key_file = str(host.directory / "wgkey")
        self.env = {"NODE_NAME": host.name, "PYTHONUNBUFFERED": "1", "WIREGUARD_KEY_FILE": key_file, **env}
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Start, or start again with the same flags and files."""
        self.process = self.host.ns.start(self.argv, log=self.log, env=self.env, hostname=self.host.name)

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 10) -> int:
        """End it; its exit code."""
        return end(self.process, sig, timeout)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def restart(self, sig: int = signal.SIGTERM) -> None:
        self.stop(sig)
        self.start()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def output(self, lines: int = 40) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def get(self, path: str) -> Answer:
        """GET from its status port, e.g. ``get("/readyz")``; OSError while it does not listen."""
        # A socket belongs to the namespace in which it was made; what follows may happen outside.
        connection = http.client.HTTPConnection("127.0.0.1", self.healthz_port, timeout=5 * wait.patience)
        with contextlib.closing(connection):
            with self.host.ns.inside():
                connection.connect()
            connection.request("GET", path)
            response = connection.getresponse()
            return Answer(response.status, response.read().decode())

    @property
    def ready(self) -> bool:
        try:
            return self.get("/readyz").status == 200
        except (OSError, http.client.HTTPException):
            return False

    def wait_ready(self, timeout: float = 20) -> Daemon:
        """Wait for /readyz to answer 200; NotYet shows the reasons it gave and the end of its log."""

        def ready_or_dead() -> bool:
            return self.ready or not self.running

        wait_until(ready_or_dead, timeout, lambda: f"{self.host.name}: flanneld ready: {self.why_not()}")
        if not self.running:
            raise RuntimeError(f"{self.host.name}: flanneld exited {self.process.returncode}:\n{self.output()}")
        return self

    def why_not(self) -> str:
        """The reasons that it gives for not being ready, and the end of its log."""
        try:
            answer = self.get("/readyz").text
        except (OSError, http.client.HTTPException) as error:
            answer = str(error)
        return f"{answer}\n{self.output()}"

    def subnet_env(self) -> dict[str, str]:
        """What it wrote into subnet.env, as written; {} while there is none."""
        if not self.subnet_file.exists():
            return {}
        return dict(line.split("=", 1) for line in self.subnet_file.read_text().splitlines() if "=" in line)
