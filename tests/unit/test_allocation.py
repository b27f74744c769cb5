"""Which subnet: ours by every mark, else a free one, without looking at each of millions."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet_lease import allocation
from subnet_lease.lease import Lease, LeaseAttrs, NodeIdentity
from subnet_lease.network_config import NetworkConfig, parse_network_config, validate_for_allocation
from subnet_lease.store import LeaseRequest, OutOfSubnets, SubnetTaken

US = NodeIdentity("us", "machine", "02:aa")
OTHER = NodeIdentity("other", "elsewhere", "02:bb")


def network(text: str = '{"Network":"10.5.0.0/16"}') -> NetworkConfig:
    return validate_for_allocation(parse_network_config(text))


def lease(v4: str | None, v6: str | None = None, *, ip: str = "192.168.0.9", node: NodeIdentity | None = None,
          reservation: bool = False) -> Lease:  # fmt: skip
    subnets = (IPv4Network(v4) if v4 else None, IPv6Network(v6) if v6 else None)
    return Lease(*subnets, LeaseAttrs(public_ip=IPv4Address(ip), node=node), reservation=reservation)


def request(
    ip: str = "192.168.0.1", previous: str | None = None, keep: bool = False, node: NodeIdentity = US
) -> LeaseRequest:
    subnets = (IPv4Network(previous) if previous else None, None)
    return LeaseRequest(node, LeaseAttrs(public_ip=IPv4Address(ip)), subnets, keep)


def first(_: int) -> int:
    return 0


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        (None, "unknown"),
        (US, "same"),
        (NodeIdentity("us", "machine", "02:bb"), "alike"),
        (NodeIdentity("renamed", "machine", "02:aa"), "alike"),
        (NodeIdentity("us", "reinstalled", "02:aa"), "alike"),
        (NodeIdentity("us", "machine", ""), "same"),
        (NodeIdentity("us", "", "02:bb"), "other"),
        (NodeIdentity("us", "", ""), "other"),
        (NodeIdentity("us", "x", "y"), "other"),
        (OTHER, "other"),
    ],
)
def test_likeness(theirs: NodeIdentity | None, verdict: str) -> None:
    assert allocation.likeness(theirs, US) == verdict


SAME_IP, OTHER_IP = "192.168.0.1", "192.168.0.9"
ALIKE = NodeIdentity("us", "machine", "02:new")


@pytest.mark.parametrize(
    ("node", "ip", "alive", "ours", "rival"),
    [
        (US, SAME_IP, False, True, False),
        (US, OTHER_IP, False, True, False),  # our address changed
        (US, SAME_IP, True, False, True),  # a full clone, or our own ghost for half a minute
        (US, OTHER_IP, True, False, False),  # a full clone with its own address
        (ALIKE, SAME_IP, False, True, False),  # renamed, or a new NIC
        (ALIKE, OTHER_IP, False, True, False),
        (ALIKE, SAME_IP, True, False, True),
        (ALIKE, OTHER_IP, True, False, False),  # a clone
        (OTHER, SAME_IP, False, True, False),  # a node that is gone; its address is ours now
        (OTHER, SAME_IP, True, False, True),  # field problem 10
        (OTHER, OTHER_IP, False, False, False),
        (None, SAME_IP, True, True, False),  # flanneld's
        (None, OTHER_IP, False, False, False),
    ],
)
@pytest.mark.field_problem(10)
def test_whose_lease_it_is(node: NodeIdentity | None, ip: str, alive: bool, ours: bool, rival: bool) -> None:
    found = lease("10.5.3.0/24", ip=ip, node=node)
    own = allocation.find_own([lease("10.5.4.0/24", ip="192.168.0.77"), found], request(), lambda _: alive)
    assert (own.lease is found, own.rival is found) == (ours, rival)
    assert own.lease in (found, None)


def test_identity_counts_more_than_address_and_address_breaks_ties() -> None:
    flanneld = lease("10.5.1.0/24", ip=SAME_IP)
    ours = lease("10.5.2.0/24", ip=OTHER_IP, node=US)
    ours_here = lease("10.5.3.0/24", ip=SAME_IP, node=US)
    dead = lambda _: False  # noqa: E731
    assert allocation.find_own([flanneld, ours], request(), dead).lease is ours
    assert allocation.find_own([flanneld, ours, ours_here], request(), dead).lease is ours_here
    two = [lease("10.5.2.0/24", ip=OTHER_IP, node=US), lease("10.5.9.0/24", ip=OTHER_IP, node=US)]
    assert allocation.find_own(two, request(previous="10.5.9.0/24"), dead).lease is two[1]


@pytest.mark.field_problem(39)
@pytest.mark.parametrize(
    ("node", "ip", "reserved", "alive", "ours"),
    [
        (NodeIdentity("us"), "0.0.0.0", True, False, True),
        (NodeIdentity("us"), "0.0.0.0", True, True, False),  # another node still runs on that subnet
        (NodeIdentity("us"), "0.0.0.0", False, False, False),  # whoever wrote that, it is no reservation
        (NodeIdentity("us"), OTHER_IP, True, False, False),  # for a namesake with another address
        (NodeIdentity("us", "elsewhere"), "0.0.0.0", True, False, False),  # a namesake has taken it
        (NodeIdentity("other"), "0.0.0.0", True, False, False),
    ],
)
def test_a_reservation_for_our_name(node: NodeIdentity, ip: str, reserved: bool, alive: bool, ours: bool) -> None:
    made = lease("10.5.3.0/24", ip=ip, node=node, reservation=reserved)
    made = replace(made, attrs=replace(made.attrs, public_ip=None if ip == "0.0.0.0" else IPv4Address(ip)))
    assert (allocation.find_own([made], request(), lambda _: alive).lease is made) is ours


def test_a_reservation_for_our_name_counts_less_than_our_own_lease_and_more_than_all_else() -> None:
    bare = LeaseAttrs(node=NodeIdentity("us"))
    named = Lease(IPv4Network("10.5.9.0/24"), None, bare, reservation=True)
    others = [lease("10.5.1.0/24", ip=SAME_IP, node=node) for node in (None, ALIKE, OTHER)]
    dead = lambda _: False  # noqa: E731
    assert allocation.find_own([*others, named], request(previous="10.5.1.0/24"), dead).lease is named
    own = lease("10.5.2.0/24", ip=OTHER_IP, node=US)
    assert allocation.find_own([named, own], request(), dead).lease is own


def test_previous_subnet_if_free_and_fitting_else_random() -> None:
    config = network()
    assert allocation.choose(config, [], request(previous="10.5.7.0/24"), first)[0] == IPv4Network("10.5.7.0/24")
    for previous, taken in (
        ("10.5.7.0/24", "10.5.7.0/24"),
        ("10.5.7.0/25", "10.5.8.0/24"),
        ("10.6.7.0/24", "10.5.8.0/24"),
    ):
        chosen = allocation.choose(config, [lease(taken)], request(previous=previous), first)
        assert chosen == (IPv4Network("10.5.1.0/24"), None)


def test_one_of_the_first_hundred_free_ones() -> None:
    config = network()
    sizes: list[int] = []
    chosen = allocation.choose(config, [lease("10.5.1.0/24")], request(), lambda n: sizes.append(n) or n - 1)
    assert sizes == [100]
    assert chosen == (IPv4Network("10.5.101.0/24"), None)


def test_kept_subnets_are_those_or_none() -> None:
    config = network()
    kept = request(previous="10.6.7.0/24", keep=True)  # even outside a network that has changed since
    assert allocation.choose(config, [lease("10.5.7.0/24")], kept, first)[0] == IPv4Network("10.6.7.0/24")
    with pytest.raises(SubnetTaken, match=r"10\.6\.7\.0/24.*'other'"):
        allocation.choose(config, [lease("10.6.0.0/16", node=OTHER)], kept, first)


DUAL = '{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00:5::/48"}'


@pytest.mark.parametrize(
    ("config", "own", "suits"),
    [
        ('{"Network":"10.5.0.0/16","SubnetMin":"10.5.128.0"}', lease("10.5.7.0/24"), True),
        ('{"Network":"10.5.0.0/16","SubnetLen":26}', lease("10.5.7.0/24"), True),
        ('{"Network":"10.6.0.0/16"}', lease("10.5.7.0/24"), False),
        (DUAL, lease("10.5.7.0/24"), False),
        (DUAL, lease("10.5.7.0/24", "fc00:5:0:7::/64"), True),
        ('{"Network":"10.5.0.0/16"}', lease("10.5.7.0/24", "fc00:5:0:7::/64"), False),
    ],
)
def test_range_and_length_bind_new_subnets_only(config: str, own: Lease, suits: bool) -> None:
    assert allocation.suits(network(config), request(), own) is suits


def test_a_node_keeps_the_family_that_it_has_when_another_is_turned_on_or_off() -> None:
    v4, both = lease("10.5.7.0/24"), lease("10.5.7.0/24", "fc00:5:0:7::/64")
    chosen = allocation.choose(network(DUAL), [], request(), first, v4)
    assert chosen == (v4.subnet, IPv6Network("fc00:5:0:7::/64")), "in the same place"
    other = lease("10.5.9.0/24", "fc00:5:0:7::/64", node=OTHER)
    assert allocation.choose(network(DUAL), [other], request(), first, v4)[1] == IPv6Network("fc00:5:0:1::/64")
    assert allocation.choose(network(), [], request(), first, both) == (v4.subnet, None)
    kept = request(previous="10.5.7.0/24", keep=True)
    assert not allocation.suits(network(DUAL), kept, v4)
    assert allocation.choose(network(DUAL), [], kept, first, v4) == chosen
    with pytest.raises(SubnetTaken):
        allocation.choose(network(DUAL), [lease("10.5.7.0/24", node=OTHER)], kept, first)


def test_the_hosts_own_networks_are_not_handed_out() -> None:
    config = network('{"Network":"10.5.0.0/22"}')
    around = replace(
        request(), avoid=(IPv4Network("10.5.1.0/24"), IPv4Network("10.5.2.16/28"), IPv6Network("fc00::/8"))
    )
    assert allocation.choose(config, [], around, first) == (IPv4Network("10.5.3.0/24"), None)
    # One that holds the whole network is there on purpose: its hosts are elsewhere in it.
    wide = replace(request(), avoid=(IPv4Network("10.0.0.0/8"),))
    assert allocation.choose(config, [], wide, first) == (IPv4Network("10.5.1.0/24"), None)


def test_out_of_subnets_says_what_could_be_had_back() -> None:
    config = network('{"Network":"10.5.0.0/22"}')
    leases = [lease("10.5.1.0/24"), lease("10.5.2.0/23", node=OTHER), lease("10.6.0.0/24", reservation=True)]
    with pytest.raises(OutOfSubnets) as error:
        allocation.choose(config, leases, request(), first)
    text = str(error.value)
    assert "all 3 IPv4 subnets from 10.5.1.0/24 to 10.5.3.0/24" in text
    assert "3 leases, 1 of them reservations" in text
    assert "Left over from another configuration: 10.5.2.0/23, 10.6.0.0/24" in text
    assert "Reserved: 10.6.0.0/24" in text
    assert "flannelctl release" in text


def test_dual_stack_and_ipv6_only() -> None:
    dual = network('{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fc00:5::/48"}')
    taken = lease("10.5.1.0/24", "fc00:5:0:1::/64")
    assert allocation.choose(dual, [taken], request(), first) == (
        IPv4Network("10.5.2.0/24"),
        IPv6Network("fc00:5:0:2::/64"),
    )
    only = network('{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00:5::/48"}')
    assert allocation.choose(only, [taken], request(), first) == (None, IPv6Network("fc00:5:0:2::/64"))
    small = network('{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fc00:5::/62"}')
    full = [lease(f"10.5.{n}.0/24", f"fc00:5:0:{n}::/64") for n in (1, 2, 3)]
    with pytest.raises(OutOfSubnets, match="all 3 IPv6 subnets"):
        allocation.choose(small, full, request(), first)


def test_addresses_of_either_family_are_compared() -> None:
    v6 = LeaseAttrs(public_ipv6=IPv6Address("fc00::1"))
    assert allocation.same_address(v6, LeaseAttrs(public_ip=IPv4Address("1.2.3.4"), public_ipv6=v6.public_ipv6))
    assert not allocation.same_address(v6, LeaseAttrs(public_ip=IPv4Address("1.2.3.4")))
    assert not allocation.same_address(LeaseAttrs(), LeaseAttrs())


@pytest.mark.parametrize(
    ("config", "leases", "told"),
    [
        ('{"Network":"10.5.0.0/16"}', ["10.5.1.0/24"], True),
        ('{"Network":"10.5.0.0/16"}', ["10.5.1.0/25"], False),
        ('{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00:5::/48"}', [], False),
    ],
)
def test_when_the_key_tells_all(config: str, leases: list[str], told: bool) -> None:
    assert allocation.key_tells_all(network(config), [lease(text) for text in leases]) is told


def test_a_slash_8_with_5000_leases_is_quick() -> None:
    config = network('{"Network":"10.0.0.0/8","SubnetLen":30}')
    leases = [Lease(IPv4Network((10 * 2**24 + 4 + 4 * n, 30)), None, LeaseAttrs()) for n in range(5000)]
    started = time.process_time()
    chosen = allocation.choose(config, leases, request(), first)
    assert time.process_time() - started < 0.5
    assert chosen[0] == IPv4Network((10 * 2**24 + 4 + 4 * 5000, 30))


subnets = st.tuples(st.integers(0, 1023), st.integers(22, 31)).map(
    lambda pair: IPv4Network((int(IPv4Address("10.5.0.0")) + pair[0], pair[1]), strict=False)
)


@given(st.lists(subnets, max_size=30), st.integers(24, 28), st.integers(0, 2**31))
def test_what_is_chosen_is_free_and_fits(taken: list[IPv4Network], length: int, seed: int) -> None:
    config = network(f'{{"Network":"10.5.0.0/22","SubnetLen":{length}}}')
    leases = [Lease(subnet, None, LeaseAttrs()) for subnet in taken]
    every = [
        subnet
        for subnet in IPv4Network("10.5.0.0/22").subnets(new_prefix=length)
        if subnet.network_address != IPv4Address("10.5.0.0") and not any(subnet.overlaps(other) for other in taken)
    ]
    try:
        chosen, _ = allocation.choose(config, leases, request(), random.Random(seed).randrange)
    except OutOfSubnets:
        assert every == []
    else:
        assert chosen in every[:100]
        assert allocation.fits(config, (chosen, None))
