"""An old address on the delegate's bridge, left from another subnet, makes the delegate refuse every ADD.

On a bridge without ports nobody can be using it, so it goes, and the delegate sets the right one.
"""

from __future__ import annotations

import _socket
import os
from errno import EADDRNOTAVAIL, ENODEV
from fcntl import ioctl

from cni.errors import INTERNAL, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.cidr import Cidr
    from cni.subnet_env import SubnetEnv

DEFAULT_NAME = "cni0"
_SIOCGIFADDR = 0x8915
_LINK_LOCAL_SCOPE = "20"


def make_room(name: str, env: SubnetEnv, *, force: bool = False) -> None:
    """Remove addresses of another subnet from an empty bridge.

    CniError, in the delegate's words and with the remedy, where containers still hang on it. ``force``: the delegate
    was told to replace addresses itself (forceAddress).
    """
    if force or not _looks_stale(name, env):
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


def _looks_stale(name: str, env: SubnetEnv) -> bool:
    """The quick look that every ADD takes: is the bridge's address another than the subnet's first?"""
    if env.subnet is not None:
        address = _ipv4_address(name)
        if address is not None and address != env.subnet.first_host.packed:
            return True
    if env.ipv6_subnet is not None:
        wanted = env.ipv6_subnet.first_host.packed.hex()
        return any(address != wanted for address in _ipv6_addresses(name))
    return False


def _ipv4_address(name: str) -> bytes | None:
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC, 0)
    try:
        answer = ioctl(probe.fileno(), _SIOCGIFADDR, name.encode()[:15].ljust(40, b"\0"))
    except OSError as error:
        if error.errno in (ENODEV, EADDRNOTAVAIL):
            return None
        raise
    finally:
        probe.close()
    return bytes(answer[20:24])


def _ipv6_addresses(name: str) -> list[str]:
    try:
        with open("/proc/net/if_inet6", "rb") as file:
            rows = [line.split() for line in file.read().decode("ascii").splitlines()]
    except OSError:
        return []
    return [row[0] for row in rows if len(row) == 6 and row[5] == name and row[3] != _LINK_LOCAL_SCOPE]
