"""The delegates ``bridge`` and ``host-local`` in one, for hosts on which they are not installed.

As much of them as flannel's configuration asks for: a bridge with the gateway's address, a veth pair, addresses from
host-local's own store, routes, hairpin mode. A configuration that asks for more is not served. When the real ones
appear, they take over containers that were attached here, and the other way round: same names, same store.
"""

from __future__ import annotations

import os

from cni import jsontext
from cni.bridge import DEFAULT_NAME, random_mac
from cni.cidr import Cidr, parse
from cni.errors import INTERNAL, CniError
from cni.host_local import Store
from cni.rtnetlink import Rtnetlink, veth_peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SERVED = {
    "bridge", "cniVersion", "forceAddress", "hairpinMode", "ipMasq", "ipam", "isDefaultGateway", "isGateway", "mtu",
    "name", "prevResult", "runtimeConfig", "type",
}  # fmt: skip
_IPAM_SERVED = {"dataDir", "ranges", "routes", "type"}
_CLONE_NEWNET = 0x40000000


def serves(conf: dict[str, Any]) -> bool:
    """Whether this configuration can be served without the real plugins."""
    ipam = conf.get("ipam", {})
    return (
        (conf.get("type"), ipam.get("type")) == ("bridge", "host-local")
        and set(conf) <= _SERVED
        and set(ipam) <= _IPAM_SERVED
        and not conf.get("runtimeConfig")
        and not conf.get("ipMasq")  # masquerading is the daemon's (--ip-masq): it needs a firewall program
    )


def run(command: str, conf: dict[str, Any], environment: dict[str, str]) -> bytes:
    """What the delegate would print. CniError where it cannot be done."""
    call = Call(conf, environment)
    try:
        if command == "ADD":
            return call.add()
        if command == "DEL":
            call.delete()
        elif command == "CHECK":
            call.check()
    except OSError as error:
        raise CniError(INTERNAL, f"built-in bridge: {command}: {error}") from None
    return b""


