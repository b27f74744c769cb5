"""wireguard: devices, peers and what is published, in every mode; keys never show."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import BackendError, Host, PeerRefused, Published
from backends.kernel_state import Address, Kind, Link, Record, Route, RouteLookup, Uplink, WireguardPeer
from backends.kernel_state import Wireguard as Settings
from backends.wireguard import Wireguard, is_key
from tests.unit.backend_values import host, lease, underlay

PRIVATE, OWN, PEER, PSK = (b64encode(bytes([n]) * 32).decode() for n in range(1, 5))
DATA = {"PublicKey": PEER, "Port": 51820}
V6_DATA = {"PublicKey": PEER, "Port": 51821}


def node(**more: Any) -> Host:
    return host(facts={"wireguard_key": PRIVATE, "wireguard_public_key": OWN}, **more)


def peer(**more: Any) -> Any:
    return lease(backend_type="wireguard", **{"data": DATA, "v6_data": V6_DATA, **more})


def nothing(network: str) -> Route:
    """Where the cluster's packets go while there is no device."""
    return Route(network, None, type="blackhole", metric=4096, protocol=241)


def test_one_family_is_one_device_with_one_route() -> None:
    assert tuple(Wireguard({}).host_state(node())) == (
        Link("flannel-wg", Settings(51820, PRIVATE), mtu=1420),
        Address("flannel-wg", "10.5.1.0/32"),
        Route("10.5.0.0/16", "flannel-wg", link_scope=True),
        nothing("10.5.0.0/16"),
    )


def test_separate_mode_has_a_device_a_family() -> None:
    assert tuple(Wireguard({"MTU": 1400}).host_state(node(v6=True))) == (
        Link("flannel-wg", Settings(51820, PRIVATE), mtu=1320),
        Link("flannel-wg-v6", Settings(51821, PRIVATE), mtu=1320),
        Address("flannel-wg", "10.5.1.0/32"),
        Route("10.5.0.0/16", "flannel-wg", link_scope=True),
        nothing("10.5.0.0/16"),
        Address("flannel-wg-v6", "fc00:0:0:1::/128"),
        Route("fc00::/48", "flannel-wg-v6"),
        nothing("fc00::/48"),
    )


WAYS = {4: RouteLookup("eth0", "192.168.1.254", None), 6: RouteLookup("eth1", "fe80::1", None)}


@pytest.mark.field_problem(34)
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("separate", {("flannel-wg", 4, 51820), ("flannel-wg-v6", 6, 51821)}),
        ("auto", {("flannel-wg", 4, 51820), ("flannel-wg", 6, 51820)}),
        ("ipv4", {("flannel-wg", 4, 51820)}),
        ("ipv6", {("flannel-wg", 6, 51820)}),
    ],
)
def test_what_the_kernel_would_send_otherwise_has_routes_of_its_own_for_each_port_and_outer_family(
    mode: str, expected: set
) -> None:
    here = node(v6=True)
    told = replace(here, underlay=replace(here.underlay, ways_out=WAYS))
    found = [r for r in Wireguard({"Mode": mode}).host_state(told) if isinstance(r, Uplink)]
    assert {(r.tunnel, r.family, r.port) for r in found} == expected
    for record in found:
        assert [r.dst for r in record.routes] == sorted(r.dst for r in record.routes)
        assert {r.src for r in record.routes} == {str(here.underlay.local[record.family])}
        (default,) = [r for r in record.routes if r.dst.endswith("/0")]
        assert (default.dev, default.via) == (WAYS[record.family].dev, WAYS[record.family].via) and default.onlink
    assert not any(isinstance(r, Uplink) for r in Wireguard({"Mode": mode}).host_state(here))


@pytest.mark.field_problem(34)
def test_the_networks_of_the_underlay_are_reached_without_a_gateway() -> None:
    here = node()
    under = replace(here.underlay, prefixes=(IPv4Network("192.168.1.0/24"), IPv6Network("2001:db8::/64")))

    def routes(way: RouteLookup | None) -> tuple[Route, ...]:
        told = replace(here, underlay=replace(under, ways_out={4: way}))
        (record,) = [r for r in Wireguard({}).host_state(told) if isinstance(r, Uplink)]
        return record.routes

    default, on_link = routes(RouteLookup("ppp0", None, None))
    assert (default.dst, default.dev, default.onlink, default.link_scope) == ("0.0.0.0/0", "ppp0", False, True)
    assert (on_link.dst, on_link.via, on_link.link_scope) == ("192.168.1.0/24", None, True)
    assert routes(None) == (on_link,)


