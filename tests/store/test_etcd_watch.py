"""The watch: complete snapshots whatever happens to the connection, to the keys, or to etcd itself."""

from __future__ import annotations

import time
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from flanneld.lab import wait
from flanneld.lab.etcd import Etcd
from flanneld.lab.wait import wait_until
from subnet_lease import etcd_table, etcd_watch
from subnet_lease.lease import Lease
from tests.store.conftest import Network, request_of
from tests.store.tcp_proxy import TcpProxy

VALUE = '{"PublicIP":"192.168.64.%d","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}'


def put(network: Network, number: int, mac: str = "02:00:00:00:00:01") -> str:
    key = f"10.5.{number}.0-24"
    network.etcd.ctl("put", network.key(key), VALUE % (number, mac))
    return key


def mac_of(lease: Lease) -> str:
    return str(lease.attrs.backend_data["VtepMAC"])


def compact(network: Network) -> None:
    revision = network.etcd.ctl("put", "/elsewhere", "x", "-w=json").split('"revision":')[1].split(",")[0]
    network.etcd.ctl("compact", revision)


def test_first_snapshot_is_complete_and_later_ones_share_what_did_not_change(network: Network) -> None:
    keys = {put(network, 1), put(network, 2)}
    follower = network.follow(network.store())
    wait_until(lambda: follower.keys == keys)
    assert len(follower.snapshots) == 1
    put(network, 1, "02:00:00:00:00:99")
    wait_until(lambda: len(follower.snapshots) == 2)
    before, after = follower.snapshots
    assert mac_of(after.leases["10.5.1.0-24"]) == "02:00:00:00:00:99"
    assert after.leases["10.5.2.0-24"] is before.leases["10.5.2.0-24"]
    assert mac_of(before.leases["10.5.1.0-24"]) == "02:00:00:00:00:01"
    assert after.revision > before.revision


def test_expired_and_deleted_leases_go(network: Network) -> None:
    put(network, 1)
    etcd_lease = network.etcd.ctl("lease", "grant", "600").split()[1]
    network.etcd.ctl("put", network.key("10.5.2.0-24"), VALUE % (2, "x"), f"--lease={etcd_lease}")
    follower = network.follow(network.store())
    wait_until(lambda: len(follower.keys) == 2)
    assert follower.snapshots[-1].leases["10.5.1.0-24"].reservation
    assert not follower.snapshots[-1].leases["10.5.2.0-24"].reservation
    network.etcd.ctl("lease", "revoke", etcd_lease)
    wait_until(lambda: follower.keys == {"10.5.1.0-24"})
    network.etcd.ctl("del", network.key("10.5.1.0-24"))
    wait_until(lambda: follower.keys == set())


def test_new_connections_miss_nothing_and_are_no_failure(network: Network) -> None:
    first = put(network, 1)
    store = network.store()
    follower = network.follow(store)
    wait_until(lambda: follower.keys == {first})
    with capture_logs() as lines:
        for number in range(2, 6):
            put(network, number)
            store.reconnect()
            put(network, number + 10)
        wait_until(lambda: len(follower.keys) == 9)
    assert store.read_config()
    assert not store.status.errors and store.status.failure is None
    assert not lines


@pytest.mark.field_problem(5)
def test_bad_keys_and_values_withdraw_nothing(network: Network) -> None:
    good = put(network, 1)
    store = network.store()
    follower = network.follow(store)
    wait_until(lambda: follower.keys == {good})
    with capture_logs() as lines:
        network.etcd.ctl("put", network.key("foo"), "bar")
        network.etcd.ctl("put", network.key("10.5.300.0-24"), VALUE % (3, "x"))
        network.etcd.ctl("put", network.key(good), "not JSON")
        network.etcd.ctl("put", f"{network.prefix}/subnets-old/10.5.9.0-24", VALUE % (9, "x"))
        network.etcd.ctl("put", f"{network.prefix}2/subnets/10.5.9.0-24", VALUE % (9, "x"))
        wait_until(lambda: store.status.errors.get("bad_key") == 3)
        also = put(network, 2)
        wait_until(lambda: follower.keys == {good, also})
    assert follower.snapshots[-1].leases[good] is follower.snapshots[0].leases[good]
    assert [line["key"] for line in lines if line["log_level"] == "warning"] == ["foo", "10.5.300.0-24", good]
    # And a daemon that starts now sees the rest.
    late = network.follow(network.store())
    wait_until(lambda: late.keys == {also})


