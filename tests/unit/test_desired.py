"""The desired state follows snapshots lease by lease, and refuses what would do harm."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.kernel_state import FdbEntry, Kind, Route
from backends.vxlan import Vxlan
from flanneld.desired import LINGER, DesiredState, Standing, Update
from subnet_lease.lease import Lease, LeaseAttrs
from subnet_lease.persistent_map import PersistentMap
from tests.unit.backend_values import host, underlay

FACTS = {"vtep_mac": "02:00:00:00:00:01", "vtep_mac_v6": "02:00:00:00:06:01"}


def lease(subnet: str, number: int, mac: str | None = None, kind: str = "vxlan") -> Lease:
    data = {"VNI": 1, "VtepMAC": mac or f"02:00:00:00:01:{number:02x}"}
    attrs = LeaseAttrs(IPv4Address(f"192.168.64.{number}"), backend_type=kind, backend_data=data)
    return Lease(IPv4Network(subnet), None, attrs)


OWN = Lease(IPv4Network("10.5.1.0/24"), None, LeaseAttrs(IPv4Address("192.168.64.2"), backend_type="vxlan"))


def desired() -> DesiredState:
    return DesiredState(Standing(Vxlan({}), host(facts=FACTS), OWN))


def snapshot(*leases: Lease) -> PersistentMap[str, Lease]:
    return PersistentMap({found.key: found for found in leases})


def routes(state: DesiredState) -> set[str]:
    return {r.dst for r in state.state.values() if isinstance(r, Route)}


def test_peers_come_and_go_and_the_touched_keys_are_theirs():
    state = desired()
    a, b = lease("10.5.2.0/24", 12), lease("10.5.3.0/24", 13)
    assert len(state.update(snapshot(OWN, a, b), 0).records) == 6
    assert routes(state) == {"10.5.2.0/24", "10.5.3.0/24"}
    assert state.update(snapshot(OWN, a), 1).records == set(), "it lingers"
    assert state.next_departure == 1 + LINGER
    touched = state.update(snapshot(OWN, a), 1 + LINGER).records
    assert state.next_departure is None
    assert {key[0] for key in touched} == {Kind.FDB, Kind.NEIGHBOUR, Kind.ROUTE}
    assert routes(state) == {"10.5.2.0/24"}
    assert state.peers == 1


def test_an_unchanged_lease_is_not_looked_at():
    state = desired()
    a = lease("10.5.2.0/24", 12)
    first = snapshot(OWN, a)
    state.update(first, 0)
    assert state.update(PersistentMap(first), 0) == Update()
    assert state.update(first, 0) == Update()


def test_a_peer_with_a_new_mac_loses_the_old_entry():
    state = desired()
    state.update(snapshot(OWN, lease("10.5.2.0/24", 12)), 0)
    state.update(snapshot(OWN, lease("10.5.2.0/24", 12, "02:00:00:00:09:09")), 0)
    assert [r.mac for r in state.state.values() if isinstance(r, FdbEntry)] == ["02:00:00:00:09:09"]


def test_our_own_lease_and_foreign_backends_are_no_peers():
    state = desired()
    state.update(snapshot(OWN, lease("10.5.2.0/24", 12, kind="host-gw")), 0)
    assert routes(state) == set()
    assert state.refused == {}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lease("10.6.2.0/24", 12), "outside the network 10.5.0.0/16"),
        (lease("10.5.1.128/25", 12), "overlaps this node's own subnet"),
        (lease("10.5.0.0/17", 12), "overlaps this node's own subnet"),
    ],
)
def test_a_lease_that_would_do_harm_is_refused(bad, says):
    state = desired()
    good = lease("10.5.3.0/24", 13)
    state.update(snapshot(OWN, bad, good), 0)
    assert says in state.refused[bad.key]
    assert routes(state) == {"10.5.3.0/24"}


@pytest.mark.parametrize(
    ("subnet", "public", "says"),
    [
        ("10.5.64.0/24", "192.168.64.12", "covers 10.5.64.0/24, the network of this host's eth0"),
        ("10.5.64.0/26", "192.168.64.12", "covers 10.5.64.2, this host's own address"),
        ("10.5.9.0/24", "10.5.9.4", "covers 10.5.9.4, its owner's public address"),
        ("10.5.64.128/26", "192.168.64.12", None),
    ],
)
def test_a_lease_that_would_cut_off_hosts_inside_the_network_is_refused(subnet, public, says):
    inside = host(under=underlay("10.5.64.2", prefixes=("10.5.64.0/24",)), facts=FACTS)
    state = DesiredState(Standing(Vxlan({}), inside, OWN))
    found = lease(subnet, 12)
    found = replace(found, attrs=replace(found.attrs, public_ip=IPv4Address(public)))
    state.update(snapshot(OWN, found), 0)
    assert routes(state) == ({subnet} if says is None else set())
    assert says is None or says in state.refused[found.key]


@pytest.mark.field_problem(6)
def test_a_peer_that_is_wrong_in_one_family_keeps_the_other():
    both = host(v4=True, v6=True, facts=FACTS)
    state = DesiredState(Standing(Vxlan({}), both, OWN))
    good = lease("10.5.2.0/24", 12)
    attrs = replace(good.attrs, public_ipv6=IPv6Address("2001:db8:64::c"), backend_v6_data=good.attrs.backend_data)
    peer = Lease(good.subnet, IPv6Network("fc00:0:0:2::/64"), attrs)
    state.update(snapshot(OWN, peer), 0)
    assert routes(state) == {"10.5.2.0/24", "fc00:0:0:2::/64"}
    mute = replace(peer, attrs=replace(attrs, backend_v6_data=None))
    touched = state.update(snapshot(OWN, mute), 1).records
    assert routes(state) == {"10.5.2.0/24"}
    assert len(touched) == 3, "the three records of one family"
    assert "VtepMAC None" in state.refused[peer.key]
    assert state.peers == 1
    state.update(snapshot(OWN, peer), 2)
    assert routes(state) == {"10.5.2.0/24", "fc00:0:0:2::/64"}
    assert state.refused == {}


def test_two_peers_with_one_mac_the_first_keeps_it_and_the_second_gets_it_when_the_first_goes():
    state = desired()
    a, b = lease("10.5.2.0/24", 12, "02:00:00:00:05:05"), lease("10.5.3.0/24", 13, "02:00:00:00:05:05")
    state.update(snapshot(OWN, a, b), 0)
    assert routes(state) == {"10.5.2.0/24"}
    assert "wants fdb flannel.1 02:00:00:00:05:05, which belongs to lease 10.5.2.0/24" in state.refused[b.key]
    state.update(snapshot(OWN, b), 0)
    assert routes(state) == {"10.5.3.0/24"}
    assert state.refused == {}


def test_a_refused_lease_that_goes_is_forgotten():
    state = desired()
    bad = lease("10.6.2.0/24", 12)
    state.update(snapshot(OWN, bad), 0)
    state.update(snapshot(OWN), 0)
    assert state.refused == {}


def test_nothing_is_kept_of_leases_that_were_refused_and_went():
    """Clones of one machine that come and go for weeks, while the first one stays."""
    state = desired()
    first, mac = lease("10.5.2.0/24", 12, "02:00:00:00:05:05"), "02:00:00:00:05:05"
    for number in range(3, 9):
        state.update(snapshot(OWN, first, lease(f"10.5.{number}.0/24", number, mac)), number)
        assert len(state.refused) == 1
    state.update(snapshot(OWN, first), 99)
    assert (state._waiting, state._waits_for, state.refused) == ({}, {}, {})
    last = lease("10.5.9.0/24", 9, mac)
    state.update(snapshot(OWN, first, last), 100)
    state.update(snapshot(OWN, last), 101)
    assert routes(state) == {"10.5.9.0/24"}
    assert (state._waiting, state._waits_for) == ({}, {})


def test_the_blackhole_stands_behind_the_bridges_own_route():
    standing = replace(desired().standing, blackhole=True)
    hole = next(r for r in DesiredState(standing).state.values() if isinstance(r, Route))
    assert (hole.dst, hole.type, hole.dev) == ("10.5.1.0/24", "blackhole", None)
    assert hole.metric is not None and hole.metric > 0


def test_a_lease_that_comes_back_in_time_was_never_gone():
    state = desired()
    a = lease("10.5.2.0/24", 12)
    state.update(snapshot(OWN, a), 0)
    state.update(snapshot(OWN), 1)
    assert routes(state) == {"10.5.2.0/24"}
    assert state.update(snapshot(OWN, lease("10.5.2.0/24", 12)), 2).records == set()
    assert state.update(snapshot(OWN, a), 99).records == set()
    assert routes(state) == {"10.5.2.0/24"}


def test_a_node_that_moved_to_another_subnet_does_not_wait_for_its_old_one():
    state = desired()
    state.update(snapshot(OWN, lease("10.5.2.0/24", 12)), 0)
    touched = state.update(snapshot(OWN, lease("10.5.3.0/24", 12)), 1).records
    assert routes(state) == {"10.5.3.0/24"}
    assert len(touched) == 5, "two routes, two neighbours, one FDB entry"


def test_a_peer_that_waits_gets_its_records_when_the_one_that_has_them_gives_them_up():
    state = desired()
    a, b = lease("10.5.2.0/24", 12, "02:00:00:00:05:05"), lease("10.5.3.0/24", 13, "02:00:00:00:05:05")
    state.update(snapshot(OWN, a, b), 0)
    update = state.update(snapshot(OWN, lease("10.5.2.0/24", 12), b), 1)
    assert routes(state) == {"10.5.2.0/24", "10.5.3.0/24"}
    assert state.refused == {}
    assert update.leases == {a.key, b.key}


SUBNETS = [f"10.5.{number}.0/24" for number in range(2, 7)]
EVENTS = st.lists(
    st.tuples(
        st.sampled_from([*SUBNETS, "10.6.2.0/24"]),
        st.none() | st.integers(1, 4),  # which MAC it has now; None: the lease goes
        st.booleans(),  # whether the reconciler takes this snapshot, or a later one
    ),
    max_size=40,
)


def mac(subnet: str, number: int, shared: bool) -> str:
    """One that only this subnet's node may have, or one that others may have, too."""
    return (
        f"02:00:00:00:{0x77 if shared else int(subnet.split('.')[2]) + 0x80 * (subnet not in SUBNETS):02x}:{number:02x}"
    )


