"""The bytes of rtnetlink routes, neighbours, forwarding entries and addresses, to and from records.

This is the hot path (5,000 peers are 15,000 messages each way), so the bytes are packed here, without a library.
Numbers are those of include/uapi/linux/{netlink,rtnetlink,neighbour,if_addr}.h; the tests compare both directions
with pyroute2's tables. Fields of netlink's own are in host order, addresses in network order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from struct import Struct
from typing import Final, Literal

from backends.kernel_state import ROUTE_PROTOCOL, FdbEntry, InterfaceAddress, Key, Kind, Neighbour, Route, RouteLookup

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_DUMP_INTR = 0x10
NLMSG_ERROR, NLMSG_DONE = 2, 3

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

AF_BRIDGE: Final = 7
HEADER: Final = Struct("=IHHII")  # length, type, flags, sequence, port id
ATTRIBUTE: Final = Struct("=HH")  # length, type
RTMSG: Final = Struct("=8BI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
NDMSG: Final = Struct("=BBHiHBB")  # family, pad, pad, ifindex, state, flags, type
IFADDRMSG: Final = Struct("=4Bi")  # family, prefixlen, flags, scope, ifindex
U32: Final = Struct("=I")
_NEXTHOP: Final = Struct("=HxxI")  # length, flags and hops, ifindex

MAIN_TABLE: Final = 254
COMPAT_TABLE: Final = 252  # "see RTA_TABLE": the number does not fit a byte
SCOPE_LINK: Final = 253
SCOPE_NOWHERE: Final = 255
RTN_UNICAST: Final = 1
RTN_BLACKHOLE: Final = 6
RTM_F_CLONED: Final = 0x200
RTNH_F_ONLINK: Final = 4
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH, RTA_TABLE = (
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    15,
)
_ODD_ROUTE: Final = frozenset({2, RTA_METRICS, RTA_MULTIPATH, 11, 18, 21, 22, 30})
"""Source, metrics, multipath, realm, via of another family, encapsulation, nexthop object: no Route says these."""

NDA_DST, NDA_LLADDR, NDA_PORT, NDA_VNI, NDA_IFINDEX = 1, 2, 6, 7, 8
NUD_PERMANENT: Final = 0x80
NTF_SELF: Final = 2
NTF_PROXY: Final = 8
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD: Final = 2

IPV6_DEFAULT_METRIC: Final = 1024
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    size = len(payload)
    return ATTRIBUTE.pack(size + 4, kind) + payload + _PADDING[size & 3]


def attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Type, start and end of each attribute's payload; a malformed rest is ignored."""
    while start + 4 <= end:
        size, kind = ATTRIBUTE.unpack_from(data, start)
        if size < 4 or start + size > end:
            return
        yield kind & 0x3FFF, start + 4, start + size
        start += (size + 3) & ~3


def family_of(address: str) -> int:
    return AF_INET6 if ":" in address else AF_INET


def is_link_local(address: str) -> bool:
    """Whether the text is an IPv6 address in fe80::/10."""
    return address.startswith(("fe8", "fe9", "fea", "feb"))


def pack_mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_text(raw: bytes) -> str:
    return raw.hex(":")


# --- to the kernel -------------------------------------------------------------------------------------------------

_ATTR8 = Struct("=HHI")
_V4_DST_HEADER = ATTRIBUTE.pack(8, 1)  # RTA_DST, NDA_DST and IFA_ADDRESS are all 1
_V6_DST_HEADER = ATTRIBUTE.pack(20, 1)
_V4_VIA_HEADER = ATTRIBUTE.pack(8, RTA_GATEWAY)
_V6_VIA_HEADER = ATTRIBUTE.pack(20, RTA_GATEWAY)
_LLADDR_HEADER = ATTRIBUTE.pack(10, NDA_LLADDR)


