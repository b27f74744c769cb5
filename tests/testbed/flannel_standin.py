"""What flanneld v0.28 leaves on a host and in etcd, made by commands: a stand-in, since flanneld itself is not here.

It is written from flannel's sources: the device and peers of pkg/backend/vxlan (device.go, vxlan_network.go), the rules
of pkg/trafficmngr/iptables, the lease of pkg/subnet/etcd (local_manager.go, registry.go) and subnet.env of
pkg/subnet/subnet.go. It neither watches nor repairs; it shows what a takeover finds and what a hand-back must offer.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

from flanneld.lab.etcd import Etcd
from flanneld.lab.hosts import PREFIX, Host, sysctl

NETWORK = IPv4Network("10.5.0.0/16")
LEASE_SECONDS = 24 * 3600
_SUBNET_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f\d:]+)-(\d+))?$")
"""flannel's (pkg/subnet/config.go)."""


@dataclass(frozen=True)
class Node:
    """One node as flannel knows it."""

    subnet: IPv4Network
    public_ip: str
    mac: str = ""
    """Of its VTEP; "" for host-gw."""

    @property
    def base(self) -> str:
        return str(self.subnet.network_address)

    @property
    def key(self) -> str:
        return f"{PREFIX}/subnets/{str(self.subnet).replace('/', '-')}"

    @property
    def value(self) -> str:
        """LeaseAttrs as Go's encoding/json writes them: this order, no spaces."""
        data = f',"BackendData":{{"VNI":1,"VtepMAC":"{self.mac}"}}' if self.mac else ""
        backend = "vxlan" if self.mac else "host-gw"
        return f'{{"PublicIP":"{self.public_ip}","PublicIPv6":null,"BackendType":"{backend}"{data}}}'


def subnet_env(node: Node, mtu: int = 1450, ip_masq: bool = True) -> str:
    """subnet.env as WriteSubnetFile writes it."""
    first = node.subnet.network_address + 1
    return (
        f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET={first}/{node.subnet.prefixlen}\n"
        f"FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={'true' if ip_masq else 'false'}\n"
    )


def rules(node: Node) -> str:
    """What ``flanneld --ip-masq`` has in iptables, as iptables-restore input."""
    masq, forward = '-m comment --comment "flanneld masq"', '-m comment --comment "flanneld forward"'
    pods, cluster = node.subnet, NETWORK
    return f"""*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING {masq} -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN
-A FLANNEL-POSTRTG -s {pods} -d {cluster} {masq} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} -d {pods} {masq} -j RETURN
-A FLANNEL-POSTRTG ! -s {cluster} -d {pods} {masq} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} ! -d 224.0.0.0/4 {masq} -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {cluster} -d {cluster} {masq} -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD {forward} -j FLANNEL-FWD
-A FLANNEL-FWD -s {cluster} {forward} -j ACCEPT
-A FLANNEL-FWD -d {cluster} {forward} -j ACCEPT
COMMIT
"""


class StandIn:
    """A host on which a flanneld with ``--ip-masq`` has run; a container can be attached to it like to a daemon."""

    def __init__(self, host: Host, node: Node) -> None:
        self.host = host
        self.node = node
        self.subnet_file = host.directory / "flannel" / "subnet.env"

    def start(self, peers: list[Node]) -> None:
        """Claim the lease, make the device, the peers, the rules and subnet.env, in flannel's order."""
        self.claim(self.host.lab.etcd)
        if self.node.mac:
            self.make_device()
        self.host.run("iptables-restore --noflush", stdin=rules(self.node))
        for peer in peers:
            self.add_peer(peer)
        self.subnet_file.parent.mkdir(mode=0o755, exist_ok=True)
        self.subnet_file.write_text(subnet_env(self.node, 1450 if self.node.mac else 1500))

    def claim(self, etcd: Etcd) -> None:
        """flannel's acquireLeaseOnce: the lease with our public IP is written anew, on a new etcd lease of 24 h."""
        granted = etcd.ctl("lease", "grant", str(LEASE_SECONDS)).split()[1]
        etcd.ctl("put", f"--lease={granted}", self.node.key, self.node.value)

    def make_device(self) -> None:
        node = self.node
        self.host.run(
            f"ip link add flannel.1 address {node.mac} mtu 1450 txqueuelen 0 type vxlan id 1 dev eth0"
            f" local {node.public_ip} dstport 8472 nolearning ttl 0 tos 0"
        )
        sysctl(self.host.ns, {"net/ipv6/conf/flannel.1/accept_ra": "0"})
        self.host.run(f"ip addr add {node.base}/32 dev flannel.1")
        self.host.run("ip link set flannel.1 up")

    def add_peer(self, peer: Node) -> None:
        if not peer.mac:
            self.host.run(f"ip route replace {peer.subnet} via {peer.public_ip} dev eth0")
            return
        self.host.run(f"ip neigh replace {peer.base} lladdr {peer.mac} dev flannel.1 nud permanent")
        self.host.run(f"bridge fdb replace {peer.mac} dev flannel.1 dst {peer.public_ip} self permanent")
        self.host.run(f"ip route replace {peer.subnet} via {peer.base} dev flannel.1 onlink")

    # What a container of the lab asks of a daemon.

    def subnet_env(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.subnet_file.read_text().splitlines())

    def output(self) -> str:
        return f"{self.subnet_file} was not written"


def read_leases(etcd: Etcd) -> list[Node]:
    """Every lease as flannel's getSubnets reads it: keys by its pattern, values into its struct, the rest ignored."""
    answer = json.loads(
        etcd.ctl("get", "--prefix", f"{PREFIX}/subnets", "--order=ASCEND", "--sort-by=KEY", "-w", "json")
    )
    nodes = []
    for key, value in _key_values(answer):
        match = _SUBNET_KEY.search(key)
        assert match is not None, f"flannel could not read the key {key}"
        attrs = json.loads(value)
        assert attrs["PublicIPv6"] is None
        assert attrs["BackendType"] == "vxlan"
        data = attrs["BackendData"]
        assert data["VNI"] == 1
        nodes.append(Node(IPv4Network(f"{match[1]}/{match[2]}"), attrs["PublicIP"], data["VtepMAC"]))
    return nodes


def _key_values(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(b64decode(kv["key"]).decode(), b64decode(kv["value"]).decode()) for kv in answer["kvs"]]