class Call:
    """One request for one container."""

    def __init__(self, conf: dict[str, Any], environment: dict[str, str]) -> None:
        self.conf = conf
        self.container = environment.get("CNI_CONTAINERID", "")
        self.ifname = environment.get("CNI_IFNAME", "")
        self.netns = environment.get("CNI_NETNS", "")
        self.bridge = str(conf.get("bridge") or DEFAULT_NAME)
        self.mtu = int(conf.get("mtu") or 0)
        self.subnets = [parse(item["subnet"]) for group in conf["ipam"]["ranges"] for item in group]
        self.store = Store(conf["ipam"], conf["name"])

    def add(self) -> bytes:
        host = Rtnetlink()
        netns = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            bridge = self._bridge(host)
            addresses = [
                self.store.reserve(subnet, index, self.container, self.ifname)
                for index, subnet in enumerate(self.subnets)
            ]
            # Not derived from the container: after a failure that name might still be taken.
            veth = f"veth{os.urandom(4).hex()}"
            host.add_link(veth, "veth", mtu=self.mtu, data=veth_peer(self.ifname, netns, self.mtu))
            port = host.link(veth)
            if port is None:
                raise OSError(f"{veth} vanished")
            host.set_link(port.index, master=bridge, up=True)
            if self.conf.get("hairpinMode"):
                host.set_hairpin(port.index)
            mac = inside(netns, lambda: self._set_up(addresses))
            names = [
                (self.bridge, self._mac(host, self.bridge), ""),
                (veth, port.mac, ""),
                (self.ifname, mac, self.netns),
            ]
            return jsontext.dumps(self._result(addresses, names)).encode()
        except BaseException:
            self.delete()
            raise
        finally:
            os.close(netns)
            host.close()

    def _bridge(self, host: Rtnetlink) -> int:
        """The bridge, made where it is missing, up, and with the gateway's addresses; its index."""
        if host.link(self.bridge) is None:
            try:
                # A MAC that was given stays; one that the kernel chose would follow the ports.
                host.add_link(self.bridge, "bridge", mtu=self.mtu, mac=random_mac())
            except FileExistsError:
                pass  # another ADD was faster
        found = host.link(self.bridge)
        if found is None:
            raise OSError(f"{self.bridge} vanished")
        host.set_link(found.index, up=True)
        if self.conf.get("isGateway") or self.conf.get("isDefaultGateway"):
            for subnet in self.subnets:
                host.add_address(found.index, subnet.first_host)
                _enable_forwarding(subnet.family)
        return found.index

    def _set_up(self, addresses: list[Cidr]) -> str:
        """Inside the container: interface up, addresses, routes; the interface's MAC."""
        kernel = Rtnetlink()
        try:
            link = kernel.link(self.ifname)
            if link is None:
                raise OSError(f"{self.ifname} is not in {self.netns}")
            for address in addresses:
                kernel.add_address(link.index, address)
            kernel.set_link(link.index, up=True)
            for destination, gateway in self._routes():
                try:
                    kernel.add_route(link.index, destination, gateway)
                except FileExistsError:
                    pass
            return link.mac
        finally:
            kernel.close()

    def _routes(self) -> list[tuple[Cidr, Cidr]]:
        """Destinations and gateways: those of the configuration, and the default where this is the default gateway."""
        gateways = {subnet.family: subnet.first_host for subnet in self.subnets}
        routes = []
        if self.conf.get("isDefaultGateway"):
            routes += [(parse("0.0.0.0/0" if family == 4 else "::/0"), gateway) for family, gateway in gateways.items()]
        for route in self.conf["ipam"].get("routes", []):
            destination = parse(str(route["dst"])).network
            own = parse(f"{route['gw']}/{destination.prefix}") if route.get("gw") else None
            gateway = own or gateways.get(destination.family)
            if gateway is not None:
                routes.append((destination, gateway))
        return routes

    def _mac(self, kernel: Rtnetlink, name: str) -> str:
        link = kernel.link(name)
        return link.mac if link else ""

    def _result(self, addresses: list[Cidr], names: list[tuple[str, str, str]]) -> dict[str, Any]:
        version = str(self.conf.get("cniVersion") or "0.1.0")
        routes = [{"dst": str(destination), "gw": gateway.address} for destination, gateway in self._routes()]
        if version in ("0.1.0", "0.2.0"):
            old: dict[str, Any] = {"cniVersion": version, "dns": {}}
            for address in addresses:
                own = [route for route in routes if (":" in route["dst"]) == (address.family == 6)]
                entry = {"ip": str(address), "gateway": address.first_host.address, "routes": own}
                old[f"ip{address.family}"] = entry
            return old
        ips: list[dict[str, Any]] = [
            {"interface": 2, "address": str(address), "gateway": address.first_host.address} for address in addresses
        ]
        if version.startswith("0."):
            for entry, address in zip(ips, addresses, strict=True):
                entry["version"] = str(address.family)
        interfaces = [
            {"name": name, "mac": mac, **({"sandbox": sandbox} if sandbox else {})} for name, mac, sandbox in names
        ]
        return {"cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": {}}

    def delete(self) -> None:
        """Free the addresses and remove the interface; what is gone already is fine."""
        self.store.free(lambda held: (held.container, held.ifname) == (self.container, self.ifname))
        try:
            netns = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC) if self.netns else -1
        except OSError:
            return
        if netns >= 0:
            try:
                inside(netns, self._remove)
            finally:
                os.close(netns)

    def _remove(self) -> None:
        kernel = Rtnetlink()
        try:
            link = kernel.link(self.ifname)
            if link is not None:
                kernel.delete_link(link.index)
        finally:
            kernel.close()

    def check(self) -> None:
        """The addresses of prevResult are reserved, and on the container's interface."""
        wanted = [parse(entry["address"]) for entry in (self.conf.get("prevResult") or {}).get("ips", [])]
        held = {item.address for item in self.store.reservations() if item.container == self.container}
        netns = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            present = inside(netns, self._addresses)
        finally:
            os.close(netns)
        for address in wanted:
            if address.address not in held:
                raise CniError(INTERNAL, f"host-local: {address} is not reserved for {self.container}")
            if address not in present:
                raise CniError(INTERNAL, f"{address} is not on {self.ifname} in {self.netns}")

    def _addresses(self) -> list[Cidr]:
        kernel = Rtnetlink()
        try:
            link = kernel.link(self.ifname)
            return [found.cidr for found in kernel.addresses() if link is not None and found.index == link.index]
        finally:
            kernel.close()


def inside(netns: int, work: Callable[[], Any]) -> Any:
    """Do the work in another network namespace, and come back."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int) -> None:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}")

    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(netns)
        try:
            return work()
        finally:
            enter(home)
    finally:
        os.close(home)


def _enable_forwarding(family: int) -> None:
    path = "/proc/sys/net/ipv4/ip_forward" if family == 4 else "/proc/sys/net/ipv6/conf/all/forwarding"
    with open(path, "rb+") as file:
        if file.read().strip() != b"1":
            file.seek(0)
            file.write(b"1")
