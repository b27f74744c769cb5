"""Devices: made as flannel makes them, altered in place where the kernel can, made anew where it cannot."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.kernel_state import Change, FdbEntry, Ipip, Kind, Link, Neighbour, Record, Route, Sysctl, Vxlan
from flanneld.dataplane import modules, sysctl
from flanneld.lab.netns import Namespace, veth
from tests.kernel.netlink_host import DEV, DEV6, HOST, LINK, LINK6, Host, open_host, peer, peer6

VXLAN = Vxlan(1, "192.168.7.1", "eth0")


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host("links") as host:
        yield host


def details(host: Host, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.ip(f"-json -details link show {name}"))[0]
    return found


def test_a_vxlan_device_is_made_as_flannel_makes_it(host: Host) -> None:
    assert host.put(LINK, LINK6) == []
    found = details(host, DEV)
    assert found["mtu"] == 1450 and found["address"] == LINK.mac and "UP" in found["flags"]
    data = found["linkinfo"]["info_data"]
    assert (data["id"], data["local"], data["link"], data["port"]) == (1, "192.168.7.1", "eth0", 8472)
    assert data["learning"] is False
    assert not any(data.get(flag) for flag in ("proxy", "rsc", "l2miss", "l3miss", "gbp", "udp_zero_csum6_tx"))
    data = details(host, DEV6)["linkinfo"]["info_data"]
    assert (data["id"], data["local6"], data["link"], data["port"]) == (2, "fd00:7::1", "eth0", 8472)


def test_options_of_a_vxlan_device(host: Host) -> None:
    wanted = Link(DEV, Vxlan(77, "192.168.7.1", "eth0", port=4789, learning=True, gbp=True), 1400, LINK.mac)
    assert host.put(wanted) == []
    data = details(host, DEV)["linkinfo"]["info_data"]
    assert (data["id"], data["port"], data["learning"], data["gbp"]) == (77, 4789, True, True)
    assert replace(wanted, tx_checksum=True) == host.fresh()[wanted.key]


@pytest.mark.field_problem(3)
@pytest.mark.field_problem(17)
@pytest.mark.parametrize(
    "wanted",
    [
        replace(LINK, mtu=1400),
        replace(LINK, mac="0a:58:00:00:00:02"),
        replace(LINK, tx_checksum=False),
        replace(LINK, settings=replace(VXLAN, learning=True)),
        replace(LINK, settings=replace(VXLAN, local="192.168.7.2")),
        replace(LINK, settings=replace(VXLAN, local="192.168.7.2", learning=True), mtu=1300, mac="0a:58:00:00:00:02"),
    ],
    ids=["mtu", "mac", "checksum", "learning", "local", "several"],
)
def test_altered_in_place(host: Host, wanted: Link) -> None:
    host.ip("addr add 192.168.7.2/16 dev eth0")
    host.establish(*peer(1))
    index = details(host, DEV)["ifindex"]
    assert host.put(wanted) == []
    assert details(host, DEV)["ifindex"] == index, "the device was made anew"
    seen = host.observe()
    link = seen.state[wanted.key]
    assert isinstance(link, Link)
    assert replace(link, tx_checksum=wanted.tx_checksum) == wanted
    assert wanted.tx_checksum in (None, link.tx_checksum)
    assert dict(seen.state) == host.fresh()
    fdb, _, route = peer(1)
    assert seen.state[fdb.key] == fdb and seen.state[route.key] == route


@pytest.mark.field_problem(22)
def test_altered_local_address_and_underlay_carry_both_directions(host: Host) -> None:
    with Namespace("links-far") as far:
        veth(host.ns, "up0", far, "up0")
        host.ip("addr add 172.20.0.1/24 dev up0")
        host.ip("addr add 172.20.0.2/24 dev up0")
        far.run("ip addr add 172.20.0.9/24 dev up0")
        far.run(
            "ip link add vx0 address 0a:58:00:00:00:99 type vxlan id 1 dev up0 local 172.20.0.9 dstport 8472 nolearning"
        )
        far.run("ip link set vx0 up")
        far.run("ip addr add 10.5.1.0/32 dev vx0")
        far.run("ip route add 10.5.0.0/16 dev vx0")
        far.run(f"ip neigh add 10.5.0.0 lladdr {LINK.mac} dev vx0 nud permanent")
        veth(host.ns, "up1", far, "up1")
        host.ip("addr add 172.21.0.1/24 dev up1")
        far.run("ip addr add 172.21.0.9/24 dev up1")
        records: list[Record] = [
            Neighbour(DEV, "10.5.1.0", "0a:58:00:00:00:99"),
            Route("10.5.1.0/24", DEV, "10.5.1.0", onlink=True),
        ]
        indexes = set()
        for underlay, local, remote in (
            ("up0", "172.20.0.1", "172.20.0.9"),
            ("up0", "172.20.0.2", "172.20.0.9"),
            ("up1", "172.21.0.1", "172.21.0.9"),
        ):
            wanted = Link(DEV, Vxlan(1, local, underlay), 1450, LINK.mac)
            assert host.put(wanted, HOST[2], FdbEntry(DEV, "0a:58:00:00:00:99", remote), *records) == []
            assert host.fresh()[wanted.key] == replace(wanted, tx_checksum=True)
            far.run(f"bridge fdb replace {LINK.mac} dst {local} dev vx0")
            host.ns.run("ping -c1 -W2 10.5.1.0")
            indexes.add(details(host, DEV)["ifindex"])
        assert len(indexes) == 1, "the device was made anew"


@pytest.mark.parametrize(
    "wanted",
    [
        replace(LINK, settings=replace(VXLAN, vni=3)),
        replace(LINK, settings=replace(VXLAN, port=4789)),
        replace(LINK, settings=replace(VXLAN, gbp=True)),
        replace(LINK, settings=replace(VXLAN, local="fd00:7::1"), mtu=1400),
    ],
    ids=["vni", "port", "gbp", "family"],
)
def test_made_anew_and_reported_so(host: Host, wanted: Link) -> None:
    host.establish(*peer(1))
    index = details(host, DEV)["ifindex"]
    assert host.put(wanted) == []
    assert details(host, DEV)["ifindex"] != index
    seen = host.observe()
    link = seen.state[wanted.key]
    assert isinstance(link, Link) and link.settings == wanted.settings
    gone = {r.key for r in (HOST[2], *peer(1))}
    assert gone <= (seen.changed or frozenset()) and not gone & seen.state.keys()
    fdb, *others = peer(1)
    assert host.put(HOST[2], replace(fdb, dst="fd00:7::9" if wanted.mtu == 1400 else "192.168.7.9"), *others) == []
    assert dict(host.observe().state) == host.fresh()


@pytest.mark.field_problem(17)
def test_an_mtu_that_does_not_fit_names_the_one_that_does(host: Host) -> None:
    assert host.put(LINK, LINK6) == []
    (failure,) = host.put(replace(LINK, mtu=1451))
    assert "eth0 (MTU 1500): at most 1450" in failure.message
    (failure,) = host.put(replace(LINK6, mtu=1431))
    assert failure.cause == "EINVAL" and "at most 1430" in failure.message
    index = details(host, DEV)["ifindex"]
    host.ip(f"link set {DEV} down")
    (failure,) = host.put(replace(LINK, mtu=1451, settings=replace(VXLAN, learning=True)))
    found = details(host, DEV)
    assert "UP" in found["flags"], "what can be done is done"
    assert found["ifindex"] == index, "an impossible MTU is no reason for a new device"
    assert host.put(LINK) == []
    assert host.fresh()[LINK.key] == replace(LINK, tx_checksum=True)


def test_a_device_of_another_kind_is_refused_and_kept(host: Host) -> None:
    host.ip(f"link add {DEV} type bridge")
    (failure,) = host.put(LINK)
    assert "its kind is bridge, not vxlan" in failure.message and f"ip link del {DEV}" in failure.message
    assert details(host, DEV)["linkinfo"]["info_kind"] == "bridge"


def test_a_vxlan_device_that_no_record_can_say_is_made_anew(host: Host) -> None:
    host.ip(f"link add {DEV} type vxlan id 1 dev eth0 dstport 8472 group 239.1.1.1")
    assert host.put(LINK) == []
    assert host.fresh()[LINK.key] == replace(LINK, tx_checksum=True)


def test_a_vni_in_use_names_the_other_device(host: Host) -> None:
    host.ip("link add rival0 type vxlan id 1 dev eth0 local 192.168.7.1 dstport 8472")
    failure, *others = host.put(LINK, *peer(1))
    assert failure.cause == "EEXIST" and "Device rival0" in failure.message and "VNI 1" in failure.message
    assert [f.cause for f in others] == ["ENODEV"] * 3
    assert all(DEV in f.message for f in others)


def test_a_device_of_ours_that_was_renamed_is_named_and_not_the_other_familys(host: Host) -> None:
    same = replace(LINK6, settings=replace(LINK6.settings, vni=1))
    assert host.put(LINK, same) == []
    host.ip(f"link set {DEV} down")
    host.ip(f"link set {DEV} name renamed0")
    host.observe()
    (failure,) = host.put(LINK)
    assert "Device renamed0" in failure.message and same.name not in failure.message


def test_a_port_in_use_by_a_program_is_said(host: Host) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
        program.bind(("0.0.0.0", 8472))
        (failure,) = host.put(LINK)
        assert failure.cause == "EADDRINUSE" and "8472" in failure.message
    assert host.put(LINK) == []


def test_a_missing_underlay_is_named(host: Host) -> None:
    (failure,) = host.put(replace(LINK, settings=replace(VXLAN, underlay="eth7")))
    assert failure.cause == "ENODEV" and "eth7" in failure.message


def test_removal_takes_everything_on_the_device(host: Host) -> None:
    host.establish(*peer(1), *peer6(1))
    assert host.dataplane.apply([Change("remove", LINK, LINK)]) == []
    state = dict(host.observe().state)
    assert not [r for r in state.values() if getattr(r, "dev", None) == DEV] and LINK.key not in state
    assert peer6(1)[2].key in state
    assert state == host.fresh()


@pytest.mark.field_problem(35)
def test_a_kernel_without_ipip_names_module_and_package(host: Host) -> None:
    wanted = Link("flannel.ipip", Ipip("192.168.7.1", "eth0"), 1480)
    try:
        modules.load("ipip")
    except modules.ModuleMissing:
        (failure,) = host.put(wanted)
        assert failure.cause == "module" and "module ipip" in failure.message and "linux-image" in failure.message
    else:
        assert host.put(wanted) == []
        link = host.fresh()[wanted.key]
        assert isinstance(link, Link) and replace(link, tx_checksum=None) == wanted


def test_sysctls_are_written_read_and_seen(host: Host) -> None:
    record = Sysctl(f"net/ipv6/conf/{DEV}/accept_ra", "0")
    assert (Kind.SYSCTL, record.path) not in host.observe().state
    (failure,) = host.put(record)
    assert failure.cause == "ENOENT" and record.path in failure.message
    assert host.put(LINK, record) == []
    assert host.observe().state[record.key] == record
    host.ns.run(f"sysctl -qw net.ipv6.conf.{DEV.replace('.', '/')}.accept_ra=1")
    seen = host.observe()
    assert seen.changed == {record.key} and seen.state[record.key] == replace(record, value="1")
    assert sysctl.read("net/nothing/here") is None
    (failure,) = host.put(Sysctl("net/ipv4/ip_forward", "many"))
    assert failure.cause == "EINVAL"


def test_a_sysctl_that_this_host_cannot_have_fails_once(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with ipv6.disable=1; a daemon that never becomes ready for that would be worse."""
    (tmp_path / "net" / "ipv4").mkdir(parents=True)
    monkeypatch.setattr(sysctl, "ROOT", tmp_path)
    (failure,) = host.put(*HOST[1:2])
    assert "ipv6.disable" in failure.message
    assert host.observe().state[HOST[1].key] == HOST[1]
    monkeypatch.undo()
    assert host.put(LINK, *HOST[1:2]) == []


def test_a_read_only_proc_fails_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.put(LINK) == []

    def refused(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refused)
        (failure,) = host.put(*HOST[1:2])
    assert failure.cause == "EROFS" and "writable /proc/sys/net" in failure.message
    assert host.observe().state[HOST[1].key] == HOST[1]
