"""Many changes at once: each answer belongs to its change, and 5,000 peers are no trouble."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from backends.kernel_state import ROUTE_PROTOCOL, Address, Change, FdbEntry, Kind, Neighbour, Record, Route
from flanneld.dataplane import netlink
from tests.kernel.netlink_host import DEV, HOST, Host, open_host, peer, peer6

PEERS = 5000


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host("batch") as host:
        yield host


@pytest.mark.field_problem(18)
def test_each_refusal_belongs_to_its_change(host: Host) -> None:
    host.establish()
    good = [record for number in range(1, 200) for record in peer(number)]
    bad: list[Record] = [
        Route("10.5.201.0/24", "eth0", "10.99.99.99"),
        Neighbour("eth7", "10.5.202.0", "0a:58:00:01:00:01"),
        FdbEntry(DEV, "0a:58:00:01:ff:01", "fd00:7::1"),
        Address(DEV, "10.5.0.0/99"),
        Route("10.5.204.1/24", DEV),
        Route("10.5.205.0/24", DEV, "10.5.999.0"),
    ]
    mixed = list(good)
    for place, record in enumerate(bad):
        mixed.insert(place * 70 + 3, record)
    failures = host.put(*mixed)
    assert {f.change.record for f in failures} == set(bad)
    by_record = {f.change.record: f for f in failures}
    assert "10.99.99.99" in by_record[bad[0]].message and by_record[bad[0]].cause == "ENETUNREACH"
    assert "eth7" in by_record[bad[1]].message and by_record[bad[1]].cause == "ENODEV"
    assert all(f.message and f.cause for f in failures)
    state = host.fresh()
    assert all(state[record.key] == record for record in good)
    assert not any(record.key in state for record in bad)


def test_a_network_of_the_hosts_own_is_not_taken_from_it(host: Host) -> None:
    host.establish()
    before = host.ip("route show proto kernel")
    assert "192.168.0.0/16 dev eth0" in before
    (failure,) = host.put(Route("192.168.0.0/16", DEV, "192.168.0.0", onlink=True))
    assert failure.cause == "EEXIST" and "eth0 has that network itself" in failure.message
    assert host.ip("route show proto kernel") == before
    # A blackhole stands behind it.
    assert host.put(Route("192.168.0.0/16", None, protocol=ROUTE_PROTOCOL, metric=4096, type="blackhole")) == []
    assert "192.168.0.0/16 dev eth0 proto kernel" in host.ip("route show")


def test_changes_keep_their_order(host: Host) -> None:
    host.establish(*peer(1))
    fdb, neighbour, route = peer(1)
    assert isinstance(fdb, FdbEntry)
    changes = [
        Change("remove", route, route),
        Change("put", replace(fdb, dst="192.168.9.9"), fdb),
        Change("remove", fdb, fdb),
        Change("put", replace(fdb, dst="192.168.9.10")),
        Change("remove", neighbour, neighbour),
        Change("put", neighbour),
        Change("put", route),
    ]
    assert host.dataplane.apply(changes) == []
    expected = {fdb.key: replace(fdb, dst="192.168.9.10"), neighbour.key: neighbour, route.key: route}
    for state in (dict(host.observe().state), host.fresh()):
        assert {key: state[key] for key in expected} == expected


def test_routes_move_between_devices_in_both_families(host: Host) -> None:
    """DirectRouting on and off; IPv6 refuses an onlink gateway that the very route to replace covers."""
    host.establish(*peer(1), *peer6(1))
    direct: list[Record] = [
        Route("10.5.1.0/24", "eth0", "192.168.7.201", protocol=241),
        Route("fd05:0:1::/64", "eth0", "fd00:7::201", protocol=241),
    ]
    tunnelled = [peer(1)[2], peer6(1)[2]]
    for wanted in (direct, tunnelled, direct):
        assert host.put(*wanted) == []
        state = host.fresh()
        assert [state[r.key] for r in wanted] == wanted


def test_lost_answers_make_every_change_of_the_batch_a_failure(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.establish()

    def lost(*_: object) -> list[None]:
        raise OSError(105, "No buffer space available")

    with monkeypatch.context() as patched:
        patched.setattr(netlink.Netlink, "_acks", lost)
        failures = host.put(*peer(1))
    assert [f.change.record for f in failures] == peer(1)
    assert {f.cause for f in failures} == {"ENOBUFS"}
    seen = host.observe()
    assert seen.changed is None, "nobody knows what was done: everything is looked at"
    assert all(seen.state[r.key] == r for r in peer(1))
    assert host.put(*peer(2)) == []


@pytest.mark.field_problem(18)
def test_five_thousand_peers(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.scope = replace(host.scope, networks=("10.0.0.0/8",))
    host.establish()
    per_peer = [peer(number) for number in range(1, PEERS + 1)]
    records = [record for kind in range(3) for record in (group[kind] for group in per_peer)]
    lines = []

    def timed(what: str, begin: float) -> None:
        lines.append(f"  {what}: {(time.perf_counter() - begin) * 1000:.0f} ms")

    begin = time.perf_counter()
    assert host.dataplane.apply([Change("put", record) for record in records]) == []
    timed(f"apply {len(records)} records", begin)
    begin = time.perf_counter()
    assert host.observe().changed == frozenset()
    timed("observe after it", begin)
    begin = time.perf_counter()
    state = host.fresh()
    timed("fresh look", begin)
    assert all(state[record.key] == record for record in records)
    host.ip("route del 10.5.77.0/24")
    begin = time.perf_counter()
    assert host.observe().changed == {(Kind.ROUTE, "10.5.77.0/24", None)}
    timed("observe one change", begin)
    host.ip(f"link set {DEV} down")
    host.ip(f"link set {DEV} up")
    begin = time.perf_counter()
    seen = host.observe()
    timed("observe a restart of the device", begin)
    # Without room for all of its messages it looked at everything; both ways it knows what is gone.
    assert seen.changed is None or len(seen.changed) >= 2 * PEERS - 1
    assert not any(
        isinstance(r, (Neighbour, Route)) and r.dev == DEV
        for r in seen.state.values()
        if getattr(r, "protocol", 0) != 2
    )
    begin = time.perf_counter()
    assert host.dataplane.apply([Change("remove", record, record) for record in reversed(records)]) == []
    timed("remove all", begin)
    left = [r for r in host.fresh().values() if not (isinstance(r, Route) and r.protocol == 2)]
    assert len(left) == len(HOST)
    with capsys.disabled():
        print("", f"{PEERS} peers:", *lines, sep="\n")  # noqa: T201 - the numbers are for the reader of the run
