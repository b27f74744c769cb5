"""Links: what the kernel reports about one, and the messages that make, alter and remove one.

A vxlan device that flannel made is taken as it is. What the kernel can change on a standing device (MTU, MAC, up,
checksum offload; of vxlan also local address, underlay and learning) is changed in place, so that routes, neighbours
and forwarding entries stay; anything else means a new device.
"""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from socket import AF_INET, AF_INET6, inet_ntop
from struct import Struct
from typing import Any, Final

from backends.kernel_state import Foreign, Ipip, Link, LinkSettings, Vxlan
from flanneld.dataplane import rare
from flanneld.dataplane.rare import Attrs
from flanneld.dataplane.wire import U32, attribute, attributes, mac_text

IFINFOMSG: Final = Struct("=BBHiII")  # family, pad, hardware type, index, flags, change mask
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_TXQLEN, IFLA_LINKINFO, IFLA_EXT_MASK = 1, 3, 4, 13, 18, 29
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
RTEXT_FILTER_SKIP_STATS: Final = 8
IFF_UP, IFF_LOOPBACK = 0x1, 0x8
NESTED: Final = 0x8000

VXLAN_ID, VXLAN_GROUP, VXLAN_LINK, VXLAN_LOCAL, VXLAN_TTL, VXLAN_TOS, VXLAN_LEARNING = 1, 2, 3, 4, 5, 6, 7
VXLAN_PROXY, VXLAN_RSC, VXLAN_L2MISS, VXLAN_L3MISS, VXLAN_PORT, VXLAN_GROUP6, VXLAN_LOCAL6 = 11, 12, 13, 14, 15, 16, 17
VXLAN_CSUM6_TX, VXLAN_CSUM6_RX, VXLAN_GBP, VXLAN_METADATA = 19, 20, 23, 25
_UNKNOWN_VXLAN: Final = frozenset(
    {VXLAN_GROUP, VXLAN_PROXY, VXLAN_RSC, VXLAN_L2MISS, VXLAN_L3MISS, VXLAN_GROUP6, VXLAN_METADATA}
)
"""Set and not zero, these make a device with which our forwarding entries would not work."""

IPTUN_LINK, IPTUN_LOCAL, IPTUN_REMOTE = 1, 2, 3

SIOCETHTOOL: Final = 0x8946
ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM = 0x16, 0x17

Names = Callable[[int], str | None]
"""The name of the interface with this index, None if there is none."""


@dataclass(frozen=True, slots=True)
class RawLink:
    """A link as reported. ``data`` is the device kind's own attributes, undecoded."""

    index: int
    name: str
    flags: int
    mtu: int
    mac: str | None
    kind: str
    data: bytes

    @property
    def up(self) -> bool:
        return self.flags & IFF_UP != 0


def decode_link(data: bytes, start: int, end: int) -> RawLink:
    """The link in a message whose body is ``data[start:end]``."""
    _, _, _, index, flags, _ = IFINFOMSG.unpack_from(data, start)
    name, mtu, mac, kind, info = "", 0, None, "", b""
    for attr, begin, stop in attributes(data, start + 16, end):
        if attr == IFLA_IFNAME:
            name = data[begin:stop].rstrip(b"\0").decode(errors="replace")
        elif attr == IFLA_MTU:
            mtu = U32.unpack_from(data, begin)[0]
        elif attr == IFLA_ADDRESS and stop - begin == 6:
            mac = mac_text(data[begin:stop])
        elif attr == IFLA_LINKINFO:
            for inner, first, last in attributes(data, begin, stop):
                if inner == IFLA_INFO_KIND:
                    kind = data[first:last].rstrip(b"\0").decode(errors="replace")
                elif inner == IFLA_INFO_DATA:
                    info = data[first:last]
    return RawLink(index, name, flags, mtu, mac, kind, info)


def settings_of(link: RawLink, names: Names) -> LinkSettings:
    """The settings of a device, as far as a record can say them; else Foreign with its kind."""
    values = {kind: link.data[start:end] for kind, start, end in attributes(link.data, 0, len(link.data))}
    if link.kind == "vxlan":
        return _vxlan(values, names) or Foreign("vxlan")
    if link.kind == "ipip" and not any(values.get(IPTUN_REMOTE, b"")):
        local = values.get(IPTUN_LOCAL, b"")
        return Ipip(inet_ntop(AF_INET, local) if len(local) == 4 else "", _underlay(values.get(IPTUN_LINK), names))
    return Foreign(link.kind)


def _underlay(value: bytes | None, names: Names) -> str:
    return (names(U32.unpack(value)[0]) or "") if value else ""


def _vxlan(values: dict[int, bytes], names: Names) -> Vxlan | None:
    if VXLAN_ID not in values or any(any(values.get(kind, b"")) for kind in _UNKNOWN_VXLAN):
        return None
    if VXLAN_METADATA in values and values[VXLAN_METADATA] != b"\0":
        return None
    local = values.get(VXLAN_LOCAL) or values.get(VXLAN_LOCAL6) or b""
    return Vxlan(
        vni=U32.unpack(values[VXLAN_ID])[0],
        local=inet_ntop(AF_INET if len(local) == 4 else AF_INET6, local) if local else "",
        underlay=_underlay(values.get(VXLAN_LINK), names),
        port=int.from_bytes(values.get(VXLAN_PORT, b"\0\0"), "big"),
        learning=values.get(VXLAN_LEARNING) == b"\1",
        gbp=VXLAN_GBP in values,
    )