@pytest.mark.field_problem(5)
def test_bad_and_missing_configuration_leaves_the_last_good_one(network: Network) -> None:
    key = put(network, 1)
    store = network.store()
    follower = network.follow(store)
    wait_until(lambda: follower.keys == {key})
    network.configure('{"Network":"10.5.0.0/33"}')
    wait_until(lambda: "10.5.0.0/33" in (store.status.config_error or ""))
    assert store.status.errors.get("config_invalid") == 1
    network.etcd.ctl("del", f"{network.prefix}/config")
    wait_until(lambda: f"{network.prefix}/config is gone" in (store.status.config_error or ""))
    assert store.status.errors.get("config_missing") == 1
    assert len(follower.snapshots) == 1
    network.configure('{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}')
    wait_until(lambda: follower.snapshots[-1].config.backend_type == "host-gw")
    assert store.status.config_error is None
    assert follower.keys == {key}


def test_watch_waits_for_a_configuration(network: Network) -> None:
    network.etcd.ctl("del", f"{network.prefix}/config")
    store = network.store()
    follower = network.follow(store)
    wait_until(lambda: "no usable network configuration" in str(store.status.failure))
    network.configure()
    wait_until(lambda: follower.snapshots)
    wait_until(lambda: store.status.failure is None)


def test_watch_opens_before_etcd_is_there(own_network: Network) -> None:
    own_network.etcd.stop()
    store = own_network.store()
    follower = own_network.follow(store)
    wait_until(lambda: own_network.etcd.endpoint in str(store.status.failure))
    own_network.etcd.start()
    wait_until(lambda: follower.snapshots, timeout=30)


@pytest.mark.field_problem(4)
def test_after_a_break_with_compaction_changed_attributes_are_seen(own_network: Network) -> None:
    keys = {put(own_network, 1), put(own_network, 2), put(own_network, 3)}
    with TcpProxy(own_network.etcd.port) as wire:
        follower = own_network.follow(own_network.store(endpoints=[wire.endpoint]))
        wait_until(lambda: follower.keys == keys)
        wire.cut()
        put(own_network, 1, "02:00:00:00:00:99")
        own_network.etcd.ctl("del", own_network.key("10.5.2.0-24"))
        compact(own_network)
        wire.mend()
        wait_until(lambda: follower.keys == keys - {"10.5.2.0-24"}, timeout=30)
        assert mac_of(follower.snapshots[-1].leases["10.5.1.0-24"]) == "02:00:00:00:00:99"
        assert follower.snapshots[-1].leases["10.5.3.0-24"] is follower.snapshots[0].leases["10.5.3.0-24"]
        put(own_network, 4)
        wait_until(lambda: "10.5.4.0-24" in follower.keys)


