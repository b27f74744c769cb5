"""Our bytes against pyroute2's tables, both ways; and bytes that make no sense."""

from __future__ import annotations

from socket import AF_INET6, inet_ntop, inet_pton
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from backends.kernel_state import ROUTE_PROTOCOL, FdbEntry, Foreign, Ipip, Link, Neighbour, Route, Vxlan
from flanneld.dataplane import links, rare, wire
from flanneld.dataplane.netlink import NetlinkError, _error, messages

INDEX = 7
NAMES = {3: "eth1", INDEX: "flannel.1"}
v4 = st.ip_addresses(v=4).map(str)
v6 = st.ip_addresses(v=6).map(lambda address: inet_ntop(AF_INET6, address.packed))  # as the kernel would spell it
macs = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
unicast_macs = st.binary(min_size=6, max_size=6).map(lambda raw: bytes([raw[0] & 0xFE, *raw[1:5], raw[5] | 1]).hex(":"))


@st.composite
def routes(draw: st.DrawFn) -> Route:
    address, bits = draw(st.sampled_from([(v4, 32), (v6, 128)]))
    kind = draw(st.sampled_from(["unicast", "unicast", "unicast", "blackhole"]))
    return Route(
        f"{draw(address)}/{draw(st.integers(1, bits))}",
        dev=None if kind == "blackhole" else "flannel.1",
        via=None if kind == "blackhole" else draw(st.none() | address),
        onlink=draw(st.booleans()),
        src=draw(st.none() | address),
        link_scope=draw(st.booleans()),
        protocol=draw(st.integers(0, 255)),
        metric=draw(st.none() | st.integers(1, 1023) | st.integers(1025, 2**32 - 1)),
        type=kind,
    )


def parsed(kind: type[nlmsg], body: bytes) -> Any:
    """What pyroute2 reads in a message with this body."""
    message = kind(wire.HEADER.pack(16 + len(body), 0, 0, 0, 0) + body)
    message.decode()
    return message


def packed(message: Any) -> bytes:
    """The body that pyroute2 writes."""
    message.encode()
    return bytes(message.data[16:])


def attributes(message: Any) -> dict[str, Any]:
    return dict(message["attrs"])


@given(routes())
def test_pyroute2_reads_our_routes(route: Route) -> None:
    body = wire.route_body(route, INDEX if route.dev else None)
    message = parsed(rtmsg, body)
    found = attributes(message)
    address, _, length = route.dst.partition("/")
    v6_route = ":" in address
    assert (message["family"], message["dst_len"], message["table"]) == (10 if v6_route else 2, int(length), 254)
    assert message["proto"] == route.protocol and message["scope"] == (253 if route.link_scope else 0)
    assert message["type"] == (6 if route.type == "blackhole" else 1)
    assert message["flags"] == (4 if route.onlink else 0)
    assert found.get("RTA_DST") == address
    assert found.get("RTA_OIF") == (INDEX if route.dev else None)
    assert found.get("RTA_GATEWAY") == route.via and found.get("RTA_PREFSRC") == route.src
    assert found.get("RTA_PRIORITY") == (route.metric or (1024 if v6_route else None))


@given(routes())
def test_our_routes_are_pyroute2s_byte_by_byte(route: Route) -> None:
    body = wire.route_body(route, INDEX if route.dev else None)
    theirs = rtmsg()
    ours = parsed(rtmsg, body)
    for name in ("family", "dst_len", "src_len", "tos", "table", "proto", "scope", "type", "flags"):
        theirs[name] = ours[name]
    theirs["attrs"] = [(name, value) for name, value in ours["attrs"]]
    assert packed(theirs) == body


@given(routes())
def test_what_we_write_we_read(route: Route) -> None:
    body = wire.route_body(route, INDEX if route.dev else None)
    assert wire.decode_route(body, 0, len(body), None, NAMES) == route
    assert wire.decode_route(b"junk" + body, 4, 4 + len(body), None, NAMES) == route


@given(routes())
def test_a_removal_names_everything_that_tells_routes_apart(route: Route) -> None:
    message = parsed(rtmsg, wire.route_body(route, INDEX if route.dev else None, remove=True))
    found = attributes(message)
    assert message["proto"] == route.protocol
    assert found.get("RTA_OIF") == (INDEX if route.dev else None) and found.get("RTA_GATEWAY") == route.via
    assert found.get("RTA_PRIORITY") == (route.metric or (1024 if ":" in route.dst else None))