def route_body(route: Route, oif: int | None, *, remove: bool = False, table: int = MAIN_TABLE) -> bytes:
    """A route, for RTM_NEWROUTE, or for RTM_DELROUTE so exactly that nothing foreign matches."""
    dst, _, length = route.dst.partition("/")
    v6 = ":" in dst
    family = AF_INET6 if v6 else AF_INET
    scope = SCOPE_LINK if route.link_scope else 0
    if remove and not v6:
        scope = SCOPE_NOWHERE  # any
    kind = RTN_BLACKHOLE if route.type == "blackhole" else RTN_UNICAST
    if route.type == "other":  # only ever removed; its type is not known here
        kind = 0
    flags = RTNH_F_ONLINK if route.onlink and not remove else 0
    number = table if table < 256 else COMPAT_TABLE
    body = RTMSG.pack(family, int(length), 0, 0, number, route.protocol, scope, kind, flags)
    body += (_V6_DST_HEADER if v6 else _V4_DST_HEADER) + inet_pton(family, dst)
    if oif is not None:
        body += _ATTR8.pack(8, RTA_OIF, oif)
    if route.via is not None:
        body += (_V6_VIA_HEADER if v6 else _V4_VIA_HEADER) + inet_pton(family, route.via)
    if route.src is not None:
        body += attribute(RTA_PREFSRC, inet_pton(family, route.src))
    metric = route.metric if route.metric is not None else (IPV6_DEFAULT_METRIC if v6 else 0)
    if metric:
        body += _ATTR8.pack(8, RTA_PRIORITY, metric)
    if table != number:
        body += _ATTR8.pack(8, RTA_TABLE, table)
    return body


def neighbour_body(neighbour: Neighbour, index: int) -> bytes:
    """A permanent ARP or ND entry."""
    family = family_of(neighbour.dst)
    return (
        NDMSG.pack(family, 0, 0, index, NUD_PERMANENT, 0, RTN_UNICAST)
        + (_V6_DST_HEADER if family == AF_INET6 else _V4_DST_HEADER)
        + inet_pton(family, neighbour.dst)
        + _LLADDR_HEADER
        + pack_mac(neighbour.mac)
        + b"\0\0"
    )


def fdb_body(entry: FdbEntry, index: int, via: int | None = None, *, remove: bool = False) -> bytes:
    """A permanent forwarding entry of the device itself. Removal leaves the destination out, which means: all of it.

    ``via`` is the index of the interface that its packets leave by.
    """
    body = NDMSG.pack(AF_BRIDGE, 0, 0, index, NUD_PERMANENT, NTF_SELF, 0)
    if not remove:
        family = family_of(entry.dst)
        body += (_V6_DST_HEADER if family == AF_INET6 else _V4_DST_HEADER) + inet_pton(family, entry.dst)
        if via is not None:
            body += _ATTR8.pack(8, NDA_IFINDEX, via)
    return body + _LLADDR_HEADER + pack_mac(entry.mac) + b"\0\0"


Found = tuple[Key, Neighbour | FdbEntry | None] | None
"""Key and record of an entry; no record where it is none of ours any more, nothing where it never can be."""


# --- from the kernel -----------------------------------------------------------------------------------------------


class RouteFilter:
    """Which main-table routes concern us: on a device of ours, or inside one of the networks (CIDRs).

    With ``marked``, also those that carry our protocol number.
    """

    def __init__(
        self, devices: frozenset[int] = frozenset(), networks: tuple[str, ...] = (), marked: bool = False
    ) -> None:
        self.devices = devices
        self._marked = marked
        parsed = [ip_network(network) for network in networks]
        self._networks: dict[int, list[tuple[int, int, int]]] = {
            int(family): [
                (int(net.network_address), net.prefixlen, net.max_prefixlen) for net in parsed if net.version == version
            ]
            for family, version in ((AF_INET, 4), (AF_INET6, 6))
        }

    def wants(self, family: int, dst: bytes, length: int, oif: int, protocol: int) -> bool:
        if self._marked and protocol == ROUTE_PROTOCOL:
            return True
        if oif in self.devices:
            # Link-local and multicast prefixes are the kernel's own, and every device has the same.
            return not (
                family == AF_INET6 and length and (dst[0] == 0xFF or (dst[0] == 0xFE and dst[1] & 0xC0 == 0x80))
            )
        networks = self._networks.get(family)
        if not networks or not dst:
            return False
        number = int.from_bytes(dst, "big")
        return any(
            length >= prefix and (number ^ network) >> (bits - prefix) == 0 for network, prefix, bits in networks
        )