def follow(
    state: DesiredState, events: list[tuple[str, int | None, bool]], *, shared: bool
) -> PersistentMap[str, Lease]:
    """Show the state some of the snapshots that these events make, the last one in any case, and let time pass."""
    leases, now = snapshot(OWN), 0.0
    for subnet, number, taken in events:
        key, now = subnet.replace("/", "-"), now + LINGER / 3
        found = None if number is None else lease(subnet, 10 + number, mac(subnet, number, shared))
        leases = leases.with_changes({key: found})
        if taken:
            before, peers, refused = dict(state.state), set(state.admitted), dict(state.refused)
            update = state.update(leases, now)
            assert {
                k for k in before.keys() | state.state.keys() if before.get(k) != state.state.get(k)
            } <= update.records
            assert peers ^ set(state.admitted) <= update.leases
            assert {k for k in leases if refused.get(k) != state.refused.get(k)} <= update.leases
    state.update(leases, now)
    state.update(leases, now + LINGER)
    assert state.next_departure is None
    return leases


@given(EVENTS)
def test_whoever_misses_snapshots_ends_in_the_state_of_one_who_saw_but_the_last(events):
    state, fresh = desired(), desired()
    fresh.update(follow(state, events, shared=False), 0)
    assert state.state == fresh.state
    assert state.refused == fresh.refused
    assert state.admitted == fresh.admitted


@given(EVENTS)
def test_where_peers_collide_nobody_waits_for_what_nobody_has(events):
    state = desired()
    leases = follow(state, events, shared=True)
    peers = leases.keys() - {OWN.key}
    wanted = {key: {r.key for r in Vxlan({}).peer_state(host(facts=FACTS), leases[key])} for key in peers}
    assert state.admitted | state.refused.keys() == peers
    for key, reason in state.refused.items():
        assert "outside the network" in reason or any(
            f"belongs to lease {leases[other].cidr}" in reason and wanted[key] & wanted[other]
            for other in state.admitted
        )
