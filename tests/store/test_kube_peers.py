"""KubeStore's watch: other nodes, and the network configuration, come as snapshots."""

from __future__ import annotations

import json
from ipaddress import IPv4Network

import pytest

from flanneld.lab.wait import wait_until
from subnet_lease.store import ConfigMissing
from tests.store.kube_values import NET_CONF, PREFIX, Watcher
from tests.testbed.fake_kube import peer_annotations


def test_snapshots_follow_nodes(kube, make_store):
    kube.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    kube.add_node("plain", "10.244.3.0/24")
    watcher = Watcher(make_store(kube))
    snapshot = watcher.sees("10.244.2.0-24")
    assert snapshot.config.network == IPv4Network("10.244.0.0/16")
    kube.add_peer("n4", "10.244.4.0/24", "192.0.2.4", "02:00:00:00:00:04")
    watcher.sees("10.244.2.0-24", "10.244.4.0-24")
    kube.delete_node("n2")
    watcher.sees("10.244.4.0-24")


@pytest.mark.field_problem(6)
def test_a_change_in_one_family_alone_is_seen(kube, make_store, net_conf):
    net_conf.write_text(json.dumps(NET_CONF | {"EnableIPv6": True, "IPv6Network": "fd00:10::/48"}))
    both = peer_annotations("192.0.2.2", "02:00:00:00:00:02") | {
        PREFIX + "public-ipv6": "2001:db8::2",
        PREFIX + "backend-v6-data": '{"VNI":1,"VtepMAC":"02:00:00:00:06:02"}',
    }
    kube.add_node("n2", "10.244.2.0/24", "fd00:10:0:2::/64", annotations=both)
    watcher = Watcher(make_store(kube))
    key = "10.244.2.0-24&fd00:10:0:2::-64"
    watcher.sees(key)
    kube.annotate("n2", {PREFIX + "backend-v6-data": '{"VNI":1,"VtepMAC":"02:00:00:00:06:ff"}'})
    wait_until(
        lambda: watcher.snapshots[-1].leases[key].attrs.backend_v6_data["VtepMAC"] == "02:00:00:00:06:ff",
        5,
        "the new IPv6 MAC",
    )


def test_heartbeats_make_no_snapshots(kube, make_store):
    kube.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    watcher = Watcher(make_store(kube))
    watcher.sees("10.244.2.0-24")
    for _ in range(5):
        kube.heartbeat("n2")
    kube.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert len(watcher.snapshots) == 2


@pytest.mark.field_problem(5)
def test_a_bad_annotation_withdraws_nobody_and_is_counted(kube, make_store):
    for number in (2, 3):
        kube.add_peer(f"n{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:0{number}")
    store = make_store(kube)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    kube.annotate("n2", {PREFIX + "public-ip": "garbage"})
    wait_until(lambda: store.status.errors.get("bad_key") == 1)
    kube.add_peer("n4", "10.244.4.0/24", "192.0.2.4", "02:00:00:00:00:04")
    watcher.sees("10.244.2.0-24", "10.244.3.0-24", "10.244.4.0-24")


def test_lists_are_paged(fake, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_api.PAGE", 10)
    for number in range(35):
        fake.add_peer(f"p{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:{number:02x}")
    Watcher(make_store(fake)).sees(*(f"10.244.{number}.0-24" for number in range(35)))
    lists = [request for request in fake.requests if request.verb == "list"]
    assert [request.query["limit"] for request in lists] == ["10"] * 4


def test_a_missing_configuration_says_where_it_was_expected(fake, make_store, tmp_path):
    with pytest.raises(ConfigMissing, match=r"nowhere.*--net-config-path"):
        make_store(fake, net_config_path=tmp_path / "nowhere").read_config()


def test_a_swapped_config_map_takes_effect_and_a_bad_one_does_not(fake, make_store, tmp_path):
    """kubelet writes a new directory and swaps the link ..data, as here."""

    def mount(number: int, text: str) -> None:
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "net-conf.json").write_text(text)
        (tmp_path / "..tmp").symlink_to(f"..{number}")
        (tmp_path / "..tmp").rename(tmp_path / "..data")

    mount(1, json.dumps(NET_CONF))
    path = tmp_path / "mounted.json"
    path.symlink_to("..data/net-conf.json")
    fake.add_node("n1", "10.244.1.0/24")
    store = make_store(fake, net_config_path=path)
    watcher = Watcher(store)
    watcher.sees()
    mount(2, "{")
    wait_until(lambda: store.status.config_error)
    assert store.status.errors["config_invalid"] == 1
    mount(3, json.dumps(NET_CONF | {"EnableNFTables": True}))
    wait_until(lambda: watcher.snapshots[-1].config.enable_nftables)
    assert len(watcher.snapshots) == 2
    assert store.status.config_error is None
    wait_until(lambda: fake.events("FlannelConfigInvalid"), message="an Event about the bad one")


def test_new_connections_miss_nothing_and_are_no_failure(fake, make_store):
    fake.add_node("n2", "10.244.2.0/24", annotations=peer_annotations("192.0.2.2", "02:00:00:00:00:02"))
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24")
    store.reconnect()
    fake.add_node("n3", "10.244.3.0/24", annotations=peer_annotations("192.0.2.3", "02:00:00:00:00:03"))
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert not store.status.errors and store.status.failure is None


def test_turning_a_family_on_reads_every_node_again(fake, make_store, net_conf):
    both = peer_annotations("192.0.2.2", "02:00:00:00:00:02") | {PREFIX + "public-ipv6": "2001:db8::2"}
    fake.add_node("n2", "10.244.2.0/24", "fd00:10:0:2::/64", annotations=both)
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24")
    net_conf.write_text(json.dumps(NET_CONF | {"EnableIPv6": True, "IPv6Network": "fd00:10::/48"}))
    snapshot = watcher.sees("10.244.2.0-24&fd00:10:0:2::-64")
    assert snapshot.config.enable_ipv6
