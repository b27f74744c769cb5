"""Choice of the interface and addresses that carry the tunnels."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest

from backends.kernel_state import Interface, InterfaceAddress, RouteLookup
from flanneld.identity import node_identity
from flanneld.underlay import Choice, UnderlayError, View, choose_underlay


def interface(name, *addresses, up=True, loopback=False, mtu=1500, kind=None):
    shaped = tuple(a if isinstance(a, InterfaceAddress) else InterfaceAddress(a) for a in addresses)
    return Interface(name, 1, mtu, up, "02:00:00:00:00:01", kind, loopback, shaped)


LO = interface("lo", "127.0.0.1/8", loopback=True)
ETH0 = interface("eth0", "10.0.2.15/24", "fe80::1/64")
ETH1 = interface("eth1", "192.168.56.10/24", "fd00::10/64", mtu=9000)
V4 = (4,)


def test_the_default_routes_interface_is_the_default():
    view = View((LO, ETH0, ETH1), {4: (RouteLookup("eth0", "10.0.2.2", None),)})
    chosen = choose_underlay(view, Choice(V4))
    assert (chosen.name, chosen.local[4], chosen.public[4]) == ("eth0", IPv4Address("10.0.2.15"), chosen.local[4])
    assert chosen.prefixes == (IPv4Network("10.0.2.0/24"),)


@pytest.mark.parametrize("iface", ["eth1", "192.168.56.10"])
def test_iface_by_name_or_address(iface):
    view = View((LO, ETH0, ETH1), {4: (RouteLookup("eth0", "10.0.2.2", None),)})
    chosen = choose_underlay(view, Choice(V4, iface=(iface,)))
    assert (chosen.name, chosen.mtu, chosen.local[4]) == ("eth1", 9000, IPv4Address("192.168.56.10"))


ROUTED = interface("lo", "127.0.0.1/8", "10.9.9.7/32", "::1/128", "2001:db8::7/128", loopback=True, mtu=65536)


@pytest.mark.parametrize("iface", ["lo", "10.9.9.7", "2001:db8::7"])
def test_loopback_is_taken_when_it_is_named_with_its_global_addresses_and_the_mtu_of_the_way_out(iface):
    """Routed hosts: the address that BGP announces stands on loopback."""
    ways = (RouteLookup("eth1", "192.168.56.1", None), RouteLookup("eth0", "10.0.2.2", None))
    narrow = interface("eth2", "172.16.0.1/24", mtu=1280)
    chosen = choose_underlay(View((ROUTED, ETH0, ETH1, narrow), {4: ways}), Choice((4, 6), iface=(iface,)))
    assert (chosen.name, chosen.mtu, chosen.prefixes) == ("lo", 9000, ())
    assert chosen.loopback
    assert chosen.local == {4: IPv4Address("10.9.9.7"), 6: IPv6Address("2001:db8::7")}
    cut_off = choose_underlay(View((ROUTED, ETH0, ETH1)), Choice(V4, iface=(iface,)))
    assert (cut_off.mtu, cut_off.pinned) == (1500, set())


def test_loopback_is_not_found_by_chance():
    view = View((ROUTED, ETH0), {4: (RouteLookup("eth0", "10.0.2.2", None),)})
    assert choose_underlay(view, Choice(V4)).name == "eth0"
    assert not choose_underlay(view, Choice(V4)).loopback
    assert choose_underlay(view, Choice(V4, iface_regex=(".*",))).name == "eth0"
    twice = interface("eth1", "10.9.9.7/24")
    assert choose_underlay(View((ROUTED, twice)), Choice(V4, iface=("10.9.9.7",))).name == "eth1"
    bare = interface("lo", "127.0.0.1/8", loopback=True)
    assert choose_underlay(View((bare, ETH0)), Choice(V4, iface=("lo",))).local[4] == IPv4Address("127.0.0.1")


def test_loopbacks_mac_is_no_mark_of_a_node():
    lo = Interface("lo", 1, 65536, True, "00:00:00:00:00:00", None, True, ROUTED.addresses)
    chosen = choose_underlay(View((lo, ETH0)), Choice(V4, iface=("lo",)))
    assert node_identity("a", (lo, ETH0), chosen).mac == ""


def test_the_first_iface_that_exists_wins():
    view = View((ETH0, ETH1))
    assert choose_underlay(view, Choice(V4, iface=("eth9", "eth1", "eth0"))).name == "eth1"


def test_iface_regex_matches_addresses_before_names_and_in_the_order_given():
    odd = interface("net192", "172.16.0.1/24")
    view = View((odd, ETH0, ETH1))
    assert choose_underlay(view, Choice(V4, iface_regex=("192",))).name == "eth1"
    assert choose_underlay(view, Choice(V4, iface_regex=("nothing", "^eth0$", "192"))).name == "eth0"


def test_iface_regex_is_written_as_for_go():
    assert choose_underlay(View((ETH0, ETH1)), Choice(V4, iface_regex=(r"^eth[[:digit:]]+\z",))).name == "eth0"


def test_can_reach_takes_the_kernels_answer_and_source():
    two = interface("eth1", "192.168.56.10/24", "192.168.57.10/24")
    view = View((ETH0, two), reach=RouteLookup("eth1", None, "192.168.57.10"))
    chosen = choose_underlay(view, Choice(V4, can_reach="192.168.57.1"))
    assert (chosen.name, chosen.local[4]) == ("eth1", IPv4Address("192.168.57.10"))


def test_can_reach_nothing_says_so():
    with pytest.raises(UnderlayError, match="no route to it"):
        choose_underlay(View((ETH0,)), Choice(V4, can_reach="198.51.100.1"))


@pytest.mark.field_problem(21)
def test_a_public_address_that_is_not_local_is_published_and_never_bound():
    view = View((ETH0,), {4: (RouteLookup("eth0", "10.0.2.2", None),)})
    chosen = choose_underlay(view, Choice(V4, public={4: IPv4Address("203.0.113.7")}))
    assert chosen.local[4] == IPv4Address("10.0.2.15")
    assert chosen.public[4] == IPv4Address("203.0.113.7")


def test_a_public_address_that_is_local_chooses_its_interface():
    view = View((ETH0, ETH1), {4: (RouteLookup("eth0", "10.0.2.2", None),)})
    chosen = choose_underlay(view, Choice(V4, public={4: IPv4Address("192.168.56.10")}))
    assert (chosen.name, chosen.local[4]) == ("eth1", IPv4Address("192.168.56.10"))


@pytest.mark.field_problem(37)
def test_without_a_default_route_the_only_candidate_is_taken():
    bridge = interface("cni0", "10.5.1.1/24", kind="bridge")
    tunnel = interface("flannel.1", "10.5.1.0/32", kind="vxlan")
    assert choose_underlay(View((LO, bridge, tunnel, ETH1)), Choice(V4)).name == "eth1"


def test_the_error_lists_every_interface_and_why_it_was_passed_over():
    down = interface("eth2", "10.9.9.9/24", up=False)
    with pytest.raises(UnderlayError) as caught:
        choose_underlay(View((LO, ETH0, ETH1, down)), Choice(V4))
    text = str(caught.value)
    assert "more than one interface could carry the tunnels" in text
    assert "lo (127.0.0.1/8): loopback" in text
    assert "eth2 (10.9.9.9/24): down" in text
    assert "usable with --iface=eth0" in text


def test_no_match_names_what_was_asked_for():
    with pytest.raises(UnderlayError, match=r"no interface matches --iface=eth7, --iface-regex=\^x"):
        choose_underlay(View((ETH0,)), Choice(V4, iface=("eth7",), iface_regex=("^x",)))


def test_a_missing_family_is_an_error_that_names_it():
    view = View((ETH0,), {4: (RouteLookup("eth0", "10.0.2.2", None),)})
    with pytest.raises(UnderlayError, match=r"interface eth0 has no usable IPv6 address|no IPv6 address") as caught:
        choose_underlay(View((interface("eth0", "10.0.2.15/24"),), view.default), Choice((4, 6)))
    assert "EnableIPv6" in str(caught.value)


def test_dual_stack_with_two_uplinks_takes_the_one_that_has_both():
    default = {4: (RouteLookup("eth0", "10.0.2.2", None),), 6: (RouteLookup("eth1", "fd00::1", None),)}
    only4 = interface("eth0", "10.0.2.15/24")
    chosen = choose_underlay(View((only4, ETH1), default), Choice((4, 6)))
    assert (chosen.name, chosen.local[6]) == ("eth1", IPv6Address("fd00::10"))


def test_global_before_link_local_permanent_before_temporary_and_never_deprecated():
    crowded = interface(
        "eth0",
        InterfaceAddress("fe80::1/64", scope=253),
        InterfaceAddress("2001:db8::dead/64", deprecated=True),
        InterfaceAddress("2001:db8::1:2/64", permanent=False, temporary=True),
        InterfaceAddress("2001:db8::5/64"),
    )
    view = View((crowded,), {6: (RouteLookup("eth0", "fe80::9", None),)})
    assert choose_underlay(view, Choice((6,))).local[6] == IPv6Address("2001:db8::5")


def test_a_default_route_that_moves_does_not_move_the_tunnels_while_their_interface_serves():
    view = View((ETH0, ETH1), {4: (RouteLookup("eth1", "192.168.56.1", None),)})
    assert choose_underlay(view, Choice(V4, current="eth0")).name == "eth0"
    down = interface("eth0", "10.0.2.15/24", up=False)
    assert choose_underlay(View((down, ETH1), view.default), Choice(V4, current="eth0")).name == "eth1"
    assert choose_underlay(view, Choice(V4, iface=("eth1",), current="eth0")).name == "eth1"


@pytest.mark.field_problem(34)
def test_packets_are_pinned_to_an_interface_whose_default_route_is_not_the_one_in_use():
    first, second = RouteLookup("eth0", "10.0.2.2", None), RouteLookup("eth1", "192.168.56.1", None)
    both = View((ETH0, ETH1), {4: (first, second)})
    assert choose_underlay(both, Choice(V4, iface=("eth1",))).pinned == {4}
    assert choose_underlay(both, Choice(V4)).pinned == set()
    # Without a way out of its own, the interface would lose what the routing table still brings there.
    assert choose_underlay(View((ETH0, ETH1), {4: (first,)}), Choice(V4, iface=("eth1",))).pinned == set()


DEFAULT0, DEFAULT1 = RouteLookup("eth0", "10.0.2.2", None), RouteLookup("eth1", "192.168.56.1", None)
FROM99 = RouteLookup("eth0", "10.0.2.2", "10.0.2.99")
"""As DHCP clients write it. The route of 10.0.2.0/24 has another source: the kernel writes that one."""
TWICE = interface("eth0", "10.0.2.15/24", InterfaceAddress("10.0.2.99/24", secondary=True))
TWICE1 = interface("eth1", "192.168.56.10/24", InterfaceAddress("192.168.56.99/24", secondary=True))
TWO_NETWORKS = interface("eth0", "10.0.2.15/24", "10.9.0.15/24")


@pytest.mark.field_problem(34)
@pytest.mark.parametrize(
    ("interfaces", "defaults", "iface", "expected"),
    [
        ((ETH0, ETH1), (DEFAULT0,), "eth0", {}),
        ((ETH0, ETH1), (), "eth0", {}),
        ((ETH0, ETH1), (DEFAULT0,), "eth1", {}),
        ((ETH0, TWICE1), (DEFAULT0,), "192.168.56.99", {4: None}),
        ((ETH0, ETH1), (DEFAULT0, DEFAULT1), "eth1", {4: DEFAULT1}),
        ((ETH0, ETH1), (DEFAULT0, DEFAULT1), "eth0", {}),
        ((TWICE,), (DEFAULT0,), "10.0.2.99", {4: DEFAULT0}),
        ((TWICE,), (), "10.0.2.99", {4: None}),
        ((TWICE,), (FROM99,), "10.0.2.99", {4: FROM99}),
        ((TWICE,), (DEFAULT0,), "10.0.2.15", {}),
        ((TWO_NETWORKS,), (DEFAULT0,), "10.0.2.15", {4: DEFAULT0}),
        ((ETH0,), (FROM99,), "eth0", {4: FROM99}),
        ((interface("eth0", "10.0.2.15/24", "10.0.2.99/32"),), (DEFAULT0,), "10.0.2.15", {}),
        ((interface("eth0", "10.0.2.15/32", "10.0.2.99/32"),), (DEFAULT0,), "10.0.2.15", {4: DEFAULT0}),
        ((ROUTED, ETH0), (RouteLookup("eth0", "10.0.2.2", "10.9.9.7"),), "10.9.9.7", {}),
        ((ROUTED, ETH0), (DEFAULT0,), "10.9.9.7", {4: DEFAULT0}),
        ((ROUTED, ETH0), (), "10.9.9.7", {}),
    ],
)
def test_where_the_kernel_would_send_from_another_address_the_way_out_is_named(
    interfaces: tuple[Interface, ...], defaults: tuple[RouteLookup, ...], iface: str, expected: dict
) -> None:
    assert choose_underlay(View(interfaces, {4: defaults}), Choice(V4, iface=(iface,))).ways_out == expected


@pytest.mark.field_problem(34)
def test_a_second_address_of_ipv6_is_one_that_the_kernel_may_choose_and_a_link_local_one_is_not():
    way = RouteLookup("eth0", "fe80::1", None)
    for addresses, expected in (
        (("2001:db8::7/64", "fe80::7/64"), {}),
        (("2001:db8::7/64", "2001:db8::8/64"), {6: way}),
        (("fe80::7/64",), {}),
    ):
        chosen = choose_underlay(View((interface("eth0", *addresses),), {6: (way,)}), Choice((6,)))
        assert chosen.ways_out == expected