def decode_route(
    data: bytes, start: int, end: int, wanted: RouteFilter | None, names: Mapping[int, str]
) -> Route | None:
    """The route in a message whose body is ``data[start:end]``; None if it is not of the main table or not wanted."""
    family, dst_len, src_len, tos, table, protocol, scope, kind, flags = RTMSG.unpack_from(data, start)
    if table != MAIN_TABLE or flags & RTM_F_CLONED or tos:
        return None
    dst = via = src = b""
    oif = metric = 0
    odd = src_len != 0
    start += 12
    while start + 4 <= end:
        size, attr = ATTRIBUTE.unpack_from(data, start)
        if size < 4:
            break
        if attr == RTA_DST:
            dst = data[start + 4 : start + size]
        elif attr == RTA_OIF:
            oif = U32.unpack_from(data, start + 4)[0]
        elif attr == RTA_GATEWAY:
            via = data[start + 4 : start + size]
        elif attr == RTA_PRIORITY:
            metric = U32.unpack_from(data, start + 4)[0]
        elif attr == RTA_PREFSRC:
            src = data[start + 4 : start + size]
        elif attr & 0x3FFF in _ODD_ROUTE:
            odd = True
        start += (size + 3) & ~3
    if wanted is not None and not wanted.wants(family, dst, dst_len, oif, protocol):
        return None
    if family == AF_INET6:
        text = inet_ntop(AF_INET6, dst) if dst else "::"
        if metric == IPV6_DEFAULT_METRIC:
            metric = 0
    else:
        text = inet_ntop(AF_INET, dst) if dst else "0.0.0.0"
    form: Literal["unicast", "blackhole", "other"] = "unicast"
    if kind != RTN_UNICAST or odd:
        form = "blackhole" if kind == RTN_BLACKHOLE and not odd else "other"
    return Route(
        f"{text}/{dst_len}",
        # IPv6 hangs blackholes on the loopback.
        names.get(oif) if oif and form != "blackhole" else None,
        inet_ntop(family, via) if via else None,
        flags & RTNH_F_ONLINK != 0,
        inet_ntop(family, src) if src else None,
        scope == SCOPE_LINK,
        protocol,
        metric or None,
        form,
    )


def as_main(body: bytes) -> bytes:
    """A route's body as if it were one of the main table: the answer to a lookup is a clone, perhaps of another's."""
    family, dst_len, src_len, _, _, protocol, scope, kind, flags = RTMSG.unpack_from(body)
    return RTMSG.pack(family, dst_len, src_len, 0, MAIN_TABLE, protocol, scope, kind, flags & ~RTM_F_CLONED) + body[12:]


def first_hop(data: bytes, start: int, end: int, names: Mapping[int, str]) -> RouteLookup | None:
    """The first way of a multipath route; None if the route has none."""
    family = data[start]
    for attr, begin, stop in attributes(data, start + 12, end):
        if attr != RTA_MULTIPATH or stop - begin < 8:
            continue
        size, index = _NEXTHOP.unpack_from(data, begin)
        via = None
        for inner, first, last in attributes(data, begin + 8, min(begin + size, stop)):
            if inner == RTA_GATEWAY:
                via = inet_ntop(family, data[first:last])
        if index in names:
            return RouteLookup(names[index], via, None)
    return None


# The order and sizes in which the kernel has always written these; anything else takes the long way.
_NEIGHBOUR4 = Struct("=BBHiHBB HH4s HH6s2x HH")  # ndmsg, NDA_DST, NDA_LLADDR, the next attribute's header
_FDB4 = Struct("=BBHiHBB HH6s2x HH4s HH")  # ndmsg, NDA_LLADDR, NDA_DST, the next attribute's header
_NDA_CACHEINFO, _NDA_PROBES = 3, 4