@given(st.sampled_from([v4, v6]).flatmap(lambda text: text), macs)
def test_neighbours(address: str, mac: str) -> None:
    record = Neighbour("flannel.1", address, mac)
    body = wire.neighbour_body(record, INDEX)
    theirs = ndmsg()
    for name, value in {"family": 10 if ":" in address else 2, "ifindex": INDEX, "state": 0x80, "ndm_type": 1}.items():
        theirs[name] = value
    theirs["attrs"] = [("NDA_DST", address), ("NDA_LLADDR", mac)]
    assert packed(theirs) == body
    assert wire.decode_neighbour(body, 0, len(body), "flannel.1", NAMES) == (record.key, record)
    with_cache = body + wire.attribute(3, bytes(16))
    assert wire.decode_neighbour(with_cache, 0, len(with_cache), "flannel.1", NAMES) == (record.key, record)


@given(st.sampled_from([v4, v6]).flatmap(lambda text: text), unicast_macs)
def test_forwarding_entries(address: str, mac: str) -> None:
    record = FdbEntry("flannel.1", mac, address)
    body = wire.fdb_body(record, INDEX)
    message = parsed(ndmsg, body)
    assert (message["family"], message["ifindex"], message["state"], message["flags"]) == (7, INDEX, 0x80, 2)
    assert attributes(message)["NDA_LLADDR"] == mac
    assert wire.decode_neighbour(body, 0, len(body), "flannel.1", NAMES) == (record.key, record)
    # The kernel's order, with which the short way is taken where it may be.
    family = 10 if ":" in address else 2
    kernel = body[:12] + wire.attribute(2, bytes.fromhex(mac.replace(":", "")))
    kernel += wire.attribute(1, inet_pton(family, address))
    for tail, suffix in (
        (b"", ""),
        (wire.attribute(6, b"\x12\x34"), " port 4660"),
        (wire.attribute(7, b"\1\0\0\0"), " vni 1"),
    ):
        data = kernel + tail + wire.attribute(3, bytes(16))
        found = wire.decode_neighbour(data, 0, len(data), "flannel.1", NAMES)
        assert found == (record.key, FdbEntry("flannel.1", mac, address + suffix))
    pinned = wire.fdb_body(record, INDEX, 3)
    for data, via in ((pinned, "eth1"), (wire.fdb_body(record, INDEX, 99), "99")):
        found = wire.decode_neighbour(data, 0, len(data), "flannel.1", NAMES)
        assert found == (record.key, FdbEntry("flannel.1", mac, address, via))
    assert attributes(parsed(ndmsg, pinned))["NDA_IFINDEX"] == 3
    removal = parsed(ndmsg, wire.fdb_body(record, INDEX, remove=True))
    assert "NDA_DST" not in attributes(removal) and attributes(removal)["NDA_LLADDR"] == mac


@pytest.mark.parametrize(
    ("state", "flags", "mac", "expected"),
    [
        (0x80, 2, "0a:00:00:00:00:01", "record"),
        (0xC0, 2, "0a:00:00:00:00:01", "record"),
        (0x02, 2, "0a:00:00:00:00:01", "key"),
        (0x80, 4, "0a:00:00:00:00:01", "nothing"),
        (0x80, 2, "00:00:00:00:00:00", "nothing"),
        (0x80, 2, "33:33:00:00:00:01", "nothing"),
    ],
)
def test_which_forwarding_entries_count(state: int, flags: int, mac: str, expected: str) -> None:
    body = wire.NDMSG.pack(7, 0, 0, INDEX, state, flags, 0) + wire.fdb_body(FdbEntry("x", mac, "192.0.2.1"), INDEX)[12:]
    found = wire.decode_neighbour(body, 0, len(body), "flannel.1", NAMES)
    assert (found is None, found is not None and found[1] is not None) == (expected == "nothing", expected == "record")


@given(st.sampled_from([(v4, 32), (v6, 128)]).flatmap(lambda f: st.tuples(f[0], st.integers(0, f[1]))))
def test_addresses(address: tuple[str, int]) -> None:
    text, length = address
    body = rare.address_body(f"{text}/{length}", INDEX)
    message = parsed(ifaddrmsg, body)
    assert (message["family"], message["prefixlen"], message["index"]) == (10 if ":" in text else 2, length, INDEX)
    assert attributes(message)["IFA_LOCAL"] == text == attributes(message)["IFA_ADDRESS"]
    seen = wire.decode_address(body, 0, len(body))
    assert seen is not None and (seen.index, seen.address.address) == (INDEX, f"{text}/{length}")


