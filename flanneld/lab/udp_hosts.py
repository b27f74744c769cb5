"""Two hosts on a cable with a udp tunnel between them: our worker, or the plain C loop. For tests and the benchmark."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from flanneld.dataplane.udp_tunnel.control import Client
from flanneld.lab.netns import Namespace, end, veth
from flanneld.lab.wait import wait_until

PORT: Final = 8285
NETWORK: Final = "10.5.0.0/16"
Carrier = Literal["worker", "worker without offloads", "c"]


class NoCompiler(RuntimeError):
    """There is no C compiler; the text names the package."""


def compile_reference(folder: Path) -> Path:
    """The plain C loop as a program in ``folder``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompiler("no C compiler: install gcc")
    program = folder / "udp_reference"
    source = Path(__file__).with_name("udp_reference.c")
    subprocess.run([compiler, "-O2", "-o", str(program), str(source)], check=True, capture_output=True)
    return program


@dataclass(slots=True)
class TunnelHost:
    """One host: 192.168.9.N on eth0, 10.5.N.0 on flannel0, and what carries the packets."""

    namespace: Namespace
    number: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def underlay(self) -> str:
        return f"192.168.9.{self.number}"

    @property
    def address(self) -> str:
        return f"10.5.{self.number}.0"

    @property
    def subnet(self) -> str:
        return f"{self.address}/24"

    def start(self, peer: TunnelHost, carrier: Carrier, reference: Path | None = None) -> None:
        """Start the carrier and give its device the address and the route of a real host."""
        if carrier == "c":
            argv = [str(reference), "flannel0", self.underlay, str(PORT), f"{peer.subnet}={peer.underlay}"]
        else:
            argv = [sys.executable, "-m", "flanneld.dataplane.udp_tunnel", "flannel0", self.underlay, str(PORT)]
            argv += ["eth0", NETWORK] + (["--no-offloads"] if carrier != "worker" else [])
        self.process = self.namespace.start(argv, env={"OPENBLAS_NUM_THREADS": "1"})
        wait_until(lambda: "flannel0" in self.namespace.run("ip -brief link"), 20, "the device")
        self.namespace.run(f"ip addr add {self.address}/32 dev flannel0")
        self.namespace.run("ip link set flannel0 mtu 1472 up")
        self.namespace.run(f"ip route replace {NETWORK} dev flannel0")
        if carrier != "c":
            self.ask("peers", put=[(peer.subnet, peer.underlay, PORT)])

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """A command to this host's worker."""

        def answers() -> list[dict[str, Any]]:
            with self.namespace.inside(), contextlib.closing(Client("flannel0")) as client:
                return [client.ask(op, **fields)]

        return wait_until(answers, 20, "the worker's answer")[0]

    def stop(self) -> None:
        if self.process is not None:
            end(self.process)
            self.process = None
        self.namespace.run("ip link del flannel0", check=False)

    def cpu_seconds(self) -> float:
        """What the carrier has used so far."""
        if self.process is None:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def two_hosts(mtu: int = 1500) -> Iterator[tuple[TunnelHost, TunnelHost]]:
    """Two hosts on one cable, without a tunnel yet."""
    with contextlib.ExitStack() as stack:
        hosts = [TunnelHost(stack.enter_context(Namespace(f"udp{number}")), number) for number in (1, 2)]
        veth(hosts[0].namespace, "eth0", hosts[1].namespace, "eth0", mtu)
        for host in hosts:
            host.namespace.run(f"ip addr add {host.underlay}/24 dev eth0")
            stack.callback(host.stop)
        yield hosts[0], hosts[1]


@contextlib.contextmanager
def tunnel(a: TunnelHost, b: TunnelHost, carrier: Carrier, reference: Path | None = None) -> Iterator[None]:
    """Both hosts with the same carrier; the devices go afterwards."""
    try:
        a.start(b, carrier, reference)
        b.start(a, carrier, reference)
        yield
    finally:
        a.stop()
        b.stop()