def test_after_a_short_break_the_watch_resumes_without_a_new_list(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(network, 1)
    last = put(network, 2)
    lists: list[int] = []
    replace = etcd_table.SnapshotTable.replace
    monkeypatch.setattr(
        etcd_table.SnapshotTable, "replace", lambda self, *args: lists.append(1) or replace(self, *args)
    )
    with TcpProxy(network.etcd.port) as wire:
        follower = network.follow(network.store(endpoints=[wire.endpoint]))
        wait_until(lambda: follower.keys == {"10.5.1.0-24", last})
        wire.cut()
        put(network, 1, "02:00:00:00:00:99")
        put(network, 3)
        wire.mend()
        wait_until(lambda: "10.5.3.0-24" in follower.keys, timeout=30)
        assert mac_of(follower.snapshots[-1].leases["10.5.1.0-24"]) == "02:00:00:00:00:99"
        assert len(lists) == 1


@pytest.mark.field_problem(14)
def test_a_dead_connection_is_noticed_and_outlasted(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_watch, "QUIET", 0.5)
    monkeypatch.setattr(etcd_watch, "SILENT", 1.0)
    key = put(network, 1)
    with TcpProxy(network.etcd.port) as wire:
        store = network.store(endpoints=[wire.endpoint])
        follower = network.follow(store)
        wait_until(lambda: follower.keys == {key})
        heard = store.status.last_contact
        wait_until(lambda: (store.status.last_contact or 0) > (heard or 0))  # without any event
        wire.freeze()
        wait_until(lambda: store.status.failure)
        stale = store.status.last_contact or 0.0
        time.sleep(0.2)
        assert store.status.last_contact == stale  # the watch age grows
        wire.mend()
        wait_until(lambda: store.status.failure is None, timeout=30)
        also = put(network, 2)
        wait_until(lambda: follower.keys == {key, also})


@pytest.mark.field_problem(14)
def test_etcd_restarts(own_network: Network) -> None:
    key = put(own_network, 1)
    store = own_network.store()
    follower = own_network.follow(store)
    wait_until(lambda: follower.keys == {key})
    with capture_logs() as lines:
        own_network.etcd.stop()
        wait_until(lambda: store.status.failure)
        own_network.etcd.start()
        also = put(own_network, 2)
        wait_until(lambda: follower.keys == {key, also}, timeout=30)
        wait_until(lambda: lines[-1]["event"] == "the watch on the store works again")
    # One line when it breaks (a second if the reason changes meanwhile), one when it heals.
    assert 2 <= len(lines) <= 4
    assert lines[-1]["event"] == "the watch on the store works again"


@pytest.mark.field_problem(14)
def test_after_a_wipe_peers_stay_until_they_have_come_back(
    own_network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_table, "GRACE", 2 + 2 * wait.patience)  # in which b must come back
    nodes = {name: own_network.store(f"kernel-{name}") for name in "abc"}
    config = nodes["a"].read_config()
    leases = {
        name: store.acquire(config, request_of(name, f"192.168.64.{number}"))
        for number, (name, store) in enumerate(nodes.items(), 1)
    }
    follower = own_network.follow(nodes["a"])
    wait_until(lambda: len(follower.keys) == 3)
    own_network.etcd.stop(wipe=True)
    own_network.etcd.start()
    own_network.configure()
    # Ours is gone, so that the daemon claims it again; the peers' are still in use.
    wait_until(lambda: leases["a"].key not in follower.keys, timeout=30)
    assert follower.keys == {leases["b"].key, leases["c"].key}
    for name in "ab":
        request = request_of(name, str(leases[name].attrs.public_ip), previous=(leases[name].subnet, None), keep=True)
        assert wait_until(lambda: nodes[name].acquire(config, request), timeout=30).key == leases[name].key
    wait_until(lambda: leases["a"].key in follower.keys)
    # The one that never came back goes in the end; the others were never absent.
    wait_until(lambda: follower.keys == {leases["a"].key, leases["b"].key}, timeout=30)
    assert all(leases["b"].key in snapshot.leases for snapshot in follower.snapshots)


@pytest.mark.field_problem(14)
def test_after_a_restore_the_snapshot_is_what_etcd_says(
    own_network: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(etcd_table, "GRACE", 3.0)
    etcd = own_network.etcd
    put(own_network, 1, "02:00:00:00:00:01")
    put(own_network, 2)
    etcd.ctl("snapshot", "save", str(tmp_path / "backup.db"))
    put(own_network, 1, "02:00:00:00:00:99")
    etcd.ctl("del", own_network.key("10.5.2.0-24"))
    put(own_network, 3)
    follower = own_network.follow(own_network.store())
    wait_until(lambda: follower.keys == {"10.5.1.0-24", "10.5.3.0-24"})
    etcd.stop(wipe=True)
    restore(etcd, tmp_path / "backup.db")
    etcd.start()
    # What the backup knows is taken at once; what it does not know has a while to come back.
    wait_until(lambda: "10.5.2.0-24" in follower.keys, timeout=30)
    restored = next(snapshot.leases for snapshot in follower.snapshots if "10.5.2.0-24" in snapshot.leases)
    assert mac_of(restored["10.5.1.0-24"]) == "02:00:00:00:00:01"
    assert "10.5.3.0-24" in restored
    wait_until(lambda: follower.keys == {"10.5.1.0-24", "10.5.2.0-24"}, timeout=30)


def restore(etcd: Etcd, backup: Path) -> None:
    etcd.ctl(
        "snapshot", "restore", str(backup), f"--data-dir={etcd.directory / 'data'}", "--name=lab",
        f"--initial-cluster=lab={etcd.peer_url}", f"--initial-advertise-peer-urls={etcd.peer_url}",
    )  # fmt: skip


@pytest.mark.field_problem(14)
def test_a_restored_etcd_that_has_overtaken_the_old_one_is_not_mistaken_for_it(
    own_network: Network, tmp_path: Path
) -> None:
    etcd = own_network.etcd
    put(own_network, 1)
    etcd.ctl("snapshot", "save", str(tmp_path / "backup.db"))
    put(own_network, 2)
    with TcpProxy(etcd.port) as wire:
        follower = own_network.follow(own_network.store(endpoints=[wire.endpoint]))
        wait_until(lambda: len(follower.keys) == 2)
        wire.cut()
        etcd.stop(wipe=True)
        restore(etcd, tmp_path / "backup.db")
        etcd.start()
        put(own_network, 5)
        for _ in range(5):
            etcd.ctl("put", "/elsewhere", "x")
        wire.mend()
        # A watch resumed at the old revision would never see what came before it in the new history.
        wait_until(lambda: {"10.5.1.0-24", "10.5.5.0-24"} <= follower.keys, timeout=30)


def test_the_whole_prefix_deleted_keeps_the_peers_for_a_while(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_table, "GRACE", 1.0 * wait.patience)  # in which the new one must be put
    key = put(network, 1)
    follower = network.follow(network.store())
    wait_until(lambda: follower.keys == {key})
    network.etcd.ctl("del", "--prefix", network.prefix)
    put(network, 2)
    wait_until(lambda: {key, "10.5.2.0-24"} in [set(snapshot.leases) for snapshot in follower.snapshots])
    wait_until(lambda: follower.keys == {"10.5.2.0-24"})


@pytest.mark.field_problem(18)
def test_a_storm_ends_in_the_exact_state(network: Network) -> None:
    follower = network.follow(network.store())
    wait_until(lambda: follower.snapshots)
    client = network.store()._connection
    expected = {}
    for turn in range(600):
        key = f"10.5.{turn % 40}.0-24"
        if turn % 7 == 3:
            client.call("delete", lambda c, key=key: c.delete(network.key(key)))
            expected.pop(key, None)
        else:
            client.call("put", lambda c, key=key, turn=turn: c.put(network.key(key), VALUE % (turn % 200 + 1, turn)))
            expected[key] = IPv4Address(f"192.168.64.{turn % 200 + 1}")
    wait_until(lambda: {k: v.attrs.public_ip for k, v in follower.snapshots[-1].leases.items()} == expected)
    assert all(a.revision < b.revision for a, b in zip(follower.snapshots, follower.snapshots[1:], strict=False))


def test_signs_of_life_wake_nobody(network: Network) -> None:
    follower = network.follow(network.store())
    wait_until(lambda: follower.snapshots)
    network.etcd.ctl("put", f"{network.prefix}/up/10.5.1.0-24", "{}")
    key = put(network, 1)
    wait_until(lambda: follower.keys == {key})
    assert len(follower.snapshots) == 2