def decode_neighbour(data: bytes, start: int, end: int, dev: str, names: Mapping[int, str]) -> Found:
    """A neighbour or forwarding entry of the device ``dev``; ``names`` are the interfaces' by index.

    Ours are permanent; proxies, multicast and a vxlan device's default destination never can be ours.
    """
    if end - start >= _FDB4.size:
        if data[start] == AF_BRIDGE:
            _, _, _, _, state, flags, _, s1, k1, mac, s2, k2, dst, _, k3 = _FDB4.unpack_from(data, start)
            if (s1, k1, s2, k2, k3) == (10, NDA_LLADDR, 8, NDA_DST, _NDA_CACHEINFO):
                return _forwarding_entry(dev, state, flags, mac, dst)
        elif data[start] == AF_INET:
            _, _, _, _, state, flags, _, s1, k1, dst, s2, k2, mac, _, k3 = _NEIGHBOUR4.unpack_from(data, start)
            if (s1, k1, s2, k2) == (8, NDA_DST, 10, NDA_LLADDR):
                return _neighbour(dev, AF_INET, state, flags, dst, mac)
    family, _, _, _, state, flags, _ = NDMSG.unpack_from(data, start)
    dst = mac = b""
    extra, via = "", 0
    start += 12
    while start + 4 <= end:
        size, attr = ATTRIBUTE.unpack_from(data, start)
        if size < 4:
            break
        if attr == NDA_DST:
            dst = data[start + 4 : start + size]
        elif attr == NDA_LLADDR:
            mac = data[start + 4 : start + size]
        elif attr == NDA_PORT:
            extra += f" port {int.from_bytes(data[start + 4 : start + size], 'big')}"
        elif attr == NDA_VNI:
            extra += f" vni {U32.unpack_from(data, start + 4)[0]}"
        elif attr == NDA_IFINDEX:
            via = U32.unpack_from(data, start + 4)[0]
        start += (size + 3) & ~3
    if family == AF_BRIDGE:
        return _forwarding_entry(dev, state, flags, mac, dst, extra, names.get(via, str(via)) if via else None)
    return _neighbour(dev, family, state, flags, dst, mac)


def _forwarding_entry(
    dev: str, state: int, flags: int, mac: bytes, dst: bytes, extra: str = "", via: str | None = None
) -> Found:
    if not flags & NTF_SELF or len(mac) != 6 or mac[0] & 1 or mac == b"\0\0\0\0\0\0":
        return None
    text = mac.hex(":")
    key = (Kind.FDB, dev, text)
    if not state & NUD_PERMANENT or not dst:
        return key, None
    return key, FdbEntry(dev, text, inet_ntop(AF_INET if len(dst) == 4 else AF_INET6, dst) + extra, via)


def _neighbour(dev: str, family: int, state: int, flags: int, dst: bytes, mac: bytes) -> Found:
    if not dst or flags & NTF_PROXY:
        return None
    text = inet_ntop(family, dst)
    key = (Kind.NEIGHBOUR, dev, text)
    if not state & NUD_PERMANENT:
        return key, None
    return key, Neighbour(dev, text, mac.hex(":") if mac else "")


@dataclass(frozen=True, slots=True)
class SeenAddress:
    """An address as the kernel reports it, with the index of its interface."""

    index: int
    address: InterfaceAddress


def decode_address(data: bytes, start: int, end: int) -> SeenAddress | None:
    """The address in a message whose body is ``data[start:end]``; None for a family other than IP."""
    family, length, flags, scope, index = IFADDRMSG.unpack_from(data, start)
    if family not in (AF_INET, AF_INET6):
        return None
    local = peer = b""
    for kind, begin, stop in attributes(data, start + 8, end):
        if kind == IFA_LOCAL:
            local = data[begin:stop]
        elif kind == IFA_ADDRESS:
            peer = data[begin:stop]
        elif kind == IFA_FLAGS:
            flags = U32.unpack_from(data, begin)[0]
    v6 = family == AF_INET6
    return SeenAddress(
        index,
        InterfaceAddress(
            f"{inet_ntop(family, local or peer)}/{length}",
            scope=scope,
            permanent=flags & 0x80 != 0,
            temporary=v6 and flags & 0x01 != 0,
            deprecated=flags & 0x20 != 0,
            secondary=not v6 and flags & 0x01 != 0,
        ),
    )
