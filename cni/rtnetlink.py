"""As much of rtnetlink as the plugin needs: list links and addresses, remove an address."""

from __future__ import annotations

import _socket
import os
from struct import pack, unpack_from

from cni.cidr import Cidr

AF_INET, AF_INET6 = 2, 10
_NETLINK_ROUTE = 0
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_GETLINK, _RTM_DELADDR, _RTM_GETADDR = 18, 21, 22
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFLA_IFNAME, _IFLA_MASTER = 3, 10
SCOPE_LINK = 253


class Link:
    __slots__ = ("index", "master", "name")

    def __init__(self, index: int, name: str, master: int) -> None:
        self.index = index
        self.name = name
        self.master = master


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
        for body in self._request(_RTM_GETLINK, _DUMP, pack("=BxHiII", 0, 0, 0, 0, 0)):
            attributes = _attributes(body[16:])
            master = attributes.get(_IFLA_MASTER)
            found.append(
                Link(
                    unpack_from("=i", body, 4)[0],
                    attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace"),
                    unpack_from("=I", master)[0] if master else 0,
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
