"""Records survive the way through JSON; secrets do not make it."""

from __future__ import annotations

import json

import pytest

from backends.kernel_state import (
    Address,
    FdbEntry,
    Firewall,
    Foreign,
    Hook,
    Ipip,
    Link,
    Neighbour,
    Record,
    Route,
    Rule,
    Sysctl,
    Tun,
    UdpPeer,
    Uplink,
    Vxlan,
    Wireguard,
    WireguardPeer,
)
from flanneld.record_json import from_json, to_json, without_secrets

RECORDS: list[Record] = [
    Link("flannel.1", Vxlan(1, "192.0.2.1", "eth0"), 1450, mac="02:00:00:00:00:01", tx_checksum=False),
    Link("flannel-wg", Wireguard(51820, "c2VjcmV0"), 1420),
    Link("flannel.ipip", Ipip("192.0.2.1", "eth0"), 1480),
    Link("flannel0", Tun("192.0.2.1", 8285, "eth0", "10.5.0.0/16"), 1472),
    Link("flannel.2", Foreign("dummy"), 1500),
    Sysctl("net/ipv6/conf/flannel.1/accept_ra", "0"),
    Address("flannel.1", "10.5.1.0/32"),
    FdbEntry("flannel.1", "02:00:00:00:00:02", "192.0.2.2"),
    Neighbour("flannel.1", "10.5.2.0", "02:00:00:00:00:02"),
    Route("10.5.2.0/24", "flannel.1", "10.5.2.0", onlink=True),
    Route("10.5.1.0/24", None, metric=4096, protocol=241, type="blackhole"),
    Uplink("flannel-wg", 4, 51820, (Route("0.0.0.0/0", "eth1", "192.0.2.254", onlink=True, protocol=241),)),
    WireguardPeer("flannel-wg", "cHVibGlj", "192.0.2.2:51820", ("10.5.2.0/24",), 25, "c2VjcmV0"),
    UdpPeer("flannel0", "10.5.2.0/24", "192.0.2.2", 8285),
    Firewall(4, "nftables", (Rule("forward", "accept", src="10.5.0.0/16"), Rule("postrouting", "masquerade"))),
    Hook("peer", "add", "remove", (("SUBNET", "10.5.2.0/24"),), "{}"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{type(record).__name__}-{record.key[1]}")
def test_round_trip(record: Record) -> None:
    text = json.dumps(to_json(record))
    assert from_json(json.loads(text)) == without_secrets(record)
    assert "c2VjcmV0" not in text


def test_every_kind_of_record_is_here() -> None:
    assert {type(record) for record in RECORDS} == set(Record.__args__)


@pytest.mark.parametrize("value", [{}, {"record": "Nothing"}, {"record": "Address", "colour": 1}])
def test_what_is_no_record_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a record that this version knows"):
        from_json(value)
