"""Leases in a real etcd: claim, take back, renew, publish, release, reserve, and who a node is."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import pytest
from structlog.testing import capture_logs

from flanneld.lab.wait import wait_until
from subnet_lease import allocation
from subnet_lease.lease import Lease
from subnet_lease.store import AddressInUse, ConfigInvalid, ConfigMissing, LeaseLost, OutOfSubnets, SubnetTaken
from tests.store.conftest import Network, request_of

FLANNELD = (
    '{"PublicIP":"%s","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
)


def join(network: Network, name: str, ip: str, machine: str | None = None, **changes: object) -> Lease:
    store = network.store(machine)
    return store.acquire(store.read_config(), request_of(name, ip, **changes))


def revision(network: Network, lease: Lease) -> int:
    return next(each.revision for each in network.store()._keys.all() if each.key == lease.key)


def test_key_and_value_are_flannels(network: Network) -> None:
    lease = join(network, "a", "192.168.64.3", vtep="c6:d2:32:6f:8f:44")
    assert lease.subnet is not None
    assert lease.subnet.subnet_of(IPv4Network("10.5.0.0/16"))
    assert network.get(lease.key) == (
        FLANNELD[:-1] % "192.168.64.3" + ',"Node":{"Name":"a","MachineID":"machine-a","MAC":"02:00:a"}}'
    )
    ttl = network.etcd.ctl("lease", "timetolive", f"{lease.store_ref:x}")
    assert "granted with TTL(86400s)" in ttl


def test_restart_takes_the_lease_back_without_a_write(network: Network) -> None:
    first = join(network, "a", "192.168.64.3")
    again = join(network, "a", "192.168.64.3")
    assert again == first
    assert revision(network, first) == first.revision


def test_changed_attributes_are_rewritten_on_the_same_etcd_lease(network: Network) -> None:
    first = join(network, "a", "192.168.64.3")
    again = join(network, "a", "192.168.64.3", vtep="02:00:00:00:00:99")
    assert (again.key, again.store_ref) == (first.key, first.store_ref)
    assert again.revision == revision(network, first) > first.revision
    assert "02:00:00:00:00:99" in network.get(first.key)


@pytest.mark.parametrize(
    "changes",
    [{"name": "renamed"}, {"mac": "02:00:new-nic"}, {"ip": "192.168.64.77"}],
    ids=["renamed", "new NIC", "new address"],
)
def test_a_node_that_changed_one_thing_and_rebooted_has_its_lease_back(
    network: Network, changes: dict[str, str]
) -> None:
    store = network.store("boot-1")
    first = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    network.leave(store, first)
    marks = {"name": "a", "ip": "192.168.64.3", "machine_id": "machine-a", "mac": "02:00:a"} | changes
    assert join(network, **marks, machine="boot-2").key == first.key
    assert network.keys() == [first.key]


@pytest.mark.field_problem(10)
def test_a_clone_with_its_own_address_gets_its_own_lease(network: Network) -> None:
    """Same machine-id and host name, as after copying a disk; and even the same MAC."""
    first = join(network, "a", "192.168.64.3", "kernel-1")
    clone = join(network, "a", "192.168.64.4", "kernel-2", mac="02:00:other")
    twin = join(network, "a", "192.168.64.5", "kernel-3")
    assert len({first.key, clone.key, twin.key}) == 3
    # And each has its own back after a restart.
    assert join(network, "a", "192.168.64.5", "kernel-3").key == twin.key
    assert join(network, "a", "192.168.64.4", "kernel-2", mac="02:00:other").key == clone.key


@pytest.mark.field_problem(10)
def test_a_live_nodes_address_is_refused(network: Network) -> None:
    store = network.store("kernel-1")
    lease = store.acquire(store.read_config(), request_of("vagrant-a", "10.0.2.15"))
    with pytest.raises(AddressInUse) as refused:
        join(network, "vagrant-b", "10.0.2.15", "kernel-2")
    text = str(refused.value)
    assert all(word in text for word in ("10.0.2.15", "vagrant-a", "vagrant-b", "--public-ip", "--iface", lease.cidr))
    with pytest.raises(AddressInUse):  # a full clone of it, all marks alike
        join(network, "vagrant-a", "10.0.2.15", "kernel-2")
    assert network.keys() == [lease.key]
    network.leave(store, lease)
    assert join(network, "vagrant-b", "10.0.2.15", "kernel-2").key == lease.key


@pytest.mark.field_problem(10)
def test_publishing_a_live_nodes_address_is_refused(network: Network) -> None:
    join(network, "a", "192.168.64.3", "kernel-1")
    store = network.store("kernel-2")
    request = request_of("b", "192.168.64.4")
    lease = store.acquire(store.read_config(), request)
    with pytest.raises(AddressInUse):
        store.publish(lease, dataclasses.replace(request.attrs, public_ip=IPv4Address("192.168.64.3")))


def test_a_flannelds_lease_is_taken_over_by_public_ip(network: Network) -> None:
    etcd_lease = network.etcd.ctl("lease", "grant", "600").split()[1]
    network.etcd.ctl("put", network.key("10.5.52.0-24"), FLANNELD % "192.168.64.3", f"--lease={etcd_lease}")
    lease = join(network, "a", "192.168.64.3", vtep="c6:d2:32:6f:8f:44")
    assert (lease.key, lease.store_ref) == ("10.5.52.0-24", int(etcd_lease, 16))


def test_previous_subnets_are_preferred_while_free(network: Network) -> None:
    previous = (IPv4Network("10.5.77.0/24"), None)
    assert join(network, "a", "192.168.64.3", previous=previous).subnet == previous[0]
    assert join(network, "b", "192.168.64.4", previous=previous).subnet != previous[0]


@pytest.mark.field_problem(13)
def test_a_standing_data_path_keeps_its_subnet_or_says_that_it_is_taken(network: Network) -> None:
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    network.etcd.ctl("del", network.key(lease.key))
    with pytest.raises(LeaseLost):
        store.renew(lease)
    keep = request_of("a", "192.168.64.3", previous=(lease.subnet, None), keep=True)
    back = store.acquire(store.read_config(), keep)
    assert back.key == lease.key

    network.etcd.ctl("del", network.key(lease.key))
    thief = join(network, "b", "192.168.64.4", previous=(lease.subnet, None))
    assert thief.key == lease.key
    with pytest.raises(SubnetTaken) as taken:
        store.acquire(store.read_config(), keep)
    assert "'b'" in str(taken.value)
    assert lease.cidr in str(taken.value)
    assert network.keys() == [lease.key]


@pytest.mark.field_problem(11)
def test_whoever_lost_its_lease_never_writes_again(network: Network) -> None:
    """SIGSTOP beyond the lease's end: another node takes the subnet, then the first one wakes up."""
    store = network.store("kernel-1")
    request = request_of("a", "192.168.64.3")
    lease = store.acquire(store.read_config(), request)
    network.etcd.ctl("lease", "revoke", f"{lease.store_ref:x}")
    thief = join(network, "b", "192.168.64.4", "kernel-2", previous=(lease.subnet, None))
    assert thief.key == lease.key
    with pytest.raises(LeaseLost, match="'b'"):
        store.renew(lease)
    with pytest.raises(LeaseLost):
        store.publish(lease, dataclasses.replace(request.attrs, public_ip=IPv4Address("192.168.64.9")))
    with pytest.raises(LeaseLost):
        store.release(lease)
    assert revision(network, thief) == thief.revision