@pytest.mark.parametrize("mode", ["auto", "ipv4", "ipv6"])
def test_the_other_modes_have_one_device_for_both_families(mode: str) -> None:
    assert tuple(Wireguard({"Mode": mode}).host_state(node(v6=True))) == (
        Link("flannel-wg", Settings(51820, PRIVATE), mtu=1420),
        Address("flannel-wg", "10.5.1.0/32"),
        Route("10.5.0.0/16", "flannel-wg", link_scope=True),
        nothing("10.5.0.0/16"),
        Address("flannel-wg", "fc00:0:0:1::/128"),
        Route("fc00::/48", "flannel-wg"),
        nothing("fc00::/48"),
    )


def test_ipv6_only() -> None:
    backend, here = Wireguard({}), node(v4=False, v6=True)
    assert [r for r in backend.host_state(here) if isinstance(r, Link)] == [
        Link("flannel-wg-v6", Settings(51821, PRIVATE), mtu=1420)
    ]
    assert backend.published(here) == Published("wireguard", None, {"PublicKey": OWN, "Port": 51821})
    (found,) = backend.peer_state(here, peer(v4=False, v6=True))
    assert (found.dev, found.endpoint) == ("flannel-wg-v6", "[2001:db8:64::3]:51821")


def test_peers_of_separate_mode() -> None:
    options = {"psk": PSK, "PersistentKeepaliveInterval": 25}
    assert Wireguard(options).peer_state(node(v6=True), peer(v6=True)) == (
        WireguardPeer("flannel-wg", PEER, "192.168.64.3:51820", ("10.5.2.0/24",), 25, PSK),
        WireguardPeer("flannel-wg-v6", PEER, "[2001:db8:64::3]:51821", ("fc00:0:0:2::/64",), 25, PSK),
    )


@pytest.mark.parametrize(
    ("mode", "own6", "peer4", "peer6", "endpoint"),
    [
        ("ipv4", "2001:4860::2", "8.8.4.4", "2001:4860::3", "8.8.4.4:51820"),
        ("ipv6", "2001:4860::2", "8.8.4.4", "2001:4860::3", "[2001:4860::3]:51821"),
        ("auto", "2001:4860::2", "8.8.4.4", "2001:4860::3", "8.8.4.4:51820"),
        ("auto", "2001:4860::2", "10.9.9.9", "2001:4860::3", "[2001:4860::3]:51821"),
        ("auto", "fd00::2", "10.9.9.9", "2001:4860::3", "10.9.9.9:51820"),
        ("auto", "2001:4860::2", "10.9.9.9", "fd00::3", "10.9.9.9:51820"),
        ("auto", "2001:4860::2", "10.9.9.9", None, "10.9.9.9:51820"),
        ("auto", "2001:4860::2", None, "2001:4860::3", "[2001:4860::3]:51821"),
    ],
)
def test_the_mode_chooses_the_address_of_the_one_device(
    mode: str, own6: str, peer4: str | None, peer6: str | None, endpoint: str
) -> None:
    here = node(v6=True, under=underlay(v6=own6))
    (found,) = Wireguard({"Mode": mode}).peer_state(here, peer(v6=True, public4=peer4, public6=peer6))
    assert (found.endpoint, found.allowed_ips) == (endpoint, ("10.5.2.0/24", "fc00:0:0:2::/64"))


def test_an_older_flannel_publishes_no_port_and_one_family() -> None:
    (found,) = Wireguard({"ListenPort": 4500}).peer_state(node(), peer(data={"PublicKey": PEER}))
    assert found.endpoint == "192.168.64.3:4500"
    shared = Wireguard({"Mode": "ipv6", "ListenPort": 4500})
    (found,) = shared.peer_state(node(v6=True), peer(v6=True, data={"publickey": PEER, "Port": 0}, v6_data=None))
    assert found.endpoint == "[2001:db8:64::3]:4500"


