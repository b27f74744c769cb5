"""Several hosts on one machine: a network namespace each, joined by an underlay, with an etcd that all can reach.

    with Lab(hosts=3) as lab:
        lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
        lab.start_daemons()
        a, b = lab.hosts[0].container("a"), lab.hosts[1].container("b")
        assert a.ping(b.address).ok

The switch is a namespace with one bridge; the etcd server lives in a namespace of its own, so that a test can cut it
off without touching the hosts. Everything is removed when the lab closes, also after a failure or Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

from flanneld.lab.containers import Container
from flanneld.lab.daemons import Daemon
from flanneld.lab.etcd import Etcd
from flanneld.lab.netns import Namespace, veth
from flanneld.lab.ping import PingResult, ping
from flanneld.lab.wait import wait_until

T = TypeVar("T")

PREFIX = "/coreos.com/network"
NAT_INSIDE = "10.0.2.15"
"""The address of every host behind a router: the same for all, as Vagrant and VirtualBox do it."""


def sysctl(namespace: Namespace, values: Mapping[str, str]) -> None:
    """Write /proc/sys entries of a namespace; paths are relative and use slashes."""
    with namespace.inside():
        for path, value in values.items():
            Path("/proc/sys", path).write_text(value)


class Host:
    """A host: namespace ``ns`` with eth0 on the underlay, IP forwarding on, and a directory for its files.

    ``address`` is eth0's own, ``public_address`` what others reach it by; they differ behind a router.
    """

    def __init__(self, lab: Lab, name: str, ns: Namespace, address: str, public: str, address6: str | None) -> None:
        self.lab = lab
        self.name = name
        self.ns = ns
        self.address = address
        self.public_address = public
        self.address6 = address6
        self.router: Namespace | None = None
        self.second_address: str | None = None
        self.directory = lab.directory / name
        self.directory.mkdir()
        self.daemons: list[Daemon] = []
        self.containers: list[Container] = []

    def start_daemon(
        self, *flags: str, env: Mapping[str, str] | None = None, instance: str = "", wait: bool = False
    ) -> Daemon:
        """Run flanneld here with the lab's etcd, its own subnet file and port, and ``flags`` after these.

        ``instance`` names a second daemon on the same host. With ``wait``, returns once it is ready.
        """
        daemon = Daemon(self, instance, flags, env or {})
        self.daemons.append(daemon)
        return daemon.wait_ready() if wait else daemon

    @property
    def daemon(self) -> Daemon:
        """The daemon that was started last."""
        return self.daemons[-1]

    def container(self, name: str, *, by: str = "cni", daemon: Daemon | None = None, **options: Any) -> Container:
        """A namespace on this host's cni0 bridge, made by the real CNI plugins or, ``by="hand"``, by ip(8).

        Waits for subnet.env. ``options``: see ``flanneld.lab.containers.Container``.
        """
        container = Container(self, name, daemon or self.daemon, by=by, **options)
        self.containers.append(container)
        return container

    def run(self, command: str | Sequence[str], **options: Any) -> str:
        """Run a command in the host's namespace; its output."""
        return self.ns.run(command, **options)

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run flannelctl here, told by the environment of the lab's etcd and of this host's daemon; never raises."""
        environment = {"NODE_NAME": self.name}
        if self.lab.has_etcd:
            environment["FLANNELD_ETCD_ENDPOINTS"] = self.lab.etcd.endpoint
        if self.daemons:
            environment["FLANNELD_SUBNET_FILE"] = str(self.daemon.subnet_file)
            environment["FLANNELD_HEALTHZ_PORT"] = str(self.daemon.healthz_port)
        return subprocess.run(
            self.ns.argv([sys.executable, "-m", "flanneld.ctl.cli", *words]),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **environment},
        )

    def ping(self, target: str, **options: Any) -> PingResult:
        return ping(self.ns, target, **options)

    def close(self) -> None:
        for container in reversed(self.containers):
            container.close()
        for daemon in self.daemons:
            daemon.stop()
        self.ns.close()
        if self.router is not None:
            self.router.close()


class Lab:
    """Hosts h1 … hN on an underlay.

    ``underlay`` holds the gateway at .1, etcd at .2 and the hosts from .11 on; ``underlay6`` adds IPv6 the same way
    (::1, ::2, ::b …), without duplicate address detection. ``mtu`` is the underlay's, in bytes. ``second`` gives
    every host an eth1 on a network of its own. Hosts named in ``nat`` live behind a router of their own that
    translates both ways: their eth0 is 10.0.2.15 and their public address the router's. ``default_route=False``
    leaves hosts without a way out of the underlay. ``program`` is the daemon's command line.
    """

    def __init__(
        self,
        hosts: int = 3,
        *,
        underlay: str = "172.30.0.0/24",
        underlay6: str | None = None,
        mtu: int = 1500,
        second: str | None = None,
        nat: Iterable[str] = (),
        default_route: bool = True,
        etcd: bool = True,
        etcd_extra: tuple[str, ...] = (),
        program: Sequence[str] = (sys.executable, "-m", "flanneld.cli"),
    ) -> None:
        if os.geteuid() != 0:
            raise PermissionError("network namespaces need root; run this with sudo")
        self.underlay = IPv4Network(underlay)
        self.underlay6 = IPv6Network(underlay6) if underlay6 else None
        self.second = IPv4Network(second) if second else None
        self.mtu = mtu
        self.default_route = default_route
        self.program = tuple(program)
        self.has_etcd = etcd
        self.hosts: list[Host] = []
        self._stack = contextlib.ExitStack()
        self.directory = Path(tempfile.mkdtemp(prefix="flanneld-lab-"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        try:
            self._build(hosts, frozenset(nat), etcd_extra)
        except BaseException:
            self.close()
            raise

    def _build(self, hosts: int, nat: frozenset[str], etcd_extra: tuple[str, ...]) -> None:
        self.switch = self._stack.enter_context(Namespace("switch"))
        self._bridge("br0", self.underlay, self.underlay6)
        if self.second is not None:
            self._bridge("br1", self.second, None)
        self.etcd_ns = self._stack.enter_context(Namespace("etcd"))
        self.plug(self.etcd_ns, "eth0", 2)
        if self.has_etcd:
            self.etcd = self._stack.enter_context(
                Etcd(address=str(self.underlay[2]), namespace=self.etcd_ns, extra=etcd_extra)
            )
        for _ in range(hosts):
            name = f"h{len(self.hosts) + 1}"
            self.add_host(nat=name in nat)

    def _bridge(self, name: str, network: IPv4Network, network6: IPv6Network | None) -> None:
        sysctl(self.switch, {"net/ipv6/conf/default/accept_dad": "0"})
        # mcast_snooping off: neighbour discovery must not depend on a querier that this lab does not have.
        lines = [f"link add {name} mtu {self.mtu} type bridge forward_delay 0 mcast_snooping 0"]
        lines += [f"link set {name} up", f"addr add {network[1]}/{network.prefixlen} dev {name}"]
        lines += [f"addr add {network6[1]}/{network6.prefixlen} dev {name} nodad"] if network6 else []
        self.switch.run("ip -batch -", stdin="\n".join(lines))

    def plug(self, ns: Namespace, dev: str, number: int, *, bridge: str = "br0") -> tuple[str, str | None]:
        """Give a namespace a port on the switch, with addresses at ``number`` and a default route; its addresses."""
        network, network6 = (self.second, None) if bridge == "br1" else (self.underlay, self.underlay6)
        assert network is not None
        sysctl(ns, {"net/ipv6/conf/default/accept_dad": "0", "net/ipv6/conf/default/accept_ra": "0"})
        port = f"{ns.label}-{dev}"[:15]
        veth(ns, dev, self.switch, port, mtu=self.mtu)
        self.switch.run(f"ip link set {port} master {bridge}")
        lines = [f"addr add {network[number]}/{network.prefixlen} dev {dev}"]
        lines += [f"addr add {network6[number]}/{network6.prefixlen} dev {dev} nodad"] if network6 else []
        if self.default_route and bridge == "br0":
            lines += [f"route add default via {network[1]}"]
            lines += [f"route add ::/0 via {network6[1]}"] if network6 else []
        ns.run("ip -batch -", stdin="\n".join(lines))
        return str(network[number]), str(network6[number]) if network6 else None

    def add_host(self, *, nat: bool = False) -> Host:
        """One more host; may be called while the others run."""
        number = 11 + len(self.hosts)
        name = f"h{len(self.hosts) + 1}"
        with contextlib.ExitStack() as undo:
            ns = undo.enter_context(Namespace(name))
            router = undo.enter_context(Namespace(f"{name}r")) if nat else None
            forwarding = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
            sysctl(ns, forwarding)
            address6: str | None
            if router is None:
                address, address6 = self.plug(ns, "eth0", number)
                public = address
            else:
                sysctl(router, forwarding)
                public, address6 = self._behind(router, ns, number)
                address = NAT_INSIDE
            host = Host(self, name, ns, address, public, address6)
            host.router = router
            if self.second is not None:
                host.second_address, _ = self.plug(ns, "eth1", number, bridge="br1")
            undo.pop_all()
        self.hosts.append(host)
        return host

    def _behind(self, router: Namespace, ns: Namespace, number: int) -> tuple[str, None]:
        """Put a host behind a router that owns the public address and sends everything for it inside."""
        public, _ = self.plug(router, "wan", number)
        veth(router, "lan", ns, "eth0", mtu=self.mtu)
        router.run("ip addr add 10.0.2.1/24 dev lan")
        ns.run("ip -batch -", stdin=f"addr add {NAT_INSIDE}/24 dev eth0\nroute add default via 10.0.2.1")
        rules = f"""table ip nat {{
            chain pre {{ type nat hook prerouting priority dstnat; iifname "wan" ip daddr {public} dnat to {NAT_INSIDE}; }}
            chain post {{ type nat hook postrouting priority srcnat; oifname "wan" masquerade; }}
        }}"""
        router.run("nft -f -", stdin=rules)
        return public, None

    def set_config(self, config: Mapping[str, Any] | str | None = None, *, prefix: str = PREFIX) -> None:
        """Write the network configuration as an operator would (etcdctl put); default: 10.5.0.0/16 over vxlan."""
        if config is None:
            config = {"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}
        text = config if isinstance(config, str) else json.dumps(config)
        self.etcd.ctl("put", f"{prefix}/config", text)

    def start_daemons(self, *flags: str, wait: bool = True, timeout: float = 30) -> list[Daemon]:
        """Start one on every host at once; with ``wait`` all are ready, and every host routes to every other."""
        daemons = [host.start_daemon(*flags) for host in self.hosts]
        if wait:
            for daemon in daemons:
                daemon.wait_ready(timeout)
        return daemons

    def wait_peers(self, *, device: str = "flannel.1", timeout: float = 20) -> None:
        """Wait until every host routes to every other through a device."""

        def routes(host: Host) -> int:
            shown = host.run(f"ip route show dev {device}", check=False) + host.run(
                f"ip -6 route show dev {device}", check=False
            )
            return shown.count(" via ")

        def complete() -> bool:
            return all(routes(host) >= len(self.hosts) - 1 for host in self.hosts)

        wait_until(complete, timeout, lambda: f"routes on {device}: { {h.name: routes(h) for h in self.hosts} }")

    def forget(self) -> None:
        """Let everything run on: nothing is closed any more (see ``flanneld.lab.leave``)."""
        self.hosts = []
        self._stack.pop_all()

    def close(self) -> None:
        for host in reversed(self.hosts):
            with contextlib.suppress(Exception):  # one host that will not go must not keep the others
                host.close()
        self._stack.close()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eventually(check: Callable[[], T], timeout: float = 10, message: str = "") -> T:
    """``wait_until`` under the name that reads well in a test: ``eventually(lambda: a.ping(b.address).ok)``."""
    return wait_until(check, timeout, message or "the check to hold")
