"""The daemon at N peers: start, restart, the latency of one change, a storm of changes, memory and idle CPU.

    sudo .venv/bin/python -m flanneld.lab.bench_scale [PEERS]

One host with a real etcd and a real kernel; the other nodes are leases. Times are from outside: process start to
/readyz, a put's answer to the line of ``ip monitor``.
"""

from __future__ import annotations

import json
import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flanneld.lab.daemons import Daemon
from flanneld.lab.hosts import PREFIX, Host, Lab
from flanneld.lab.netns import end
from flanneld.lab.wait import wait_until

HERTZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Scale:
    """Seconds, bytes, and milliseconds where the name says so."""

    peers: int
    start: float
    restart: float
    restart_writes: int
    latency_median_ms: float
    latency_p99_ms: float
    cpu_per_change_ms: float
    """Of the daemon, all threads, with what the kernel does for it."""
    storm_rate: float
    storm_exact_after: float
    memory_few: int
    memory: int
    idle_cpu: float
    """Share of one core."""

    def rows(self) -> list[tuple[str, str]]:
        mib = 1 << 20
        return [
            (f"process start to ready, {self.peers} leases in etcd", f"{self.start:.2f} s"),
            (f"restart with {self.peers} peers in place, to ready", f"{self.restart:.2f} s"),
            ("writes to the kernel at that restart", str(self.restart_writes)),
            ("one lease changed: etcd's answer to route in the kernel, median", f"{self.latency_median_ms:.1f} ms"),
            ("the same, 99th percentile", f"{self.latency_p99_ms:.1f} ms"),
            ("the daemon's CPU for it", f"{self.cpu_per_change_ms:.1f} ms"),
            ("storm: changes a second for 10 s", f"{self.storm_rate:.0f}"),
            ("storm: exact state after its end", f"{self.storm_exact_after:.2f} s"),
            ("resident memory at 3 peers", f"{self.memory_few / mib:.0f} MiB"),
            (f"resident memory at {self.peers} peers", f"{self.memory / mib:.0f} MiB"),
            (f"idle CPU at {self.peers} peers", f"{self.idle_cpu * 100:.2f} % of a core"),
        ]


def lease_value(number: int) -> str:
    data = {"VNI": 1, "VtepMAC": "02:" + ":".join(f"{b:02x}" for b in number.to_bytes(5, "big"))}
    public = f"172.{16 + number // 65025 % 8}.{number // 255 % 255}.{number % 255 + 1}"
    value = {"PublicIP": public, "PublicIPv6": None, "BackendType": "vxlan", "BackendData": data}
    return json.dumps(value, separators=(",", ":"))


def lease_key(number: int) -> str:
    return f"{PREFIX}/subnets/10.{1 + number // 250}.{number % 250}.0-24"


def connect(lab: Lab) -> Any:
    """An etcd client of the bench's own, in etcd's namespace."""
    import etcd3

    with lab.etcd_ns.inside():
        client = etcd3.client(host=lab.etcd.address, port=lab.etcd.port)
        client.get("connect")
    return client


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / HERTZ


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed_start(daemon: Daemon, peers: int) -> float:
    """Seconds from process start to the last kernel entry, by the daemon's own word that all of it stands."""
    began = time.monotonic()
    daemon.start()
    wait_until(lambda: daemon.ready, 60, lambda: f"ready:\n{daemon.output()}", interval=0.01)
    took = time.monotonic() - began
    routes = daemon.host.run("ip route show dev flannel.1").count(" via ")
    assert routes == peers, f"{routes} routes of {peers}"
    return took


def host_gw(peers: int = 5000) -> list[tuple[str, str]]:
    """The cold start of host-gw: as many routes by as many gateways, into an empty table."""
    with Lab(hosts=1, underlay="172.16.0.0/12") as lab:
        lab.set_config({"Network": "10.0.0.0/8", "SubnetLen": 24, "Backend": {"Type": "host-gw"}})
        host, client = lab.hosts[0], connect(lab)
        for number in range(peers):
            value = json.loads(lease_value(number + 1000))  # the first addresses are the lab's own
            client.put(lease_key(number), json.dumps({"PublicIP": value["PublicIP"], "BackendType": "host-gw"}))
        daemon = host.start_daemon(wait=True)
        starts, programming = [], []
        for _ in range(3):
            daemon.stop()
            host.run("ip route flush proto 241")
            began = time.monotonic()
            daemon.start()
            wait_until(lambda: daemon.ready, 60, lambda: f"ready:\n{daemon.output()}", interval=0.01)
            starts.append(time.monotonic() - began)
            programming.append(daemon.get("/status").json()["last_pass"]["seconds"])
            assert host.run("ip route show proto 241").count(" via ") == peers
    return [
        (f"host-gw: process start to ready, {peers} routes into an empty table", f"{statistics.median(starts):.2f} s"),
        ("of which looking, planning and programming", f"{statistics.median(programming):.2f} s"),
    ]


