"""As much of rtnetlink as the plugin needs: links, addresses and routes."""

from __future__ import annotations

import _socket
import os
from struct import pack, unpack_from

from cni.cidr import Cidr

AF_INET, AF_INET6 = 2, 10
_NETLINK_ROUTE = 0
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR, _RTM_NEWROUTE = 20, 21, 22, 24
_REQUEST, _ACK, _DUMP, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_IFA_ADDRESS, _IFA_LOCAL, _IFA_F_NODAD = 1, 2, 0x02
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_PROTINFO, _IFLA_LINKINFO = 1, 3, 4, 10, 12, 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_NET_NS_FD, _VETH_INFO_PEER, _BRPORT_MODE = 1, 2, 28, 1, 4
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_RT_TABLE_MAIN, _RTPROT_BOOT, _RTN_UNICAST = 254, 3, 1
_IFF_UP, _AF_BRIDGE, _NESTED = 0x1, 7, 0x8000
SCOPE_LINK = 253


class Link:
    __slots__ = ("index", "mac", "master", "name")

    def __init__(self, index: int, name: str, master: int, mac: str) -> None:
        self.index = index
        self.name = name
        self.master = master
        self.mac = mac


class InterfaceAddress:
    __slots__ = ("cidr", "index", "scope")

    def __init__(self, index: int, cidr: Cidr, scope: int) -> None:
        self.index = index
        self.cidr = cidr
        self.scope = scope


class Rtnetlink:
    """One conversation with the kernel, in the network namespace of this process. OSError carries its answer."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def links(self) -> list[Link]:
        found = []
        for body in self._request(_RTM_GETLINK, _DUMP, _link_header()):
            attributes = _attributes(body[16:])
            master = attributes.get(_IFLA_MASTER)
            found.append(
                Link(
                    unpack_from("=i", body, 4)[0],
                    attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace"),
                    unpack_from("=I", master)[0] if master else 0,
                    attributes.get(_IFLA_ADDRESS, b"").hex(":"),
                )
            )
        return found

    def addresses(self) -> list[InterfaceAddress]:
        found = []
        for body in self._request(_RTM_GETADDR, _DUMP, pack("=BBBBI", 0, 0, 0, 0, 0)):
            family, prefix, _, scope, index = unpack_from("=BBBBI", body)
            attributes = _attributes(body[8:])
            packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            if packed and family in (AF_INET, AF_INET6):
                found.append(InterfaceAddress(index, Cidr(packed, prefix), scope))
        return found

    def link(self, name: str) -> Link | None:
        """The link of this name; None where there is none."""
        return next((link for link in self.links() if link.name == name), None)

    def add_link(self, name: str, kind: str, *, mtu: int = 0, mac: bytes = b"", data: bytes = b"") -> None:
        """Make a link; ``data`` are the kind's own attributes. FileExistsError where the name is taken."""
        body = _link_header() + attribute(_IFLA_IFNAME, name.encode() + b"\0")
        body += attribute(_IFLA_ADDRESS, mac) if mac else b""
        body += attribute(_IFLA_MTU, pack("=I", mtu)) if mtu else b""
        info = attribute(_IFLA_INFO_KIND, kind.encode()) + (attribute(_IFLA_INFO_DATA, data) if data else b"")
        self._request(_RTM_NEWLINK, _ACK | _CREATE | _EXCLUSIVE, body + attribute(_IFLA_LINKINFO, info))

    def set_link(self, index: int, *, up: bool = False, master: int = 0, mtu: int = 0) -> None:
        flags = _IFF_UP if up else 0
        body = pack("=BxHiII", 0, 0, index, flags, flags)
        body += attribute(_IFLA_MASTER, pack("=I", master)) if master else b""
        body += attribute(_IFLA_MTU, pack("=I", mtu)) if mtu else b""
        self._request(_RTM_NEWLINK, _ACK, body)

    def set_hairpin(self, index: int) -> None:
        """Let a bridge port send packets back where they came from: a container that calls its own service."""
        body = pack("=BxHiII", _AF_BRIDGE, 0, index, 0, 0)
        self._request(_RTM_SETLINK, _ACK, body + attribute(_IFLA_PROTINFO | _NESTED, attribute(_BRPORT_MODE, b"\1")))

    def delete_link(self, index: int) -> None:
        self._request(_RTM_DELLINK, _ACK, pack("=BxHiII", 0, 0, index, 0, 0))

    def add_address(self, index: int, cidr: Cidr) -> None:
        """Give the link the address; nothing happens if it has it. IPv6 addresses may be used at once."""
        family = AF_INET if cidr.family == 4 else AF_INET6
        body = pack("=BBBBI", family, cidr.prefix, _IFA_F_NODAD if cidr.family == 6 else 0, 0, index)
        body += attribute(_IFA_LOCAL, cidr.packed) + attribute(_IFA_ADDRESS, cidr.packed)
        try:
            self._request(_RTM_NEWADDR, _ACK | _CREATE | _EXCLUSIVE, body)
        except FileExistsError:
            pass

    def add_route(self, index: int, destination: Cidr, gateway: Cidr) -> None:
        """Route the destination through the gateway; FileExistsError where there is such a route."""
        family = AF_INET if destination.family == 4 else AF_INET6
        body = pack("=BBBBBBBBI", family, destination.prefix, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, 0, _RTN_UNICAST, 0)
        body += attribute(_RTA_DST, destination.packed) if destination.prefix else b""
        body += attribute(_RTA_GATEWAY, gateway.packed) + attribute(_RTA_OIF, pack("=I", index))
        self._request(_RTM_NEWROUTE, _ACK | _CREATE | _EXCLUSIVE, body)

    def delete_address(self, index: int, cidr: Cidr) -> None:
        family = AF_INET if cidr.family == 4 else AF_INET6
        body = pack("=BBBBI", family, cidr.prefix, 0, 0, index)
        body += pack("=HH", 4 + len(cidr.packed), _IFA_LOCAL) + cidr.packed
        self._request(_RTM_DELADDR, _ACK, body)

    def _request(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Send one message; the bodies that came back."""
        self._sequence += 1
        self._socket.sendall(pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, self._sequence, 0) + body)
        bodies: list[bytes] = []
        while True:
            data = self._socket.recv(1 << 18)
            at = 0
            while at < len(data):
                length, answer, _, sequence, _ = unpack_from("=IHHII", data, at)
                part = data[at + 16 : at + length]
                at += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if answer == _NLMSG_DONE:
                    return bodies
                if answer == _NLMSG_ERROR:
                    code = -unpack_from("=i", part)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return bodies
                bodies.append(part)


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def veth_peer(name: str, netns: int, mtu: int) -> bytes:
    """For ``add_link``: the other end of a veth pair, to be made in the namespace of the open file ``netns``."""
    body = (
        _link_header() + attribute(_IFLA_IFNAME, name.encode() + b"\0") + attribute(_IFLA_NET_NS_FD, pack("=I", netns))
    )
    return attribute(_VETH_INFO_PEER, body + (attribute(_IFLA_MTU, pack("=I", mtu)) if mtu else b""))


def _link_header() -> bytes:
    return pack("=BxHiII", 0, 0, 0, 0, 0)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = unpack_from("=HH", data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found
