"""Nodes and networks that change while the daemon runs; each change is followed within its promise, subnet kept."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flanneld.lab.hosts import Host, Lab
from flanneld.lab.wait import Promised, wait_until
from tests.system.backend_cases import needs_wireguard
from tests.system.kernel_text import kernel_text

SOON = Promised(5)
LATER = 10.0
KERNEL = ("link", "address", "routes", "routes6", "neighbours", "fdb", "iptables")
OTHERS = ["host-gw", "udp", pytest.param("wireguard", marks=needs_wireguard)]


@pytest.fixture
def running(lab: Lab) -> Lab:
    lab.start_daemons()
    lab.wait_peers()
    for host in lab.hosts:
        host.container("c")
    return lab


def pings(lab: Lab) -> bool:
    """Containers of all hosts reach each other."""
    boxes = [host.containers[0] for host in lab.hosts]
    return all(a.ping(b).ok for a in boxes for b in boxes if a is not b)


def lease_of(lab: Lab, host: Host) -> dict:
    key = "/coreos.com/network/subnets/" + host.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0-24")
    return json.loads(lab.etcd.ctl("get", "--print-value-only", key))


def link(host: Host, dev: str = "flannel.1") -> dict:
    return json.loads(host.run(f"ip -d -j link show dev {dev}"))[0]


@pytest.mark.field_problem(17)
def test_the_underlays_mtu_is_followed_in_place(running: Lab) -> None:
    host = running.hosts[0]
    index = link(host)["ifindex"]
    host.run("ip link set eth0 mtu 1400")
    wait_until(lambda: link(host)["mtu"] == 1350, SOON, "the device's MTU")
    wait_until(lambda: host.daemon.subnet_env()["FLANNEL_MTU"] == "1350", SOON, "subnet.env")
    assert link(host)["ifindex"] == index, "the device was made anew"
    host.run("ip link set eth0 mtu 1500")
    wait_until(lambda: link(host)["mtu"] == 1450, SOON, "and back")
    wait_until(lambda: pings(running), SOON, "pings between all containers")


@pytest.mark.field_problem(22)
def test_the_underlays_address_is_followed_and_the_subnet_kept(running: Lab) -> None:
    host = running.hosts[0]
    subnet, mac = host.daemon.subnet_env()["FLANNEL_SUBNET"], link(host)["address"]
    take_another_address(running)
    assert link(host)["linkinfo"]["info_data"]["local"] == "172.30.0.111"
    assert host.daemon.subnet_env()["FLANNEL_SUBNET"] == subnet
    assert link(host)["address"] == mac
    for other in running.hosts[1:]:
        assert other.run("bridge fdb show dev flannel.1").count("172.30.0.111") == 1
        assert "172.30.0.11 " not in other.run("bridge fdb show dev flannel.1")


@pytest.mark.field_problem(22)
@pytest.mark.parametrize("backend", OTHERS)
def test_the_underlays_address_is_followed_whatever_the_backend(make_lab: Callable[..., Lab], backend: str) -> None:
    take_another_address(two_hosts(make_lab, backend))


def take_another_address(lab: Lab) -> None:
    """h1 loses its address and gets another, as by DHCP."""
    host = lab.hosts[0]
    host.run("ip addr del 172.30.0.11/24 dev eth0")
    host.run("ip addr add 172.30.0.111/24 dev eth0")
    host.run("ip route replace default via 172.30.0.1")
    wait_until(lambda: lease_of(lab, host)["PublicIP"] == "172.30.0.111", SOON, "the new address published")
    wait_until(lambda: pings(lab), SOON, "pings between all containers")
    wait_until(lambda: host.daemon.ready, SOON, "ready")


def two_hosts(make_lab: Callable[..., Lab], backend: str) -> Lab:
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": backend}})
    lab.start_daemons()
    for host in lab.hosts:
        host.container("c")
    wait_until(lambda: pings(lab), LATER, "pings")
    return lab


def test_another_interface_takes_over(running: Lab) -> None:
    """eth0 goes for good; its address comes back on an interface of another name."""
    take_over(running)


@pytest.mark.parametrize("backend", OTHERS)
def test_another_interface_takes_over_whatever_the_backend(make_lab: Callable[..., Lab], backend: str) -> None:
    take_over(two_hosts(make_lab, backend))


def take_over(lab: Lab) -> None:
    host = lab.hosts[0]
    host.run("ip link set eth0 down")
    host.run("ip link set eth0 name lan0")
    host.run("ip link set lan0 up")
    host.run("ip route replace default via 172.30.0.1")
    wait_until(lambda: pings(lab), SOON, "pings over the renamed interface")
    wait_until(lambda: host.daemon.ready, SOON, "ready")
    wait_until(lambda: host.daemon.get("/status").json()["interface"] == "lan0", SOON, "the interface in the status")


def test_an_interface_that_goes_is_told_and_the_daemon_waits_for_it(running: Lab) -> None:
    host = running.hosts[0]
    host.run("ip link set eth0 down")
    wait_until(lambda: not host.daemon.ready, LATER, "not ready")
    assert host.daemon.running
    host.run("ip link set eth0 up")
    host.run("ip route replace default via 172.30.0.1")
    wait_until(lambda: host.daemon.ready, SOON, "ready again")
    wait_until(lambda: pings(running), SOON, "pings")


@pytest.mark.field_problem(37)
def test_a_node_that_starts_before_its_network_waits_for_it(lab: Lab) -> None:
    host = lab.hosts[0]
    host.run("ip link set eth0 down")
    daemon = host.start_daemon()
    wait_until(lambda: "etcd" in daemon.output(), LATER, "a word about what it waits for")
    assert daemon.running and not daemon.ready
    host.run("ip link set eth0 up")
    host.run("ip route replace default via 172.30.0.1")
    daemon.wait_ready()


def test_backend_options_are_followed(running: Lab) -> None:
    running.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7, "MTU": 1400}})
    running.wait_peers(device="flannel.7", timeout=SOON)
    for host in running.hosts:
        wait_until(lambda host=host: "flannel.1" not in host.run("ip -br link"), SOON, "the old device gone")
        assert link(host, "flannel.7")["mtu"] == 1350
        wait_until(lambda host=host: host.daemon.subnet_env()["FLANNEL_MTU"] == "1350", SOON, "subnet.env")
    wait_until(lambda: pings(running), LATER, "pings")


def test_direct_routing_is_switched_live(running: Lab) -> None:
    running.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": True}})
    for host in running.hosts:
        wait_until(lambda host=host: host.run("ip route").count("dev eth0 proto 241") == 2, SOON, "direct routes")
        fdb = "bridge fdb show dev flannel.1"
        wait_until(lambda host=host: " dst " not in host.run(fdb), SOON, "no forwarding entries")
    wait_until(lambda: pings(running), SOON, "pings between all containers")
    running.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
    running.wait_peers(timeout=SOON)
    wait_until(lambda: "proto 241" not in running.hosts[0].run("ip route"), SOON, "the direct routes gone")
    wait_until(lambda: pings(running), SOON, "pings between all containers")


def test_rules_follow_the_mode(running: Lab) -> None:
    host = running.hosts[0]
    assert "FLANNEL-FWD" in host.run("iptables-save")
    running.set_config({"Network": "10.5.0.0/16", "EnableNFTables": True, "Backend": {"Type": "vxlan"}})
    wait_until(lambda: "table ip flannel-ipv4" in host.run("nft list ruleset"), SOON, "our table")
    wait_until(lambda: "FLANNEL" not in host.run("iptables-save"), SOON, "the chains gone")
    wait_until(lambda: pings(running), SOON, "pings between all containers")


def test_a_bad_configuration_changes_nothing(running: Lab) -> None:
    host = running.hosts[0]
    routes = host.run("ip route")
    running.set_config('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"')
    running.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "teleport"}})
    wait_until(lambda: "teleport" in host.daemon.get("/readyz").text, LATER, "not ready, and why")
    assert host.run("ip route") == routes
    wait_until(lambda: pings(running), SOON, "pings between all containers")
    running.set_config()
    wait_until(lambda: host.daemon.ready, LATER, "ready again")


def test_a_network_that_leaves_our_subnet_outside_says_what_to_do(running: Lab) -> None:
    host = running.hosts[0]
    routes = host.run("ip route")
    running.set_config({"Network": "10.77.0.0/16", "Backend": {"Type": "vxlan"}})
    wait_until(lambda: "drain the node" in host.daemon.get("/readyz").text, LATER, "the remedy")
    assert host.run("ip route") == routes
    wait_until(lambda: pings(running), SOON, "pings between all containers")
    for each in running.hosts:  # the remedy is all that it takes
        each.daemon.restart()
    for each in running.hosts:
        each.daemon.wait_ready()
    running.wait_peers()
    assert "10.5." not in host.ctl("leases").stdout
    assert host.daemon.subnet_env()["FLANNEL_NETWORK"] == "10.77.0.0/16"


def test_a_network_that_is_narrowed_leaves_no_route_behind(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(1)
    config = {"Network": "10.5.0.0/16", "SubnetMax": "10.5.100.0", "Backend": {"Type": "host-gw"}}
    lab.set_config(config)
    lab.etcd.ctl(
        "put", "/coreos.com/network/subnets/10.5.200.0-24", '{"PublicIP":"172.30.0.77","BackendType":"host-gw"}'
    )
    host = lab.hosts[0]
    host.start_daemon(wait=True)
    wait_until(lambda: "10.5.200.0/24 via 172.30.0.77" in host.run("ip route"), SOON, "the peer's route")
    lab.set_config({**config, "Network": "10.5.0.0/17"})
    wait_until(lambda: "10.5.200.0/24" not in host.run("ip route"), SOON, "the route outside the network gone")


@pytest.mark.field_problem(6)
def test_an_address_family_is_turned_on_and_off_and_the_other_one_stays(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(2, underlay6="2001:db8:30::/64")
    v4 = {"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}
    lab.set_config(v4)
    lab.start_daemons()
    for host in lab.hosts:
        host.container("c")
    wait_until(lambda: pings(lab), LATER, "pings")
    host, subnets = lab.hosts[0], [host.daemon.subnet_env()["FLANNEL_SUBNET"] for host in lab.hosts]
    # Not nft: iptables leaves its own empty table for IPv6.
    before = kernel_text(host, only=KERNEL)
    lab.set_config({**v4, "EnableIPv6": True, "IPv6Network": "fd05::/48"})
    for one in lab.hosts:
        wait_until(
            lambda one=one: " via fd05:" in one.run("ip -6 route show dev flannel-v6.1"), SOON, "the other's route"
        )
        wait_until(lambda one=one: "FLANNEL_IPV6_SUBNET" in one.daemon.subnet_env(), SOON, "subnet.env")
    assert [host.daemon.subnet_env()["FLANNEL_SUBNET"] for host in lab.hosts] == subnets
    wait_until(lambda: pings(lab), SOON, "pings between all containers")
    lab.set_config(v4)
    wait_until(lambda: kernel_text(host, only=KERNEL) == before, SOON, "all of IPv6 gone")
    assert [host.daemon.subnet_env()["FLANNEL_SUBNET"] for host in lab.hosts] == subnets
    wait_until(lambda: "FLANNEL_IPV6_SUBNET" not in host.daemon.subnet_env(), SOON, "subnet.env")

    def keys() -> list[str]:
        return lab.etcd.ctl("get", "--prefix", "--keys-only", "/coreos.com/network/subnets/").split()

    wait_until(lambda: not any("&" in key for key in keys()), SOON, "leases of one family")
    assert len(keys()) == 2
    assert not [line for line in host.daemon.output().splitlines() if '"level": "warning"' in line]
    wait_until(lambda: pings(lab), SOON, "pings between all containers")


@pytest.mark.parametrize("change", [{"SubnetMin": "10.5.250.0"}, {"SubnetLen": 26}])
def test_a_range_that_leaves_our_subnet_out_is_told_and_the_subnet_kept(running: Lab, change: dict) -> None:
    host = running.hosts[0]
    running.set_config({"Network": "10.5.0.0/16", "SubnetMax": "10.5.251.0", "Backend": {"Type": "vxlan"}, **change})
    subnet = host.daemon.subnet_env()["FLANNEL_SUBNET"]
    told = "would not hand out any more"
    wait_until(lambda: told in host.daemon.get("/readyz").text, SOON, "a warning that says what to do")
    host.daemon.restart()
    host.daemon.wait_ready()
    assert host.daemon.subnet_env()["FLANNEL_SUBNET"] == subnet
    wait_until(lambda: told in host.daemon.get("/readyz").text, SOON, "the warning again")
    wait_until(lambda: pings(running), SOON, "pings between all containers")
