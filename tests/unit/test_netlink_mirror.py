"""The mirror: what counts as news, and when the table of interfaces is another one."""

from __future__ import annotations

from backends.kernel_state import FdbEntry, InterfaceAddress, Neighbour, Route
from flanneld.dataplane.links import RawLink
from flanneld.dataplane.mirror import Interfaces, Mirror

ROUTE = Route("10.5.1.0/24", "flannel.1", "10.5.1.0", onlink=True)
OTHER = Route("10.5.1.0/24", "eth0", "192.0.2.1")
FDB = FdbEntry("flannel.1", "0a:00:00:00:00:01", "192.0.2.1")
NEIGHBOUR = Neighbour("flannel.1", "10.5.1.0", "0a:00:00:00:00:01")
ETH0 = RawLink(2, "eth0", 1, 1500, "02:00:00:00:00:02", "", b"")


def test_news_is_what_differs_from_the_last_question() -> None:
    mirror = Mirror()
    mirror.learn(ROUTE.key, ROUTE)
    assert mirror.pending and mirror.take_changed() == {ROUTE.key}
    mirror.learn(ROUTE.key, OTHER)
    mirror.learn(ROUTE.key, ROUTE)
    assert not mirror.pending and mirror.take_changed() == frozenset()
    mirror.learn(ROUTE.key, None)
    mirror.learn(FDB.key, None)
    assert mirror.take_changed() == {ROUTE.key}
    assert not mirror.state


def test_own_writes_are_no_news_even_after_foreign_ones() -> None:
    mirror = Mirror()
    mirror.know(ROUTE.key, ROUTE)
    assert not mirror.pending
    mirror.learn(ROUTE.key, OTHER)
    mirror.know(ROUTE.key, ROUTE)
    assert mirror.take_changed() == frozenset() and mirror.state == {ROUTE.key: ROUTE}


def test_a_device_that_is_gone_takes_its_records() -> None:
    mirror = Mirror()
    far = Route("10.5.2.0/24", "eth0", "192.0.2.1")
    for record in (ROUTE, FDB, NEIGHBOUR, far):
        mirror.know(record.key, record)
    assert mirror.carries_routes("flannel.1") and mirror.carries_routes("eth0")
    mirror.drop_device("flannel.1")
    assert mirror.take_changed() == {ROUTE.key, FDB.key, NEIGHBOUR.key}
    assert mirror.state == {far.key: far}
    assert not mirror.carries_routes("flannel.1")
    mirror.learn(far.key, None)
    assert not mirror.carries_routes("eth0")


def test_a_source_address_is_in_use_for_as_long_as_a_route_has_it() -> None:
    mirror = Mirror()
    first, second = Route("10.5.2.0/24", "eth0", src="192.0.2.1"), Route("10.5.3.0/24", "eth0", src="192.0.2.1")
    mirror.learn(first.key, first)
    mirror.know(second.key, second)
    mirror.learn(first.key, Route("10.5.2.0/24", "eth0"))
    assert mirror.sends_from("192.0.2.1")
    mirror.know(second.key, None)
    assert not mirror.sends_from("192.0.2.1")


def test_a_look_replaces_only_what_it_looked_at() -> None:
    mirror = Mirror()
    for record in (ROUTE, FDB):
        mirror.know(record.key, record)
    mirror.replace({OTHER.key: OTHER}, lambda _, record: isinstance(record, Route))
    assert mirror.take_changed() == {ROUTE.key}
    assert mirror.state == {OTHER.key: OTHER, FDB.key: FDB}
    assert not mirror.carries_routes("flannel.1") and mirror.carries_routes("eth0")


def test_the_table_of_interfaces_is_the_same_object_until_something_changes() -> None:
    table = Interfaces()
    address = InterfaceAddress("192.0.2.9/24")
    table.load([ETH0], [(2, address)])
    first = table.snapshot()
    assert [(i.name, i.addresses) for i in first] == [("eth0", (address,))]
    table.set_link(RawLink(2, "eth0", 0x1043, 1500, ETH0.mac, "", b"other attributes"))
    table.set_address(2, address)
    table.load([ETH0], [(2, address)])
    assert not table.pending and table.snapshot() is first
    table.set_address(2, InterfaceAddress("192.0.2.9/24", deprecated=True))
    assert table.pending
    second = table.snapshot()
    assert second is not first and second[0].addresses[0].deprecated
    table.remove_link(2)
    assert table.snapshot() == () and table.index("eth0") is None


def test_a_renamed_interface_has_one_name() -> None:
    table = Interfaces()
    table.load([ETH0], [])
    table.set_link(RawLink(2, "uplink", 1, 1500, ETH0.mac, "", b""))
    table.set_link(RawLink(3, "eth0", 1, 1500, None, "veth", b""))
    assert (table.index("uplink"), table.index("eth0")) == (2, 3)
    table.remove_link(2)
    assert (table.index("uplink"), table.index("eth0")) == (None, 3)
    assert [i.name for i in table.snapshot()] == ["eth0"]