@given(
    st.integers(1, 2**24 - 1), st.sampled_from([v4, v6]).flatmap(lambda text: text), st.integers(1, 65535),
    st.booleans(), st.booleans(), st.integers(68, 65000), unicast_macs,
)  # fmt: skip
def test_vxlan_devices(vni: int, local: str, port: int, learning: bool, gbp: bool, mtu: int, mac: str) -> None:
    wanted = Link("flannel.1", Vxlan(vni, local, "eth0", port, learning, gbp), mtu, mac)
    body = links.create_body(wanted, 2)
    message = parsed(ifinfmsg, body)
    found = attributes(message)
    assert (found["IFLA_IFNAME"], found["IFLA_MTU"], found["IFLA_ADDRESS"], found["IFLA_TXQLEN"]) == (
        "flannel.1",
        mtu,
        mac,
        0,
    )
    info = attributes(found["IFLA_LINKINFO"])
    data = attributes(info["IFLA_INFO_DATA"])
    assert info["IFLA_INFO_KIND"] == "vxlan"
    assert (data["IFLA_VXLAN_ID"], data["IFLA_VXLAN_LINK"], data["IFLA_VXLAN_PORT"]) == (vni, 2, port)
    assert data["IFLA_VXLAN_LEARNING"] == int(learning) and ("IFLA_VXLAN_GBP" in data) == gbp
    assert data.get("IFLA_VXLAN_LOCAL6" if ":" in local else "IFLA_VXLAN_LOCAL") == local
    for flag in ("TTL", "TOS", "PROXY", "RSC", "L2MISS", "L3MISS", "UDP_ZERO_CSUM6_TX", "UDP_ZERO_CSUM6_RX"):
        assert data[f"IFLA_VXLAN_{flag}"] == 0
    raw = links.decode_link(body, 0, len(body))
    assert (raw.name, raw.mtu, raw.mac, raw.kind, raw.up) == ("flannel.1", mtu, mac, "vxlan", True)
    assert links.settings_of(raw, {2: "eth0"}.get) == wanted.settings


@pytest.mark.parametrize(("underlay", "index"), [("eth0", 2), ("", 0)])
def test_ipip_devices(underlay: str, index: int) -> None:
    wanted = Link("flannel.ipip", Ipip("192.0.2.1", underlay), 1480)
    body = links.create_body(wanted, index)
    data = attributes(attributes(attributes(parsed(ifinfmsg, body))["IFLA_LINKINFO"])["IFLA_INFO_DATA"])
    assert (data["IFLA_IPIP_LOCAL"], data["IFLA_IPIP_LINK"]) == ("192.0.2.1", index)
    raw = links.decode_link(body, 0, len(body))
    assert links.settings_of(raw, {2: "eth0"}.get) == wanted.settings


def test_devices_whose_settings_no_record_can_say() -> None:
    raw = links.RawLink(3, "flannel.1", 1, 1450, None, "bridge", b"")
    assert links.settings_of(raw, NAMES.get) == Foreign("bridge")
    for attribute in (wire.attribute(2, b"\xef\1\1\1"), wire.attribute(13, b"\1"), wire.attribute(25, b"\1")):
        data = wire.attribute(1, b"\1\0\0\0") + attribute
        raw = links.RawLink(3, "flannel.1", 1, 1450, None, "vxlan", data)
        assert links.settings_of(raw, NAMES.get) == Foreign("vxlan")


@given(st.binary(max_size=200))
def test_nonsense_raises_nothing_in_the_walk(data: bytes) -> None:
    assert list(messages(data)) is not None
    assert all(start <= end <= len(data) for _, start, end in wire.attributes(data, 0, len(data)))


def test_errors_carry_the_kernels_own_words() -> None:
    text = wire.attribute(1, b"Nexthop has invalid gateway\0")
    body = (-101).to_bytes(4, "little", signed=True) + bytes(16) + text
    error = _error(wire.HEADER.pack(16 + len(body), 2, 0x300, 1, 0) + body, 0x300)
    assert isinstance(error, NetlinkError)
    assert (error.name, str(error)) == ("ENETUNREACH", "Nexthop has invalid gateway (ENETUNREACH)")
    assert _error(wire.HEADER.pack(36, 2, 0x100, 1, 0) + bytes(20), 0x100) is None


@pytest.mark.parametrize(
    ("dst", "oif", "wanted"),
    [
        ("10.5.3.0/24", 2, True),
        ("10.5.0.0/16", 2, True),
        ("10.0.0.0/8", 2, False),
        ("10.6.0.0/24", 2, False),
        ("10.6.0.0/24", INDEX, True),
        ("fd05::/64", 2, True),
        ("fd06::/64", 2, False),
        ("fe80::/64", INDEX, False),
        ("ff00::/8", INDEX, False),
        ("fd06::/64", INDEX, True),
    ],
)
def test_which_routes_concern_us(dst: str, oif: int, wanted: bool) -> None:
    body = wire.route_body(Route(dst, "x"), oif)
    chosen = wire.RouteFilter(frozenset({INDEX}), ("10.5.0.0/16", "fd05::/32"))
    assert (wire.decode_route(body, 0, len(body), chosen, {2: "eth0", INDEX: "flannel.1"}) is not None) == wanted
    marked = wire.route_body(Route(dst, "x", protocol=ROUTE_PROTOCOL), oif)
    everywhere = wire.RouteFilter(frozenset({INDEX}), (), marked=True)
    assert wire.decode_route(marked, 0, len(marked), everywhere, {2: "eth0", INDEX: "flannel.1"}) is not None