def writes(daemon: Daemon) -> int:
    text = daemon.get("/metrics").text
    return int(sum(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith("flanneld_changes_total")))


@contextmanager
def monitored(host: Host) -> Iterator[subprocess.Popen[bytes]]:
    """``ip monitor route`` on the host, its output readable as it comes."""
    process = subprocess.Popen(
        host.ns.argv("stdbuf -oL ip monitor route"), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, bufsize=0,
        start_new_session=True,
    )  # fmt: skip
    try:
        time.sleep(0.3)  # until it has subscribed; it says nothing
        yield process
    finally:
        end(process)


def latencies(host: Host, client: Any, first: int, count: int) -> list[float]:
    """Milliseconds from etcd's answer to a put until the kernel says that it has the route, one change at a time."""
    found = []
    with monitored(host) as process:
        assert process.stdout is not None
        for number in range(first, first + count):
            subnet = lease_key(number).rsplit("/", 1)[1].replace("-24", "/24").encode()
            client.put(lease_key(number), lease_value(number))
            began, seen = time.monotonic(), b""
            while subnet not in seen:
                ready, _, _ = select.select([process.stdout], [], [], 10)
                assert ready, f"no route for {subnet.decode()} within 10 s"
                seen += process.stdout.read(65536)
            found.append((time.monotonic() - began) * 1000)
            time.sleep(0.01)
    return found


def storm(host: Host, client: Any, first: int, rate: float, seconds: float) -> tuple[float, float]:
    """Put and delete leases at ``rate`` a second; the rate reached, and seconds until the kernel was exact."""
    random.seed(1)
    began, done = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        number = first + random.randrange(2000)
        if random.random() < 0.7:
            client.put(lease_key(number), lease_value(number))
        else:
            client.delete(lease_key(number))
        done += 1
        ahead = done / rate - (time.monotonic() - began)
        if ahead > 0:
            time.sleep(ahead)
    reached, finished = done / (time.monotonic() - began), time.monotonic()
    keys = {m.key.decode().rsplit("/", 1)[1].replace("-24", "/24") for _, m in client.get_prefix(f"{PREFIX}/subnets/")}

    def exact() -> bool:
        routes = {line.split()[0] for line in host.run("ip route show dev flannel.1").splitlines() if " via " in line}
        return routes == keys - {own}

    own = host.daemon.get("/status").json()["subnet"]
    wait_until(exact, 60, "the exact state")
    return reached, time.monotonic() - finished


def measure(peers: int = 5000) -> Scale:
    """All of it, on one host. Takes about a minute."""
    with Lab(hosts=1) as lab:
        lab.set_config({"Network": "10.0.0.0/8", "SubnetLen": 24, "Backend": {"Type": "vxlan"}})
        host, client = lab.hosts[0], connect(lab)
        for number in range(3):
            client.put(lease_key(number), lease_value(number))
        daemon = host.start_daemon(wait=True)
        time.sleep(3)
        few = resident(daemon.process.pid)
        daemon.stop()
        host.run("ip link del flannel.1")
        for number in range(3, peers):
            client.put(lease_key(number), lease_value(number))
        start = timed_start(daemon, peers)
        daemon.stop()
        restart = timed_start(daemon, peers)
        restart_writes = writes(daemon)
        pid = daemon.process.pid
        time.sleep(5)
        cpu = cpu_seconds(pid)
        time.sleep(20)
        idle = (cpu_seconds(pid) - cpu) / 20
        cpu = cpu_seconds(pid)
        changes = sorted(latencies(host, client, peers, 300))
        cpu = cpu_seconds(pid) - cpu
        reached, exact_after = storm(host, client, peers + 1000, 1000, 10)
        return Scale(
            peers=peers,
            start=start,
            restart=restart,
            restart_writes=restart_writes,
            latency_median_ms=statistics.median(changes),
            latency_p99_ms=changes[int(len(changes) * 0.99)],
            cpu_per_change_ms=cpu / len(changes) * 1000,
            storm_rate=reached,
            storm_exact_after=exact_after,
            memory_few=few,
            memory=resident(pid),
            idle_cpu=idle,
        )


def main() -> None:
    peers = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    rows = [*measure(peers).rows(), *host_gw(peers)]
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        print(f"{what:<{width}}  {value}")


if __name__ == "__main__":
    main()