def test_published_data_has_flannel_s_keys_in_flannel_s_order() -> None:
    assert repr(Wireguard({}).published(node(v6=True, leased=False))) == repr(
        Published("wireguard", {"PublicKey": OWN, "Port": 51820}, {"PublicKey": OWN, "Port": 51821})
    )
    assert Wireguard({"Mode": "auto"}).published(node(v6=True)).v6_data == {"PublicKey": OWN, "Port": 51820}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "PublicKey None"),
        ("text", "PublicKey None"),
        ({"PublicKey": PEER[:-2]}, "not a WireGuard key"),
        ({"PublicKey": 7}, "PublicKey 7"),
        ({"PublicKey": PEER, "Port": 70000}, "Port 70000"),
        ({"PublicKey": PEER, "Port": True}, "Port True"),
        ({"PublicKey": OWN}, "cloned machine"),
    ],
)
def test_a_peer_that_publishes_nonsense_is_refused_by_name(data: Any, words: str) -> None:
    with pytest.raises(PeerRefused, match=r"10\.5\.2\.0/24") as refusal:
        Wireguard({}).peer_state(node(), peer(data=data))
    assert words in str(refusal.value)


def test_a_family_that_publishes_nonsense_does_not_take_the_other_with_it() -> None:
    with pytest.raises(PeerRefused, match="PublicKey 7") as refusal:
        Wireguard({}).peer_state(node(v6=True), peer(v6=True, v6_data={"PublicKey": 7}))
    (record,) = refusal.value.records
    assert record.key == (Kind.TUNNEL_PEER, "flannel-wg", PEER)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ListenPort": 0}, "ListenPort 0"),
        ({"ListenPortV6": 65536}, "ListenPortV6 65536"),
        ({"Mode": "Both"}, 'Mode "Both"'),
        ({"PersistentKeepaliveInterval": "25"}, 'PersistentKeepaliveInterval "25"'),
        ({"PSK": "short"}, "wg genpsk"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=r"^wireguard backend: ") as error:
        Wireguard(options)
    assert words in str(error.value)


def test_a_wrong_psk_is_not_repeated_in_the_message() -> None:
    with pytest.raises(BackendError) as error:
        Wireguard({"PSK": PSK[:-3] + "!="})
    assert PSK[:20] not in str(error.value)


def test_an_mtu_too_small_for_ipv6_is_refused_with_the_number_that_would_do() -> None:
    assert Wireguard({}).mtu(underlay(mtu=1360), (4, 6)) == 1280
    assert Wireguard({}).mtu(underlay(mtu=1300), (4,)) == 1220
    with pytest.raises(BackendError, match=r"1359 leaves 1279.*to 1360"):
        Wireguard({}).mtu(underlay(mtu=1359), (4, 6))


def test_a_mode_without_its_address_is_refused() -> None:
    with pytest.raises(BackendError, match="Mode ipv6 needs an IPv6 address on eth0"):
        Wireguard({"Mode": "ipv6"}).published(node())


def test_unknown_options_are_reported() -> None:
    assert Wireguard({"Keepalive": 1}).unknown_options == ("Keepalive",)


@given(st.lists(st.sampled_from(["v4", "v6"]), min_size=1, unique=True), st.sampled_from(["separate", "auto"]))
def test_no_record_ever_shows_a_secret(families: list[str], mode: str) -> None:
    backend = Wireguard({"PSK": PSK, "Mode": mode})
    v4, v6 = "v4" in families, "v6" in families
    here = node(v4=v4, v6=v6)
    records: list[Record] = [*backend.host_state(here), *backend.peer_state(here, peer(v4=v4, v6=v6))]
    shown = repr((records, here, backend.options, backend.published(here)))
    assert PRIVATE not in shown
    assert PSK not in shown
    assert len(records) == len({record.key for record in records})


@given(st.binary(min_size=0, max_size=40))
def test_a_key_is_32_bytes_in_their_one_spelling(raw: bytes) -> None:
    text = b64encode(raw).decode()
    assert is_key(text) == (len(raw) == 32)
    assert not is_key(text + "\n")
    assert not is_key(re.sub("=$", "", text) + "==") or len(raw) != 32