def test_renewal_prolongs_the_etcd_lease_and_touches_no_key(network: Network) -> None:
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    store._renewed.clear()  # as if an hour had passed
    assert 0 < store.renew(lease) <= 60
    assert lease.store_ref in store._renewed
    assert revision(network, lease) == lease.revision


def test_a_restarted_nodes_etcd_lease_is_kept_alive(network: Network) -> None:
    etcd_lease = network.etcd.ctl("lease", "grant", "600").split()[1]
    network.etcd.ctl("put", network.key("10.5.52.0-24"), FLANNELD % "192.168.64.3", f"--lease={etcd_lease}")

    def end() -> float:
        """When it ends, by our clock and not too late; a slow answer makes it earlier."""
        asked = time.monotonic()
        told = network.etcd.ctl("lease", "timetolive", etcd_lease)
        return asked + int(re.findall(r"remaining\((\d+)s\)", told)[0])

    started, before = time.monotonic(), end()
    wait_until(lambda: time.monotonic() > started + 3, 5, "three seconds of its life to pass")
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    assert lease.store_ref == int(etcd_lease, 16)
    wait_until(lambda: end() >= before + 2, 5, "an end put off")


@pytest.mark.field_problem(39)
def test_a_reservation_stays_one(network: Network) -> None:
    network.etcd.ctl("put", network.key("10.5.52.0-24"), FLANNELD % "192.168.64.3")
    for _ in range(2):
        store = network.store()
        lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
        assert (lease.key, lease.reservation, lease.store_ref) == ("10.5.52.0-24", True, 0)
        store.renew(lease)
        lease = store.publish(lease, dataclasses.replace(lease.attrs, public_ip=IPv4Address("192.168.64.3")))
        store.close()
    assert '"lease"' not in network.etcd.ctl("get", "-w=json", network.key("10.5.52.0-24"))


