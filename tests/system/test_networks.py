"""Nodes behind NAT, with several interfaces, several networks; nodes that clash; many that join at once."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable

import pytest

from flanneld.lab.capture import capture
from flanneld.lab.hosts import Lab, sysctl
from flanneld.lab.wait import Promised, wait_until
from tests.system.backend_cases import kernel_has_ipip, needs_wireguard
from tests.system.kernel_text import metric

MakeLab = Callable[..., Lab]


@pytest.mark.field_problem(21)
@pytest.mark.parametrize("direct", [False, True], ids=["tunnel", "DirectRouting"])
def test_two_nodes_behind_nat_reach_each_other_at_their_published_addresses(make_lab: MakeLab, direct: bool) -> None:
    lab = make_lab(3, nat=("h1", "h2"))
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": direct}})
    for host in lab.hosts:
        host.start_daemon(f"--public-ip={host.public_address}")
    for host in lab.hosts:
        host.daemon.wait_ready()
    lab.wait_peers()
    boxes = [host.container("c") for host in lab.hosts]
    for here in boxes:
        for there in boxes:
            if here is not there:
                wait_until(lambda here=here, there=there: here.ping(there).ok, 10, f"{here.name} to {there.name}")
    shown = lab.hosts[0].run("ip -d link show flannel.1")
    assert "local 10.0.2.15" in shown


@pytest.mark.field_problem(21)
def test_a_node_behind_nat_in_ipv4_alone_is_routed_to_directly_in_ipv6(make_lab: MakeLab) -> None:
    lab = make_lab(2, underlay6="fd30::/64")
    families = {"Network": "10.5.0.0/16", "EnableIPv6": True, "IPv6Network": "fd05::/48"}
    lab.set_config({**families, "Backend": {"Type": "vxlan", "DirectRouting": True}})
    hidden, other = lab.hosts
    hidden.start_daemon("--public-ip=172.30.0.99")
    other.start_daemon()
    for host in lab.hosts:
        host.daemon.wait_ready()
    routes = "ip -{} route show dev eth0 proto 241"
    wait_until(lambda: " via " in other.run("ip -4 route show dev flannel.1"), 10, "the way through the tunnel")
    wait_until(lambda: f" via {hidden.address6} " in other.run(routes.format(6)), 10, "the direct route")
    assert " via " not in other.run(routes.format(4))
    here, there = (host.container("c") for host in lab.hosts)
    wait_until(lambda: here.ping(there.address6).ok and there.ping(here.address6).ok, 10, "pings over IPv6")
    echo = capture(other.ns, "eth0", "icmp6 and ip6[40] == 128", lambda: here.ping(there.address6))[0]
    assert (echo["IPv6"].src, echo["IPv6"].dst) == (here.address6, there.address6)


@pytest.mark.field_problem(10)
def test_a_second_node_with_a_live_nodes_address_is_refused_and_both_are_named(make_lab: MakeLab) -> None:
    lab = make_lab(2, nat=("h1", "h2"))
    lab.set_config()
    first = lab.hosts[0].start_daemon(wait=True)
    second = lab.hosts[1].start_daemon()
    words = ("10.0.2.15", "h1", "h2", "--public-ip")
    wait_until(lambda: all(word in second.get("/readyz").text for word in words), 15, second.why_not)
    assert second.running
    first.wait_ready()
    assert not second.subnet_file.exists()
    assert "flannel" not in lab.hosts[1].run("ip -br link")
    assert len(lab.etcd.ctl("get", "--prefix", "--keys-only", "/coreos.com/network/subnets/").split()) == 1


@pytest.mark.field_problem(39)
def test_a_node_gets_the_subnet_that_is_reserved_for_its_name(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.set_config()
    host = lab.hosts[0]
    done = host.ctl("reserve", "10.5.77.0/24", "--node", "h1")
    assert done.returncode == 0, done.stderr
    lab.start_daemons()
    lab.wait_peers()
    assert host.daemon.subnet_env()["FLANNEL_SUBNET"] == "10.5.77.1/24"
    assert lab.hosts[1].daemon.subnet_env()["FLANNEL_SUBNET"] != "10.5.77.1/24"
    (lease,) = [lease for lease in json.loads(host.ctl("leases", "--json").stdout) if lease["node"] == "h1"]
    assert (lease["subnet"], lease["node"], lease["public_ip"]) == ("10.5.77.0/24", "h1", host.address)
    assert (lease["reservation"], lease["expires_in"]) == (True, None)
    assert json.loads(host.ctl("status", "--json").stdout)["reservation"] is True
    # It is the node's own now, by all its marks: also without a file that says so, and under another name.
    host.daemon.stop()
    host.daemon.subnet_file.unlink()
    host.start_daemon("--node-name=renamed", wait=True)
    assert host.daemon.subnet_env()["FLANNEL_SUBNET"] == "10.5.77.1/24"


@pytest.mark.field_problem(45)
def test_a_node_gets_a_larger_subnet_than_the_others_and_keeps_it(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.set_config()
    big, other = lab.hosts
    assert big.ctl("reserve", "10.5.8.0/22", "--node", "h1").returncode == 0
    lab.start_daemons()
    lab.wait_peers()
    assert big.daemon.subnet_env()["FLANNEL_SUBNET"] == "10.5.8.1/22"
    assert "10.5.8.0/22 via 10.5.8.0 dev flannel.1 onlink" in other.run("ip route")
    here, there = big.container("c"), other.container("c")
    wait_until(lambda: here.ping(there).ok and there.ping(here).ok, 5, "pings both ways")
    wait_until(lambda: big.daemon.get("/readyz").text == "flanneld is ready", 5, big.daemon.why_not)
    big.daemon.restart()
    big.daemon.wait_ready()
    assert big.daemon.subnet_env()["FLANNEL_SUBNET"] == "10.5.8.1/22"


@pytest.mark.field_problem(34)
def test_outer_packets_leave_by_the_chosen_interface_and_address(make_lab: MakeLab) -> None:
    lab = make_lab(2, second="172.31.0.0/24")
    lab.set_config()
    lab.start_daemons("--iface=eth1")
    lab.wait_peers()
    here, there = (host.container("c") for host in lab.hosts)
    wait_until(lambda: here.ping(there).ok, 10, "a ping")
    packet = capture(lab.hosts[0].ns, "eth1", "udp port 8472", lambda: here.ping(there))[0]
    assert packet["IP"].src == lab.hosts[0].second_address
    assert packet["IP"].dst == lab.hosts[1].second_address


@pytest.mark.field_problem(34)
def test_an_interface_with_a_default_route_of_its_own_is_used_for_peers_beyond_it(make_lab: MakeLab) -> None:
    lab = make_lab(1, second="172.31.0.0/24")
    lab.set_config()
    host = lab.hosts[0]
    value = '{"PublicIP":"203.0.113.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}'
    lab.etcd.ctl("put", "/coreos.com/network/subnets/10.5.9.0-24", value)
    host.start_daemon("--iface=eth1", wait=True)

    def entry() -> str:
        found = host.run("bridge fdb show dev flannel.1").splitlines()
        return next((line for line in found if "203.0.113.9" in line), "")

    assert " via " not in entry()
    host.run("ip route add default via 172.31.0.1 dev eth1 metric 200")
    wait_until(lambda: "dst 203.0.113.9 via eth1 self permanent" in entry(), Promised(6), "the interface in the entry")
    packet = capture(host.ns, "eth1", "udp port 8472", lambda: host.run("ping -c 3 -i 0.2 10.5.9.1", check=False))[0]
    assert (packet["IP"].src, packet["IP"].dst) == (host.second_address, "203.0.113.9")
    host.daemon.restart()
    host.daemon.wait_ready()
    assert metric(host, "flanneld_changes_total") == 0
    host.run("ip route del default via 172.31.0.1 dev eth1")
    wait_until(lambda: entry() and " via " not in entry(), Promised(6), "the routing table's choice again")


@needs_wireguard
@pytest.mark.field_problem(34)
def test_wireguard_too_leaves_by_the_chosen_interface_where_another_has_the_default_route(make_lab: MakeLab) -> None:
    lab = make_lab(1, second="172.31.0.0/24")
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard"}})
    host = lab.hosts[0]
    key = base64.b64encode(bytes([9]) * 32).decode()
    value = f'{{"PublicIP":"203.0.113.9","BackendType":"wireguard","BackendData":{{"PublicKey":"{key}","Port":51820}}}}'
    lab.etcd.ctl("put", "/coreos.com/network/subnets/10.5.9.0-24", value)
    before = host.run("ip rule") + host.run("ip route show table all")
    host.start_daemon("--iface=eth1", wait=True)

    def speak() -> object:
        return host.run("ping -c 3 -i 0.2 10.5.9.1", check=False)

    packet = capture(host.ns, "eth0", "udp port 51820", speak)[0]
    assert packet["IP"].src == host.address, "another interface's default route is left as it is"
    assert host.run("ip rule").count("\n") == 3
    host.run("ip route add default via 172.31.0.1 dev eth1 metric 200")
    wait_until(lambda: "via 172.31.0.1 dev eth1" in host.run("ip route show table 2410"), Promised(6), "its own")
    packet = capture(host.ns, "eth1", "udp port 51820", speak)[0]
    assert (packet["IP"].src, packet["IP"].dst) == (host.second_address, "203.0.113.9")
    host.run("ip rule del pref 2412")
    wait_until(lambda: host.run("ip rule").count("sport 51820") == 3, Promised(5), "the rule again")
    host.run("ip route flush table 2410")
    wait_until(lambda: host.run("ip route show table 2410").count("dev eth1") == 2, Promised(5), "the routes again")
    wait_until(lambda: host.daemon.ready, Promised(5), "ready")
    host.daemon.restart()
    host.daemon.wait_ready()
    assert metric(host, "flanneld_changes_total") == 0
    assert "kernel    as it should be" in host.ctl("status", "--diff").stdout
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
    wait_until(lambda: "51820" not in host.run("ip rule"), Promised(6), "another backend has no rule")
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard"}})
    wait_until(lambda: "51820" in host.run("ip rule"), Promised(6), "the rule again")
    host.daemon.stop()
    host.ctl("cleanup")
    host.run("ip route del default via 172.31.0.1 dev eth1")
    assert host.run("ip rule") + host.run("ip route show table all") == before


@needs_wireguard
@pytest.mark.field_problem(34)
def test_wireguard_reaches_peers_beyond_the_link_whatever_becomes_of_the_default_route(make_lab: MakeLab) -> None:
    """Answers come in where the address is; wireguard-go then sends by that interface until it is told to forget it."""
    lab = make_lab(2, second="172.31.0.0/24")
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard"}})
    host, far = lab.hosts
    sysctl(lab.switch, {"net/ipv4/ip_forward": "1"})
    lab.switch.run(f"ip route add 203.0.113.12 via {far.address}")
    far.run("ip addr add 203.0.113.12/32 dev eth0")
    far.run("ip link set eth1 down")
    host.start_daemon("--iface=eth1", wait=True)
    far.start_daemon("--iface=203.0.113.12", wait=True)
    here, there = (each.container("c") for each in lab.hosts)

    def source_on(dev: str) -> str:
        packet = capture(host.ns, dev, "udp port 51820 and dst 203.0.113.12", lambda: here.ping(there))[0]
        return str(packet["IP"].src)

    wait_until(lambda: here.ping(there).ok, 10, "a ping by the only way")
    assert source_on("eth0") == host.address
    host.run("ip route add default via 172.31.0.1 dev eth1 metric 200")
    wait_until(
        lambda: "via 172.31.0.1" in host.run("ip route show table 2410", check=False), Promised(6), "a way of its own"
    )
    assert source_on("eth1") == host.second_address
    assert here.ping(there).ok
    host.run("ip route del default via 172.31.0.1 dev eth1")
    wait_until(lambda: "51820" not in host.run("ip rule"), Promised(6), "no rule")
    wait_until(lambda: here.ping(there).ok, 10, "a ping by the other interface")
    assert source_on("eth0") == host.address


@pytest.mark.parametrize(
    ("kind", "iface"), [("vxlan", "lo"), ("vxlan", "address"), ("udp", "lo"), ("wireguard", "lo"), ("ipip", "lo")]
)
def test_routed_hosts_have_their_address_on_loopback(make_lab: MakeLab, kind: str, iface: str) -> None:
    if kind == "wireguard" and shutil.which("wireguard-go") is None:
        pytest.skip("the program wireguard-go is not installed (Debian: wireguard-go)")
    if kind == "ipip" and not kernel_has_ipip():
        pytest.skip(f"this kernel ({os.uname().release}) has no module ipip")
    lab = make_lab(2)
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": kind}})
    routed = {host.name: f"10.99.0.{number}" for number, host in enumerate(lab.hosts, start=1)}
    for host in lab.hosts:
        host.run(f"ip addr add {routed[host.name]}/32 dev lo")
        for other in lab.hosts:
            if other is not host:
                host.run(f"ip route add {routed[other.name]} via {other.address} src {routed[host.name]}")
        host.start_daemon(f"--iface={'lo' if iface == 'lo' else routed[host.name]}")
    for host in lab.hosts:
        host.daemon.wait_ready()
    here, there = (host.container("c") for host in lab.hosts)
    wait_until(lambda: here.ping(there).ok, 10, "a ping")
    ports = {"vxlan": "udp port 8472", "udp": "udp port 8285", "wireguard": "udp port 51820", "ipip": "ip proto 4"}
    packet = capture(lab.hosts[0].ns, "eth0", ports[kind], lambda: here.ping(there))[0]
    assert {packet["IP"].src, packet["IP"].dst} == set(routed.values())
    mtu = int(lab.hosts[0].daemon.subnet_env()["FLANNEL_MTU"])
    assert 1400 <= mtu < 1500, "that of eth0, less what the backend adds"


@pytest.mark.field_problem(44)
@pytest.mark.parametrize(("kind", "nftables"), [("vxlan", False), ("host-gw", True)])
def test_two_networks_on_one_host_pass_traffic_and_never_meet(make_lab: MakeLab, kind: str, nftables: bool) -> None:
    lab = make_lab(2)
    common = {"EnableNFTables": nftables, "Backend": {"Type": kind}}
    lab.set_config({**common, "Network": "10.5.0.0/16"})
    lab.set_config({**common, "Network": "10.6.0.0/16", "Backend": {"Type": kind, "VNI": 2}}, prefix="/blue")
    reds = [host.start_daemon("--ip-masq") for host in lab.hosts]
    blues = [host.start_daemon("--ip-masq", "--etcd-prefix=/blue", instance="blue") for host in lab.hosts]
    for daemon in (*reds, *blues):
        daemon.wait_ready()
    red = [host.container("r", daemon=daemon) for host, daemon in zip(lab.hosts, reds, strict=True)]
    blue = [host.container("b", daemon=daemon, bridge="cni1") for host, daemon in zip(lab.hosts, blues, strict=True)]
    wait_until(lambda: red[0].ping(red[1]).ok and blue[0].ping(blue[1]).ok, 10, "traffic in both")
    for here in (*red, *blue):
        for there in blue if here in red else red:
            wait_until(lambda a=here, b=there: not a.ping(b).ok, 20, f"no way from {here.name} to {there.name}")
    wait_until(lambda: red[0].ping(red[1]).ok and blue[0].ping(blue[1]).ok, 5, "pings both ways")
    before = lab.hosts[0].run("ip route")
    # One goes, restarts, loses its device: the other does not notice.
    lab.hosts[0].run("ip link del flannel.2" if kind == "vxlan" else "ip route flush proto 241")
    wait_until(lambda: blue[0].ping(blue[1]).ok, 10, "blue again")
    blues[0].restart()
    blues[0].wait_ready()
    assert sorted(lab.hosts[0].run("ip route").splitlines()) == sorted(before.splitlines())
    wait_until(lambda: red[0].ping(red[1]).ok, 5, "a ping")
    assert not red[0].ping(blue[1]).ok
    assert all(daemon.get("/status").json()["warnings"] == [] for daemon in (*reds, *blues))


@pytest.mark.field_problem(44)
@pytest.mark.parametrize("kind", ["vxlan", "udp"])
def test_two_networks_cannot_share_a_device_and_the_second_is_told(make_lab: MakeLab, kind: str) -> None:
    lab = make_lab(1)
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": kind}})
    lab.set_config({"Network": "10.6.0.0/16", "Backend": {"Type": kind}}, prefix="/blue")
    host = lab.hosts[0]
    red = host.start_daemon(wait=True)
    before = host.run("ip addr show")
    blue = host.start_daemon("--etcd-prefix=/blue", instance="blue")
    wait_until(lambda: f"process {red.process.pid}" in blue.get("/readyz").text, 15, "the reason")
    assert host.run("ip addr show") == before
    red.wait_ready()
    assert not blue.ready and blue.running
    assert not blue.subnet_file.exists()
    red.stop()
    blue.wait_ready()


@pytest.mark.field_problem(12)
def test_fifty_daemons_join_a_nearly_full_network_at_once(make_lab: MakeLab) -> None:
    """52 subnets, 50 nodes: nobody gives up, and no subnet has two owners."""
    lab = make_lab(50)
    lab.set_config({"Network": "10.5.0.0/20", "SubnetLen": 26, "SubnetMin": "10.5.0.64", "SubnetMax": "10.5.13.0"})
    daemons = lab.start_daemons(wait=False)
    for daemon in daemons:
        daemon.wait_ready(120)
    subnets = {daemon.subnet_env()["FLANNEL_SUBNET"] for daemon in daemons}
    assert len(subnets) == 50
    lab.wait_peers(timeout=30)


def test_a_device_of_our_name_with_other_settings_is_replaced_and_told(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.set_config()
    host = lab.hosts[0]
    host.run("ip link add flannel.1 type vxlan id 7 dev eth0 dstport 4789 local 172.30.0.11")
    host.start_daemon(wait=True)
    assert "vxlan id 1 local 172.30.0.11 dev eth0 srcport 0 0 dstport 8472" in host.run("ip -d link show flannel.1")
    told = [line for line in host.daemon.output().splitlines() if "stood there with other settings" in line]
    assert len(told) == 1 and "vni=7" in told[0] and "port=4789" in told[0]


def test_json_is_flannels(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.set_config()
    lab.hosts[0].start_daemon(wait=True)
    text = lab.etcd.ctl("get", "--prefix", "--print-value-only", "/coreos.com/network/subnets/").strip()
    mac = lab.hosts[0].daemon.get("/status").json()["vtep_mac"]
    assert text.startswith(
        '{"PublicIP":"172.30.0.11","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"' + mac + '"}'
    )
    assert list(json.loads(text))[:4] == ["PublicIP", "PublicIPv6", "BackendType", "BackendData"]
