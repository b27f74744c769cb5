"""A real etcd in a temporary directory, on a free port."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from flanneld.lab import wait
from flanneld.lab.netns import Namespace, end, run


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago.

    Not one of those that the kernel gives to clients, or one of them might have it when a stopped server starts again.
    """
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first_of_clients, 20_000))
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Etcd:
    """One etcd server; inside a namespace it listens on ``address``. ``extra`` are further etcd arguments.

    With ``scheme="https"``, ``extra`` names the server's certificate and ``client`` is what etcdctl needs to get in.
    ``start=False`` leaves the start to the caller, who may add to ``extra`` first: members of one cluster.
    """

    def __init__(
        self,
        *,
        address: str = "127.0.0.1",
        namespace: Namespace | None = None,
        extra: tuple[str, ...] = (),
        scheme: str = "http",
        client: tuple[str, ...] = (),
        start: bool = True,
    ) -> None:
        if shutil.which("etcd") is None:
            raise FileNotFoundError("etcd is not installed; on Debian: apt-get install etcd-server")
        self.address = address
        self.namespace = namespace
        self.extra = extra
        self.scheme = scheme
        self.client = client
        self.port = free_port()
        self.peer_port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="flanneld-etcd-"))
        self.log = self.directory / "etcd.log"
        self.process: subprocess.Popen[bytes] | None = None
        if not start:
            return
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.address}:{self.port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    def start(self) -> None:
        """Start, or start again on the same data and port; returns once it answers."""
        peer = self.peer_url
        argv = [
            "etcd", "--name=lab", f"--data-dir={self.directory / 'data'}",
            f"--listen-client-urls={self.endpoint}", f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=lab={peer}", "--unsafe-no-fsync", *self.extra,
        ]  # fmt: skip
        # unsafe-no-fsync: a lab's data need not survive the machine, and fsync dominates on a noisy disk.
        if self.namespace is not None:
            self.process = self.namespace.start(argv, log=self.log)
        else:
            with self.log.open("ab") as out:
                self.process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 30 * wait.patience
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            if b"ready to serve client requests" in self.log.read_bytes() and self._answers():
                return
            time.sleep(0.02)
        raise RuntimeError(f"etcd did not start:\n{self.log.read_text()[-2000:]}")

    def _answers(self) -> bool:
        with contextlib.ExitStack() as stack:
            if self.namespace is not None:
                stack.enter_context(self.namespace.inside())
            try:
                socket.create_connection((self.address, self.port), timeout=1).close()
            except OSError:
                return False
        return True

    def ctl(self, *words: str, check: bool = True) -> str:
        """Run etcdctl against this server (Debian: etcd-client)."""
        argv = ["env", "ETCDCTL_API=3", "etcdctl", f"--endpoints={self.endpoint}", *self.client, *words]
        return self.namespace.run(argv, check=check) if self.namespace else run(argv, check=check)

    def stop(self, *, wipe: bool = False) -> None:
        """Stop the server; with ``wipe`` its data go, too, and a later ``start`` is an empty store."""
        if self.process is not None:
            end(self.process)
            self.log.write_bytes(b"")
        if wipe:
            shutil.rmtree(self.directory / "data", ignore_errors=True)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Etcd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