@pytest.mark.field_problem(39)
def test_a_reservation_stays_one_when_an_address_family_is_turned_on(network: Network) -> None:
    network.etcd.ctl("put", network.key("10.5.52.0-24"), FLANNELD % "192.168.64.3")
    network.configure('{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00:5::/48"}')
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    assert lease.key.startswith("10.5.52.0-24&fc00:5:0:") and lease.reservation
    assert network.keys() == [lease.key]
    assert '"lease"' not in network.etcd.ctl("get", "-w=json", network.key(lease.key))
    assert store.renew(lease) > 0


DUAL = '{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00:5::/48"}'


@pytest.mark.field_problem(13)
def test_a_lease_that_changes_its_shape_is_at_no_moment_away(network: Network) -> None:
    store = network.store()
    v4 = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    follower = network.follow(network.store())
    wait_until(lambda: follower.keys == {v4.key})
    network.configure(DUAL)
    both = store.acquire(store.read_config(), request_of("a", "192.168.64.3", previous=(v4.subnet, None), keep=True))
    assert both.subnet == v4.subnet and both.ipv6_subnet is not None
    wait_until(lambda: follower.keys == {both.key})
    assert all(len(snapshot.leases) == 1 for snapshot in follower.snapshots)
    assert network.keys() == [both.key]