# --- to the kernel -------------------------------------------------------------------------------------------------


def dump_body() -> bytes:
    return IFINFOMSG.pack(0, 0, 0, 0, 0, 0) + attribute(IFLA_EXT_MASK, U32.pack(RTEXT_FILTER_SKIP_STATS))


def index_body(index: int) -> bytes:
    """Names a link by index: to delete it or to ask for it."""
    return IFINFOMSG.pack(0, 0, 0, index, 0, 0)


def create_body(link: Link, underlay: int) -> bytes:
    """A device with all its attributes, up at once."""
    settings = link.settings
    attrs: Attrs = [("IFLA_IFNAME", link.name), ("IFLA_MTU", link.mtu), ("IFLA_TXQLEN", 0)]
    if link.mac is not None:
        attrs.append(("IFLA_ADDRESS", link.mac))
    if isinstance(settings, Vxlan):
        attrs.append(_info("vxlan", _vxlan_attrs(settings, underlay)))
    elif isinstance(settings, Ipip):
        attrs.append(_info("ipip", [("IFLA_IPIP_LINK", underlay), ("IFLA_IPIP_LOCAL", settings.local)]))
    else:
        raise TypeError(f"no netlink message makes {settings!r}")
    return rare.link_body(attrs, up=link.up)


def _info(kind: str, data: Attrs) -> tuple[str, Any]:
    nested = {"attrs": [("IFLA_INFO_KIND", kind), ("IFLA_INFO_DATA", {"attrs": data})]}
    return ("IFLA_LINKINFO", nested)


def _vxlan_attrs(settings: Vxlan, underlay: int) -> Attrs:
    """What flannel sends: everything off but what is asked for, the checksum left to the kernel."""
    attrs: Attrs = [("IFLA_VXLAN_ID", settings.vni), *_vxlan_changeable(settings, underlay)]
    off = ("TTL", "TOS", "PROXY", "RSC", "L2MISS", "L3MISS", "UDP_ZERO_CSUM6_TX", "UDP_ZERO_CSUM6_RX")
    attrs += [(f"IFLA_VXLAN_{name}", 0) for name in off]
    attrs.append(("IFLA_VXLAN_PORT", settings.port))
    if settings.gbp:
        attrs.append(("IFLA_VXLAN_GBP", True))
    return attrs


def _vxlan_changeable(settings: Vxlan, underlay: int) -> Attrs:
    attrs: Attrs = [("IFLA_VXLAN_LINK", underlay)]
    if settings.local:
        attrs.append(("IFLA_VXLAN_LOCAL6" if ":" in settings.local else "IFLA_VXLAN_LOCAL", settings.local))
    return [*attrs, ("IFLA_VXLAN_LEARNING", int(settings.learning))]


def alterable(wanted: Link, standing: LinkSettings) -> bool:
    """Whether the standing device can become the wanted one in place."""
    new, old = wanted.settings, standing
    if new == old:
        return True
    if not (isinstance(new, Vxlan) and isinstance(old, Vxlan)) or not old.local:
        return False
    same_family = (":" in new.local) == (":" in old.local)
    return same_family and replace(old, local=new.local, underlay=new.underlay, learning=new.learning) == new


def settings_body(settings: Vxlan, index: int, underlay: int) -> bytes:
    """What can be changed of a standing vxlan device: local address, underlay, learning."""
    return rare.link_body([_info("vxlan", _vxlan_changeable(settings, underlay))], index)


def alter_bodies(wanted: Link, standing: Link, index: int) -> list[bytes]:
    """The RTM_NEWLINK bodies for MAC, MTU and up, as far as they differ; apart, so that a refusal says which."""
    bodies: list[bytes] = []
    if wanted.mac is not None and wanted.mac != standing.mac:
        bodies.append(rare.link_body([("IFLA_ADDRESS", wanted.mac)], index))
    if wanted.mtu != standing.mtu:
        bodies.append(rare.link_body([("IFLA_MTU", wanted.mtu)], index))
    if wanted.up != standing.up:
        bodies.append(rare.link_body([], index, up=wanted.up))
    return bodies


class Ethtool:
    """The transmit checksum offload of a device: what ``ethtool -K DEV tx-checksum-ip-generic on|off`` sets."""

    def __init__(self) -> None:
        self._sock = socket.socket(AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def close(self) -> None:
        self._sock.close()

    def tx_checksum(self, name: str) -> bool | None:
        """None where the device has no such setting or is gone."""
        try:
            return bool(self._call(name, ETHTOOL_GTXCSUM, 0))
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EOPNOTSUPP, errno.EPERM):
                return None
            raise

    def set_tx_checksum(self, name: str, on: bool) -> None:
        self._call(name, ETHTOOL_STXCSUM, int(on))

    def _call(self, name: str, command: int, value: int) -> int:
        """struct ethtool_value behind struct ifreq's pointer."""
        held = array.array("I", (command, value))
        request = struct.pack("@16sP16x", name.encode(), held.buffer_info()[0])
        fcntl.ioctl(self._sock, SIOCETHTOOL, request)
        return held[1]
