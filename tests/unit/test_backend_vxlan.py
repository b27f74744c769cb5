"""The vxlan backend: which records reach a peer, and which peers are refused."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from backends.backend import BackendError, PeerRefused
from backends.kernel_state import ROUTE_PROTOCOL, Address, FdbEntry, Link, Neighbour, Route, Sysctl
from backends.kernel_state import Vxlan as Settings
from backends.vxlan import Vxlan
from tests.unit.backend_values import host, lease, underlay

FACTS = {"vtep_mac": "02:00:00:00:00:01", "vtep_mac_v6": "02:00:00:00:06:01"}
MAC = "02:00:00:00:00:02"


def peer(mac=MAC, vni=1, **changes):
    found = lease(2, "vxlan")
    data = {"VNI": vni, "VtepMAC": mac}
    return replace(found, attrs=replace(found.attrs, backend_data=data, backend_v6_data=data, **changes))


def here(**options):
    return host(facts=FACTS, **options)


def test_the_host_has_flannels_device_address_and_sysctl():
    records = list(Vxlan({}).host_state(here()))
    settings = Settings(vni=1, local="192.168.64.2", underlay="eth0", port=8472)
    assert records == [
        Link("flannel.1", settings, 1450, "02:00:00:00:00:01"),
        Sysctl("net/ipv6/conf/flannel.1/accept_ra", "0"),
        Address("flannel.1", "10.5.1.0/32"),
    ]


def test_a_peer_is_an_fdb_entry_a_neighbour_and_an_onlink_route():
    found = peer()
    base, public = str(found.subnet.network_address), str(found.attrs.public_ip)
    assert list(Vxlan({}).peer_state(here(), found)) == [
        FdbEntry("flannel.1", MAC, public),
        Neighbour("flannel.1", base, MAC),
        Route(str(found.subnet), "flannel.1", via=base, onlink=True),
    ]


@pytest.mark.field_problem(21)
def test_behind_nat_the_tunnel_starts_at_the_interfaces_address():
    behind = here(under=underlay(public4="203.0.113.7"))
    link = next(r for r in Vxlan({}).host_state(behind) if isinstance(r, Link))
    assert isinstance(link.settings, Settings)
    assert link.settings.local == "192.168.64.2"


@pytest.mark.field_problem(33)
def test_an_ipv6_underlay_costs_70_bytes_and_the_published_mtu_fits_both():
    dual = here(v6=True)
    backend = Vxlan({})
    assert backend.mtu(dual.underlay, (4, 6)) == 1430
    assert backend.mtu(dual.underlay, (4,)) == 1450
    mtus = {r.name: r.mtu for r in backend.host_state(dual) if isinstance(r, Link)}
    assert mtus == {"flannel.1": 1450, "flannel-v6.1": 1430}


def test_options_reach_the_device():
    options = {"vni": 4096, "Port": 4789, "MTU": 9000, "GBP": True, "learning": True, "TxChecksumOffload": "off"}
    link = next(r for r in Vxlan(options).host_state(here()) if isinstance(r, Link))
    settings = Settings(4096, "192.168.64.2", "eth0", 4789, learning=True, gbp=True)
    assert link == Link("flannel.4096", settings, 8950, FACTS["vtep_mac"], tx_checksum=False)


def test_published_data_is_flannels_byte_for_byte():
    published = Vxlan({}).published(here())
    assert (published.backend_type, list(published.data.items())) == (
        "vxlan",
        [("VNI", 1), ("VtepMAC", "02:00:00:00:00:01")],
    )
    assert published.v6_data is None


def test_direct_routing_replaces_the_tunnel_where_the_peer_is_on_link():
    found = peer()
    direct = Vxlan({"DirectRouting": True}).peer_state(here(), found)
    via = str(found.attrs.public_ip)
    assert list(direct) == [Route(str(found.subnet), "eth0", via=via, protocol=ROUTE_PROTOCOL)]
    far = peer(public_ip=IPv4Address("198.51.100.9"))
    kinds = [type(r) for r in Vxlan({"DirectRouting": True}).peer_state(here(), far)]
    assert kinds == [FdbEntry, Neighbour, Route]
    # The address on our link is its router's, which knows nothing of pods.
    behind = replace(found, attrs=replace(found.attrs, behind_nat=(4,)))
    kinds = [type(r) for r in Vxlan({"DirectRouting": True}).peer_state(here(), behind)]
    assert kinds == [FdbEntry, Neighbour, Route]
    in_the_other = replace(found, attrs=replace(found.attrs, behind_nat=(6,)))
    assert list(Vxlan({"DirectRouting": True}).peer_state(here(), in_the_other)) == list(direct)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"VNI": 0}, "VNI"),
        ({"VNI": 1 << 24}, "VNI"),
        ({"VNI": "1"}, "VNI"),
        ({"Port": 70000}, "Port"),
        ({"TxChecksumOffload": "maybe"}, "TxChecksumOffload"),
    ],
)
def test_an_impossible_option_is_named(options, says):
    with pytest.raises(BackendError, match=says):
        Vxlan(options)


def test_an_unknown_option_is_told():
    assert Vxlan({"DirectRoutng": True}).unknown_options == ("DirectRoutng",)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (peer(mac="01:00:5e:00:00:01"), "no single device"),
        (peer(mac="00:00:00:00:00:00"), "no single device"),
        (peer(mac="zz"), "not a MAC"),
        (peer(mac=None), "not a MAC"),
        (peer(mac=FACTS["vtep_mac"]), "this node's own"),
        (peer(vni=7), "VNI 7"),
        (peer(public_ip=IPv4Address("0.0.0.0")), "no host's address"),
        (peer(public_ip=IPv4Address("127.0.0.1")), "no host's address"),
        (peer(public_ip=IPv4Address("224.0.0.9")), "no host's address"),
        (peer(public_ip=IPv4Address("192.168.64.2")), "this node's own address"),
        (peer(public_ip=None), "publishes no IPv4 address"),
    ],
)
def test_a_peer_that_cannot_be_is_refused_with_the_reason(found, says):
    with pytest.raises(PeerRefused, match=says):
        list(Vxlan({}).peer_state(here(), found))


@pytest.mark.field_problem(17)
def test_an_mtu_above_the_underlays_is_refused_with_both_numbers():
    with pytest.raises(BackendError, match="MTU 9000 is more than eth0's 1500"):
        Vxlan({"MTU": 9000}).mtu(here().underlay, (4,))


def test_a_mac_in_capitals_is_the_same_mac():
    records = list(Vxlan({}).peer_state(here(), peer(mac="02:AB:00:00:00:02")))
    assert records[0] == FdbEntry("flannel.1", "02:ab:00:00:00:02", str(peer().attrs.public_ip))


@pytest.mark.field_problem(34)
def test_a_pinned_underlay_is_named_in_the_forwarding_entry():
    under = replace(here().underlay, pinned=frozenset({4}))
    records = list(Vxlan({}).peer_state(replace(here(), underlay=under), peer()))
    assert records[0] == FdbEntry("flannel.1", MAC, str(peer().attrs.public_ip), via="eth0")


def test_leases_of_other_backends_are_no_peers():
    assert not Vxlan({}).accepts(lease(2, "host-gw"))
    assert Vxlan({}).accepts(lease(2, "vxlan"))