@pytest.mark.field_problem(12)
def test_a_lease_that_must_give_way_while_it_changes_its_shape_stays_as_it_was(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.etcd.ctl("put", network.key("10.5.52.0-24"), FLANNELD % "192.168.64.3")  # a reservation
    network.configure(DUAL)
    rival = join(network, "b", "192.168.64.4")
    chosen = [(IPv4Network("10.5.52.0/24"), rival.ipv6_subnet)]
    choose = allocation.choose

    def first_what_another_has(*arguments: Any) -> allocation.Subnets:
        return chosen.pop() if chosen else choose(*arguments)

    monkeypatch.setattr(allocation, "choose", first_what_another_has)
    lease = join(network, "a", "192.168.64.3")
    assert not chosen and lease.subnet == IPv4Network("10.5.52.0/24") and lease.reservation
    assert network.keys() == sorted([lease.key, rival.key])


@pytest.mark.field_problem(39)
def test_a_lease_that_an_operator_makes_permanent_is_not_lost(network: Network) -> None:
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    network.etcd.ctl("put", network.key(lease.key), network.get(lease.key))  # without an etcd lease
    assert store.renew(lease) > 0
    network.etcd.ctl("put", network.key(lease.key), network.get(lease.key).replace("192.168.64.3", "192.168.64.4"))
    with pytest.raises(LeaseLost, match="rewritten by another process"):
        store.renew(lease)


@pytest.mark.field_problem(39)
def test_a_reservation_for_a_name_is_given_to_the_node_of_that_name_and_no_other(network: Network) -> None:
    reserved = '{"PublicIP":"0.0.0.0","PublicIPv6":null,"Node":{"Name":"a","MachineID":"","MAC":""}}'
    network.etcd.ctl("put", network.key("10.5.52.0-24"), reserved)
    assert join(network, "b", "192.168.64.4").key != "10.5.52.0-24"
    store = network.store()
    request = request_of("a", "192.168.64.3", previous=(IPv4Network("10.5.77.0/24"), None))
    lease = store.acquire(store.read_config(), request)
    assert (lease.key, lease.reservation, lease.store_ref) == ("10.5.52.0-24", True, 0)
    assert network.get(lease.key) == (
        FLANNELD[:-1].replace("c6:d2:32:6f:8f:44", "02:00:00:00:00:01") % "192.168.64.3"
        + ',"Node":{"Name":"a","MachineID":"machine-a","MAC":"02:00:a"}}'
    )
    store.renew(lease)
    assert join(network, "a", "192.168.64.5", "another kernel", machine_id="m", mac="02:00:m").key != lease.key


@pytest.mark.field_problem(39)
def test_a_running_node_takes_the_reservation_that_replaced_its_lease(network: Network) -> None:
    store = network.store("kernel-1")
    request = request_of("a", "192.168.64.3")
    lease = store.acquire(store.read_config(), request)
    network.etcd.ctl("put", network.key(lease.key), '{"PublicIP":"0.0.0.0","Node":{"Name":"a"}}')
    keep = dataclasses.replace(request, previous=(lease.subnet, lease.ipv6_subnet), keep=True)
    again = store.acquire(store.read_config(), keep)
    assert (again.key, again.reservation, again.attrs.node) == (lease.key, True, request.identity)


def test_a_reservation_outside_the_network_is_told(network: Network) -> None:
    network.configure('{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}')
    network.etcd.ctl("put", network.key("10.5.52.0-24"), '{"PublicIP":"192.168.64.3"}')
    with capture_logs() as logs:
        lease = join(network, "a", "192.168.64.3")
    assert lease.key != "10.5.52.0-24"
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert "the subnet reserved for this node" in warning["event"]
    assert (warning["reserved"], warning["leased"]) == ("10.5.52.0/24", lease.cidr)
    assert network.keys() == sorted([lease.key, "10.5.52.0-24"])


@pytest.mark.field_problem(41)
def test_release_frees_the_subnet_at_once(network: Network) -> None:
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    store.release(lease)
    assert network.keys() == []
    assert network.etcd.ctl("get", "--prefix", "--keys-only", f"{network.prefix}/up/").strip() == ""
    assert "already expired" in network.etcd.ctl("lease", "timetolive", f"{lease.store_ref:x}")


@pytest.mark.field_problem(12)
def test_50_nodes_that_join_a_nearly_full_network_at_once_all_get_a_subnet(network: Network) -> None:
    """/18 in /24s is 63 subnets; 13 are taken, so that every one of the rest is needed."""
    network.configure('{"Network":"10.5.0.0/18","Backend":{"Type":"vxlan"}}')
    for number in range(1, 14):
        network.etcd.ctl("put", network.key(f"10.5.{number}.0-24"), FLANNELD % f"192.168.65.{number}")
    leases: list[Lease] = []
    failures: list[BaseException] = []
    start = threading.Barrier(50)

    def run(number: int) -> None:
        try:
            store = network.store(f"kernel-{number}")
            config = store.read_config()
            start.wait(60)
            leases.append(store.acquire(config, request_of(f"n{number}", f"192.168.64.{number + 1}")))
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert failures == []
    assert len({lease.key for lease in leases}) == 50
    assert len(network.keys()) == 63
    with pytest.raises(OutOfSubnets) as full:
        join(network, "late", "192.168.64.200")
    assert "all 63 IPv4 subnets" in str(full.value)
    assert "13 of them reservations" in str(full.value)


def test_dual_stack_nodes_that_join_at_once_share_no_subnet_of_either_family(network: Network) -> None:
    network.configure(
        '{"EnableIPv6":true,"Network":"10.5.0.0/20","IPv6Network":"fc00:5::/60","Backend":{"Type":"vxlan"}}'
    )
    leases: list[Lease] = []
    start = threading.Barrier(12)

    def run(number: int) -> None:
        store = network.store(f"kernel-{number}")
        config = store.read_config()
        start.wait(60)
        leases.append(store.acquire(config, request_of(f"n{number}", f"192.168.64.{number + 1}")))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({lease.subnet for lease in leases}) == len({lease.ipv6_subnet for lease in leases}) == 12
    assert len(network.keys()) == 12


def test_ipv6_only(network: Network) -> None:
    network.configure('{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00:5::/48","Backend":{"Type":"vxlan"}}')
    lease = join(network, "a", "192.168.64.3")
    assert lease.subnet is None
    assert lease.ipv6_subnet is not None
    assert lease.ipv6_subnet.subnet_of(IPv6Network("fc00:5::/48"))
    assert lease.key.startswith("0.0.0.0-0&fc00:5:0:")
    assert join(network, "a", "192.168.64.3") == lease


def test_a_lease_that_no_longer_fits_the_network_is_replaced(network: Network) -> None:
    first = join(network, "a", "192.168.64.3")
    network.configure('{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}')
    second = join(network, "a", "192.168.64.3")
    assert second.subnet is not None
    assert second.subnet.subnet_of(IPv4Network("10.6.0.0/16"))
    assert network.keys() == [second.key]
    assert first.key != second.key


def test_an_overlapping_lease_of_another_length_blocks_its_subnets(network: Network) -> None:
    network.configure('{"Network":"10.5.0.0/22","SubnetLen":24,"Backend":{"Type":"vxlan"}}')
    network.etcd.ctl("put", network.key("10.5.2.0-23"), FLANNELD % "192.168.64.9")
    assert join(network, "a", "192.168.64.3").key == "10.5.1.0-24"
    with pytest.raises(OutOfSubnets):
        join(network, "b", "192.168.64.4")


def test_configuration_missing_and_malformed(network: Network) -> None:
    store = network.store()
    network.etcd.ctl("del", f"{network.prefix}/config")
    with pytest.raises(ConfigMissing, match=f"{network.prefix}/config"):
        store.read_config()
    network.configure('{"Network":"10.5.0.0/16","SubnetLen":"24"}')
    with pytest.raises(ConfigInvalid, match="SubnetLen"):
        store.read_config()


def test_own_lease_is_found_before_it_is_claimed(network: Network) -> None:
    store = network.store()
    request = request_of("a", "192.168.64.3", vtep="02:00:00:00:00:55")
    assert store.find_own(request) is None
    lease = store.acquire(store.read_config(), request)
    found = network.store().find_own(request_of("a", "192.168.64.3"))
    assert found is not None
    assert (found.key, found.attrs.backend_data["VtepMAC"]) == (lease.key, "02:00:00:00:00:55")


def test_the_sign_of_life_goes_with_the_node_and_wakes_no_flanneld(network: Network) -> None:
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    up = f"{network.prefix}/up/{lease.key}"
    assert network.etcd.ctl("get", "--keys-only", up).strip() == up
    assert not up.startswith(f"{network.prefix}/subnets")
    store.close()
    wait_until(lambda: network.etcd.ctl("get", "--keys-only", up).strip() == "")
    assert network.keys() == [lease.key]


def test_out_of_subnets_names_nodes_that_are_not_alive(network: Network) -> None:
    network.configure('{"Network":"10.5.0.0/22","Backend":{"Type":"vxlan"}}')
    stores = {name: network.store(f"kernel-{name}") for name in ("gone", "here", "there")}
    leases = {
        name: store.acquire(store.read_config(), request_of(name, f"192.168.64.{number}"))
        for number, (name, store) in enumerate(stores.items(), 1)
    }
    network.leave(stores["gone"], leases["gone"])
    with pytest.raises(OutOfSubnets, match=r"to be reclaimed: 10\.5\.[123]\.0/24 of 'gone'$"):
        join(network, "late", "192.168.64.9", "kernel-late")


@pytest.mark.field_problem(5)
def test_a_lease_with_an_unreadable_value_still_takes_its_subnet(network: Network) -> None:
    network.configure('{"Network":"10.5.0.0/22","Backend":{"Type":"vxlan"}}')
    network.etcd.ctl("put", network.key("10.5.1.0-24"), "not JSON")
    network.etcd.ctl("put", network.key("10.5.2.0-24"), "{}")
    assert join(network, "a", "192.168.64.3", previous=(IPv4Network("10.5.1.0/24"), None)).key == "10.5.3.0-24"
    assert network.get("10.5.1.0-24") == "not JSON"


@pytest.mark.field_problem(5)
def test_an_unreadable_value_in_a_nodes_own_lease_is_written_again(network: Network) -> None:
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    value = network.get(lease.key)
    network.etcd.ctl("put", network.key(lease.key), "garbage")
    with capture_logs() as logs:
        store.renew(lease)
        store.renew(lease)
    assert network.get(lease.key) == value
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [
        "somebody wrote into this node's lease what nobody can read; it is written again"
    ]
    assert f'"lease":{lease.store_ref}' in network.etcd.ctl("get", "-w=json", network.key(lease.key))


@pytest.mark.field_problem(5)
def test_what_must_be_kept_is_claimed_over_an_unreadable_value_but_not_over_a_live_node(network: Network) -> None:
    request = request_of("a", "192.168.64.3", previous=(IPv4Network("10.5.52.0/24"), None), keep=True)
    network.etcd.ctl("put", network.key("10.5.52.0-24"), "garbage")
    network.etcd.ctl("put", f"{network.prefix}/up/10.5.52.0-24", '{"Instance":"another kernel","Node":"b"}')
    store = network.store()
    with pytest.raises(SubnetTaken, match=r"is taken by 10\.5\.52\.0/24, whose value nobody can read.*release"):
        store.acquire(store.read_config(), request)
    network.etcd.ctl("del", f"{network.prefix}/up/10.5.52.0-24")
    lease = store.acquire(store.read_config(), request)
    assert (lease.key, lease.reservation) == ("10.5.52.0-24", False)
    assert f'"lease":{lease.store_ref}' in network.etcd.ctl("get", "-w=json", network.key(lease.key))


def test_out_of_subnets_names_what_cannot_be_read(network: Network) -> None:
    network.configure('{"Network":"10.5.0.0/22","Backend":{"Type":"vxlan"}}')
    for number in (1, 2, 3):
        network.etcd.ctl("put", network.key(f"10.5.{number}.0-24"), "{}" if number < 3 else "garbage")
    with pytest.raises(OutOfSubnets, match=r"value cannot be read: 10\.5\.3\.0/24\. "):
        join(network, "late", "192.168.64.9")


def test_prefixes_are_joined_as_flannel_does(network: Network) -> None:
    store = network.store()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    network.prefix = network.prefix.replace("/network", "//network/")
    assert network.store().find_own(request_of("a", "192.168.64.3")) == lease
