"""Containers as namespaces on a host's cni0 bridge, attached by the real CNI plugins or by hand."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from ipaddress import ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flanneld.lab.netns import CommandFailed, Namespace, veth
from flanneld.lab.ping import PingResult, PingStream, ping
from flanneld.lab.wait import wait_until

if TYPE_CHECKING:
    from flanneld.lab.daemons import Daemon
    from flanneld.lab.hosts import Host

CNI_PLUGINS = Path("/usr/lib/cni")
BRIDGE = "cni0"


def delegate_configuration(subnet_env: Mapping[str, str], data_dir: Path, **overrides: Any) -> dict[str, Any]:
    """What flannel's CNI plugin hands to ``bridge``, from the daemon's subnet.env; ``overrides`` win."""
    subnets = [subnet_env[key] for key in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET") if key in subnet_env]
    networks = [subnet_env[key] for key in ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK") if key in subnet_env]
    return {
        "cniVersion": "0.3.1",
        "name": "cbr0",
        "type": "bridge",
        "bridge": BRIDGE,
        "mtu": int(subnet_env["FLANNEL_MTU"]),
        "isGateway": True,
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "dataDir": str(data_dir),
            "ranges": [[{"subnet": str(ip_interface(subnet).network)}] for subnet in subnets],
            "routes": [{"dst": network} for network in networks],
        },
        **overrides,
    }


class Container:
    """A namespace with eth0 on the host's bridge. ``address`` (and ``address6``) are its own, without prefix length.

    ``overrides`` change the delegate's configuration (``ipMasq=True``, ``bridge="cni1"``).
    """

    def __init__(self, host: Host, name: str, daemon: Daemon, *, by: str = "cni", **overrides: Any) -> None:
        self.host = host
        self.name = name
        wait_until(lambda: daemon.subnet_env().get("FLANNEL_MTU"), 20, lambda: f"subnet.env:\n{daemon.output()}")
        self.subnet_env = daemon.subnet_env()
        self.configuration = delegate_configuration(self.subnet_env, host.directory / "ipam", **overrides)
        self.addresses: list[str] = []
        self.ns = Namespace(f"{host.name}-{name}")
        self._by = by
        try:
            if by == "cni":
                self._attach_by_cni()
            else:
                self._attach_by_hand()
        except BaseException:
            self.ns.close()
            raise

    @property
    def address(self) -> str:
        return next(address for address in self.addresses if ":" not in address)

    @property
    def address6(self) -> str:
        return next(address for address in self.addresses if ":" in address)

    def cni(self, verb: str) -> dict[str, Any]:
        """Call the bridge plugin as a runtime does; its result. CommandFailed holds the plugin's own words."""
        environment = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": self.ns.name,
            "CNI_NETNS": str(self.ns.path),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(CNI_PLUGINS),
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        }
        done = subprocess.run(
            self.host.ns.argv([str(CNI_PLUGINS / "bridge")]),
            input=json.dumps(self.configuration),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
        )
        if done.returncode != 0:
            raise CommandFailed(f"CNI {verb} on {self.host.name}: {(done.stdout or done.stderr).strip()}")
        result: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        return result

    def _attach_by_cni(self) -> None:
        result = self.cni("ADD")
        self.addresses = [str(ip_interface(entry["address"]).ip) for entry in result["ips"]]

    def _attach_by_hand(self) -> None:
        number = 1 + len(self.host.containers)
        port, mtu, bridge = f"c{number}-{self.name}"[:15], self.configuration["mtu"], self.configuration["bridge"]
        gateways = [
            ip_interface(self.subnet_env[key])
            for key in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET")
            if key in self.subnet_env
        ]
        with contextlib.suppress(CommandFailed):  # the first container makes the bridge
            self.host.run(f"ip link add {bridge} mtu {mtu} type bridge forward_delay 0")
        veth(self.ns, "eth0", self.host.ns, port, mtu=mtu)
        lines = [f"link set {port} master {bridge}", f"link set {bridge} up"]
        lines += [f"addr replace {gateway} dev {bridge} nodad" for gateway in gateways if gateway.version == 6]
        lines += [f"addr replace {gateway} dev {bridge}" for gateway in gateways if gateway.version == 4]
        self.host.run("ip -batch -", stdin="\n".join(lines))
        for gateway in gateways:
            own = gateway.network[1 + number]
            nodad = " nodad" if gateway.version == 6 else ""
            self.ns.run(f"ip addr add {own}/{gateway.network.prefixlen} dev eth0{nodad}")
            self.ns.run(f"ip route add default via {gateway.ip}")
            self.addresses.append(str(own))

    def run(self, command: str | Sequence[str], **options: Any) -> str:
        return self.ns.run(command, **options)

    def ping(self, target: str | Container, **options: Any) -> PingResult:
        """Ping an address or another container (over IPv4). Options: see ``flanneld.lab.ping.ping``."""
        return ping(self.ns, target if isinstance(target, str) else target.address, **options)

    def ping_stream(self, target: str | Container, **options: Any) -> PingStream:
        """A ping that runs on, 100 a second, until its ``stop``."""
        return PingStream(self.ns, target if isinstance(target, str) else target.address, **options)

    def close(self) -> None:
        if self._by == "cni":
            with contextlib.suppress(CommandFailed, subprocess.TimeoutExpired):
                self.cni("DEL")
        self.ns.close()
