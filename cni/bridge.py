"""Two states of the delegate's bridge in which it refuses every ADD, put right before it is asked.

An address left from another subnet: on a bridge without ports nobody can be using it, so it goes, and the delegate
sets the right one. A MAC of zeros, which a bridge has whose last port left before the delegate came to fixing its MAC
(its first ADD failed half-way): the delegate would write the zeros back, and the kernel refuses them.
"""

from __future__ import annotations

import _socket
import os
import sys
from errno import EADDRNOTAVAIL, ENODEV
from fcntl import ioctl

from cni.errors import INTERNAL, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.cidr import Cidr
    from cni.subnet_env import SubnetEnv

DEFAULT_NAME = "cni0"
_SIOCGIFADDR, _SIOCGIFHWADDR, _SIOCSIFHWADDR = 0x8915, 0x8927, 0x8924
_ARPHRD_ETHER = 1
_LINK_LOCAL_SCOPE = "20"


def make_room(name: str, env: SubnetEnv, *, force: bool = False) -> None:
    """Remove addresses of another subnet from an empty bridge.

    CniError, in the delegate's words and with the remedy, where containers still hang on it. ``force``: the delegate
    was told to replace addresses itself (forceAddress).
    """
    if not _has_mac(name) or force or not _looks_stale(name, env):
        return
    from cni.rtnetlink import SCOPE_LINK, Rtnetlink

    kernel = Rtnetlink()
    try:
        links = kernel.links()
        bridge = next((link for link in links if link.name == name), None)
        if bridge is None:
            return
        wanted = [subnet.first_host for subnet in env.subnets]
        families = {gateway.family for gateway in wanted}
        stale = [
            address.cidr
            for address in kernel.addresses()
            if address.index == bridge.index
            and address.scope != SCOPE_LINK
            and address.cidr.family in families
            and address.cidr not in wanted
        ]
        ports = [link.name for link in links if link.master == bridge.index]
        if stale and ports:
            _refuse(name, stale, ports, wanted)
        for cidr in stale:
            try:
                kernel.delete_address(bridge.index, cidr)
                os.write(2, f"flannel: removed {cidr}, of another subnet, from the empty bridge {name}\n".encode())
            except OSError as error:
                if error.errno != EADDRNOTAVAIL:  # another ADD was faster
                    raise
    finally:
        kernel.close()


def _refuse(name: str, stale: list[Cidr], ports: list[str], wanted: list[Cidr]) -> None:
    raise CniError(
        INTERNAL,
        f'"{name}" already has an IP address different from {", ".join(map(str, wanted))}',
        f"it has {', '.join(map(str, stale))}, and {len(ports)} containers of that subnet are attached "
        f"({', '.join(ports[:5])}); stop them (Kubernetes: drain the node), then the next one gets the new subnet",
    )


def _has_mac(name: str) -> bool:
    """Whether there is such a bridge; one without a MAC gets one, random and locally administered."""
    found = _interface_ioctl(_SIOCGIFHWADDR, name)
    if found is None:
        return False
    if found[18:24] == bytes(6):
        _interface_ioctl(_SIOCSIFHWADDR, name, _ARPHRD_ETHER.to_bytes(2, sys.byteorder) + random_mac())
    return True


def random_mac() -> bytes:
    """A locally administered unicast address."""
    drawn = os.urandom(6)
    return bytes([drawn[0] & 0xFE | 0x02]) + drawn[1:]


def _looks_stale(name: str, env: SubnetEnv) -> bool:
    """The quick look that every ADD takes: is the bridge's address another than the subnet's first?"""
    if env.subnet is not None:
        answer = _interface_ioctl(_SIOCGIFADDR, name)
        if answer is not None and answer[20:24] != env.subnet.first_host.packed:
            return True
    if env.ipv6_subnet is not None:
        wanted = env.ipv6_subnet.first_host.packed.hex()
        return any(address != wanted for address in _ipv6_addresses(name))
    return False


def _interface_ioctl(request: int, name: str, value: bytes = b"") -> bytes | None:
    """struct ifreq back, see netdevice(7); None where there is no such interface, or nothing to tell."""
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC, 0)
    try:
        return ioctl(probe.fileno(), request, name.encode()[:15].ljust(16, b"\0") + value.ljust(24, b"\0"))
    except OSError as error:
        if error.errno in (ENODEV, EADDRNOTAVAIL):
            return None
        raise
    finally:
        probe.close()


def _ipv6_addresses(name: str) -> list[str]:
    try:
        with open("/proc/net/if_inet6", "rb") as file:
            rows = [line.split() for line in file.read().decode("ascii").splitlines()]
    except OSError:
        return []
    return [row[0] for row in rows if len(row) == 6 and row[5] == name and row[3] != _LINK_LOCAL_SCOPE]
