"""The CNI plugin as a program, with delegates that only write down what they were asked."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cni import daemon_status
from tests.testbed.cni import SUBNET_ENV, Plugin


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    made = Plugin(tmp_path / "cni")
    made.conf["delegate"]["bridge"] = "nosuchbridge0"
    return made


def write_status(plugin: Plugin, **fields: Any) -> None:
    status = {"pid": os.getpid(), "ready": True, "reasons": [], "subnet": None, "ipv6_subnet": None, **fields}
    Path(daemon_status.status_path(str(plugin.subnet_file))).write_text(json.dumps(status))


@pytest.fixture
def daemon(plugin: Plugin) -> Iterator[Any]:
    """A daemon that lives: call it to have it write a status."""
    lock = daemon_status.hold_lock(str(plugin.subnet_file))
    yield lambda **fields: write_status(plugin, **fields)
    os.close(lock)


def test_add_gives_the_delegate_its_configuration_and_passes_its_result_on(plugin: Plugin) -> None:
    log = plugin.fake_delegate()
    answer = plugin("ADD")
    assert (answer.code, answer.json["ips"]) == (0, [{"address": "10.5.52.2/24"}]), answer
    asked = json.loads((log / "stdin.ADD").read_text())
    assert asked["ipam"]["ranges"] == [[{"subnet": "10.5.52.0/24"}]]
    assert "CNI_CONTAINERID=c1" in (log / "env.ADD").read_text()


def test_what_add_stored_can_be_deleted_by_flannels_plugin(plugin: Plugin) -> None:
    """It looks for dataDir/<containerID> and hands the whole file to the delegate named by "type"."""
    plugin.fake_delegate()
    plugin("ADD")
    stored = json.loads((plugin.data_dir / "c1").read_text())
    assert (stored["type"], stored["name"], stored["ipam"]["type"]) == ("bridge", "cbr0", "host-local")
    assert oct(plugin.data_dir.stat().st_mode & 0o777) == "0o700"
    assert oct((plugin.data_dir / "c1").stat().st_mode & 0o777) == "0o600"


def test_what_flannels_plugin_stored_is_deleted_by_ours(plugin: Plugin) -> None:
    log = plugin.fake_delegate()
    plugin.data_dir.mkdir()
    (plugin.data_dir / "c1").write_text('{"cniVersion":"0.3.1","name":"cbr0","type":"bridge","ipam":{"x":1}}')
    assert plugin("DEL").code == 0
    assert json.loads((log / "stdin.DEL").read_text())["ipam"] == {"x": 1}
    assert list(plugin.data_dir.iterdir()) == []


def test_two_interfaces_of_one_container_do_not_meet(plugin: Plugin) -> None:
    log = plugin.fake_delegate()
    plugin("ADD", ifname="eth0")
    plugin("ADD", ifname="eth1", delegate={"bridge": "nosuchbridge1"})
    plugin("DEL", ifname="eth0")
    assert json.loads((log / "stdin.DEL").read_text())["bridge"] == "nosuchbridge0"
    plugin("DEL", ifname="eth1")
    assert json.loads((log / "stdin.DEL").read_text())["bridge"] == "nosuchbridge1"
    assert list(plugin.data_dir.iterdir()) == []


@pytest.mark.field_problem(30)
def test_a_failed_del_is_tried_again_with_the_same_configuration(plugin: Plugin) -> None:
    log = plugin.fake_delegate()
    plugin("ADD")
    (log / "fail.DEL").write_text('{"code": 11, "msg": "busy", "details": "later"}')
    answer = plugin("DEL")
    assert (answer.code, answer.json) == (1, {"code": 11, "msg": "busy", "details": "later"})
    (log / "fail.DEL").unlink()
    plugin.subnet_file.unlink()  # DEL needs no subnet
    assert plugin("DEL").code == 0
    assert json.loads((log / "stdin.DEL").read_text())["ipam"]["ranges"] == [[{"subnet": "10.5.52.0/24"}]]
    assert list(plugin.data_dir.iterdir()) == []


@pytest.mark.field_problem(30)
@pytest.mark.parametrize("damage", ["", '{"name":', "[]"])
def test_del_frees_although_what_add_stored_is_damaged(plugin: Plugin, damage: str) -> None:
    log = plugin.fake_delegate()
    plugin("ADD")
    (plugin.data_dir / "c1:eth0").write_text(damage)
    plugin.subnet_file.unlink()
    assert plugin("DEL", prevResult={"ips": [{"address": "10.5.52.2/24"}]}).code == 0
    asked = json.loads((log / "stdin.DEL").read_text())
    assert (asked["type"], asked["name"]) == ("bridge", "cbr0")
    assert asked["ipam"]["ranges"] == [[{"subnet": "10.5.52.0/24"}]]
    assert list(plugin.data_dir.iterdir()) == []


def test_del_of_something_unknown_succeeds_even_without_a_delegate(plugin: Plugin) -> None:
    assert plugin("DEL").code == 0
    log = plugin.fake_delegate()
    assert plugin("DEL").code == 0
    assert (log / "calls").read_text() == "DEL c1 eth0\n"


def test_the_delegates_error_is_passed_on(plugin: Plugin) -> None:
    log = plugin.fake_delegate()
    (log / "fail.ADD").write_text('{"code": 123, "msg": "no", "details": "because"}')
    answer = plugin("ADD")
    assert (answer.code, answer.json) == (1, {"code": 123, "msg": "no", "details": "because"})
    (log / "fail.ADD").write_text("panic: something")
    answer = plugin("ADD")
    assert (answer.code, answer.json["code"], answer.json["details"]) == (1, 999, "panic: something")
    assert answer.json["msg"] == "the delegate bridge failed at ADD: exit status 1"


@pytest.mark.field_problem(31)
def test_a_missing_delegate_is_named_with_its_package(plugin: Plugin) -> None:
    answer = plugin("ADD", delegate={"type": "macvlan"})
    assert answer.json["msg"] == f'failed to find plugin "macvlan" in path [{plugin.path}]'
    assert "containernetworking-plugins" in answer.json["details"]
    assert not plugin.data_dir.exists()


def test_a_delegate_that_speaks_one_version_less_is_spoken_to_in_it(plugin: Plugin) -> None:
    programs = Path(plugin.path)
    programs.mkdir()
    script = """#!/bin/sh
input=$(cat)
case $input in
  *'"cniVersion":"1.1.0"'*) echo '{"code": 1, "msg": "incompatible CNI versions"}'; exit 1 ;;
  *'"cniVersion":"1.0.0"'*) echo '{"cniVersion": "1.0.0", "ips": []}' ;;
esac
"""
    for name in ("bridge", "host-local"):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    answer = plugin("ADD", cniVersion="1.1.0")
    assert (answer.code, answer.json) == (0, {"cniVersion": "1.1.0", "ips": []})


@pytest.mark.field_problem(7)
class TestWaiting:
    def test_add_waits_for_the_daemon(self, plugin: Plugin) -> None:
        plugin.fake_delegate()
        plugin.subnet_file.unlink()

        def appear() -> None:
            """At once, as the daemon makes it."""
            fresh = plugin.subnet_file.with_name("fresh")
            fresh.write_text(SUBNET_ENV)
            fresh.rename(plugin.subnet_file)

        timer = threading.Timer(0.7, appear)
        timer.start()
        started = time.monotonic()
        assert plugin("ADD", waitSeconds=30).code == 0
        timer.join()
        assert 0.5 < time.monotonic() - started < 25

    def test_no_daemon(self, plugin: Plugin) -> None:
        plugin.fake_delegate()
        plugin.subnet_file.unlink()
        answer = plugin("ADD", waitSeconds=0.2)
        assert (answer.code, answer.json["code"]) == (1, 11)
        assert answer.json["msg"] == (
            f"failed to load flannel 'subnet.env' file: open {plugin.subnet_file}: no such file or directory. "
            "Check the flannel pod log for this node."
        )
        assert "flanneld is not running on this node" in answer.json["details"]

    def test_daemon_that_has_no_subnet_says_why(self, plugin: Plugin, daemon: Any) -> None:
        plugin.subnet_file.unlink()
        daemon(ready=False, reasons=('node "n1" pod cidr not assigned',))
        assert 'no subnet yet: node "n1" pod cidr not assigned' in plugin("ADD").json["details"]
        daemon(ready=False, reasons=("etcd: connection refused",))
        assert "etcd: connection refused" in plugin("ADD").json["details"]

    def test_daemon_that_died_says_nothing(self, plugin: Plugin) -> None:
        lock = daemon_status.hold_lock(str(plugin.subnet_file))
        write_status(plugin, subnet="10.5.9.0/24")
        plugin.fake_delegate()
        assert plugin("ADD").code == 1
        os.close(lock)
        assert plugin("ADD").code == 0
        plugin.subnet_file.unlink()
        assert "not running" in plugin("ADD").json["details"]

    def test_without_a_lock_the_newer_file_counts(self, plugin: Plugin) -> None:
        plugin.fake_delegate()
        write_status(plugin, subnet="10.5.9.0/24")
        os.utime(plugin.subnet_file, (0, 0))
        assert "now leases 10.5.9.0/24" in plugin("ADD").json["msg"]
        os.utime(plugin.subnet_file)  # flannel's own daemon took over
        assert plugin("ADD").code == 0
        write_status(plugin, subnet="10.5.9.0/24", pid=None)  # stopped in good order
        os.utime(plugin.subnet_file, (0, 0))
        assert plugin("ADD").code == 0


@pytest.mark.field_problem(29)
def test_add_refuses_a_subnet_that_the_node_no_longer_leases(plugin: Plugin, daemon: Any) -> None:
    plugin.fake_delegate()
    daemon(subnet="10.5.99.0/24")
    answer = plugin("ADD")
    assert (answer.code, answer.json["code"]) == (1, 11)
    assert "it holds 10.5.52.0/24, but the node now leases 10.5.99.0/24" in answer.json["msg"]
    daemon(subnet="10.5.52.0/24", refuse="10.5.52.0/24 now belongs to node b")
    assert "10.5.52.0/24 now belongs to node b" in plugin("ADD").json["msg"]
    daemon(ready=False, subnet="10.5.52.0/24", reasons=("etcd is down",))
    assert plugin("ADD").code == 0  # cut off from the store, yet the lease stands
    daemon()  # nothing is known yet
    assert plugin("ADD").code == 0
    daemon(subnet="10.6.1.0/24", subnet_file="/run/flannel/blue.env")  # another network's daemon in the same directory
    assert plugin("ADD").code == 0


class TestStatus:
    def status(self, plugin: Plugin) -> tuple[int, str]:
        answer = plugin("STATUS", cniVersion="1.1.0")
        return (0, "") if answer.code == 0 else (answer.json["code"], answer.json.get("details", ""))

    def test_ready(self, plugin: Plugin, daemon: Any) -> None:
        plugin.fake_delegate()
        daemon(subnet="10.5.52.0/24")
        assert self.status(plugin) == (0, "")

    def test_flannels_daemon_writes_no_status(self, plugin: Plugin) -> None:
        plugin.fake_delegate()
        assert self.status(plugin) == (0, "")

    def test_unavailable(self, plugin: Plugin, daemon: Any) -> None:
        plugin.conf["delegate"]["type"] = "macvlan"
        assert self.status(plugin)[0] == 50  # no delegate
        plugin.conf["delegate"]["type"] = "bridge"
        plugin.fake_delegate()
        daemon(subnet="10.5.99.0/24")
        assert self.status(plugin)[0] == 50  # another subnet
        plugin.subnet_file.unlink()
        daemon(ready=False, reasons=("waiting for a podCIDR",))
        assert self.status(plugin) == (50, "flanneld runs but has no subnet yet: waiting for a podCIDR")

    def test_limited_connectivity(self, plugin: Plugin, daemon: Any) -> None:
        plugin.fake_delegate()
        daemon(ready=False, reasons=("store: etcd is down", "kernel: flannel.1 is missing"))
        assert self.status(plugin) == (51, "kernel: flannel.1 is missing")
        daemon(ready=False, reasons=("store: etcd is down",))
        assert self.status(plugin) == (0, "")


@pytest.mark.field_problem(30)
class TestGarbage:
    def reserve(self, plugin: Plugin, address: str, text: str) -> Path:
        store = plugin.networks / "cbr0"
        store.mkdir(parents=True, exist_ok=True)
        (store / address).write_text(text)
        return store / address

    def gc(self, plugin: Plugin, *valid: tuple[str, str]) -> Any:
        attachments = [{"containerID": container, "ifname": ifname} for container, ifname in valid]
        return plugin("GC", cniVersion="1.1.0", **{"cni.dev/valid-attachments": attachments})

    def test_frees_reservations_and_configurations_that_nobody_has(self, plugin: Plugin) -> None:
        log = plugin.fake_delegate()
        for container in ("live", "dead"):
            plugin("ADD", container=container)
        (plugin.data_dir / "legacy-dead").write_text('{"name":"cbr0","type":"bridge","ipam":{}}')
        (plugin.data_dir / "legacy-live").write_text('{"name":"cbr0","type":"bridge","ipam":{}}')
        (plugin.data_dir / "other-network").write_text('{"name":"blue","type":"bridge","ipam":{}}')
        self.reserve(plugin, "10.5.52.2", "live\r\neth0")
        self.reserve(plugin, "10.5.52.3", "live\r\neth9")
        self.reserve(plugin, "10.5.52.4", "dead\r\neth0")
        self.reserve(plugin, "10.5.52.5", "legacy-live")
        self.reserve(plugin, "last_reserved_ip.0", "10.5.52.5")
        answer = self.gc(plugin, ("live", "eth0"), ("legacy-live", "eth0"))
        assert answer.code == 0, answer
        assert {path.name for path in plugin.data_dir.iterdir()} == {
            "live", "live:eth0", "legacy-live", "other-network",
        }  # fmt: skip
        assert {path.name for path in (plugin.networks / "cbr0").iterdir()} == {
            "10.5.52.2", "10.5.52.5", "last_reserved_ip.0", "lock",
        }  # fmt: skip
        calls = (log / "calls").read_text().splitlines()
        assert "DEL dead eth0" in calls
        assert "DEL legacy-dead eth0" in calls
        assert not any("live" in call for call in calls if call.startswith("DEL"))

    def test_without_a_list_nothing_is_collected(self, plugin: Plugin) -> None:
        plugin.fake_delegate()
        plugin("ADD")
        answer = plugin("GC", cniVersion="1.1.0")
        assert (answer.code, answer.json["code"]) == (1, 7)
        assert (plugin.data_dir / "c1:eth0").exists()

    def test_what_cannot_be_freed_is_kept_and_reported(self, plugin: Plugin) -> None:
        log = plugin.fake_delegate()
        plugin("ADD")
        (log / "fail.DEL").write_text('{"code": 5, "msg": "disk"}')
        answer = self.gc(plugin)
        assert (answer.code, answer.json["details"]) == (1, "c1: disk")
        assert (plugin.data_dir / "c1:eth0").exists()

    def test_takes_host_locals_lock(self, plugin: Plugin) -> None:
        plugin.fake_delegate()
        reservation = self.reserve(plugin, "10.5.52.4", "dead\r\neth0")
        lock = os.open(reservation.parent / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=self.gc, args=(plugin,))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert reservation.exists()
        os.close(lock)
        thread.join(30)
        assert not reservation.exists()


class TestCheck:
    def test_delegates_with_the_previous_result(self, plugin: Plugin) -> None:
        log = plugin.fake_delegate()
        plugin("ADD")
        previous = {"ips": [{"address": "10.5.52.2/24", "gateway": "10.5.52.1"}], "routes": [{"dst": "10.5.0.0/16"}]}
        assert plugin("CHECK", prevResult=previous).code == 0
        asked = json.loads((log / "stdin.CHECK").read_text())
        assert asked["prevResult"]["routes"] == [{"dst": "10.5.0.0/16", "gw": "10.5.52.1"}]

    def test_an_address_of_another_subnet(self, plugin: Plugin) -> None:
        plugin.fake_delegate()
        plugin("ADD")
        answer = plugin("CHECK", prevResult={"ips": [{"address": "10.5.9.2/24"}]})
        assert "10.5.9.2/24 is not in 10.5.52.0/24" in answer.json["msg"]

    def test_an_unknown_container(self, plugin: Plugin) -> None:
        answer = plugin("CHECK", prevResult={"ips": []})
        assert "no stored configuration for interface eth0 of container c1" in answer.json["msg"]

    def test_needs_a_previous_result(self, plugin: Plugin) -> None:
        assert plugin("CHECK").json["code"] == 7


class TestProtocol:
    def test_version(self, plugin: Plugin) -> None:
        answer = plugin.raw("", {"CNI_COMMAND": "VERSION"})
        assert answer.json["supportedVersions"] == ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]

    def test_without_a_verb_it_introduces_itself(self, plugin: Plugin) -> None:
        answer = plugin.raw("", {})
        assert (answer.code, answer.stdout) == (0, "")
        assert "CNI protocol versions supported: 0.1.0" in answer.stderr

    @pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", None])
    def test_every_version_is_served_and_handed_on(self, plugin: Plugin, version: str | None) -> None:
        log = plugin.fake_delegate()
        assert plugin("ADD", cniVersion=version).code == 0
        assert json.loads((log / "stdin.ADD").read_text()).get("cniVersion") == version

    @pytest.mark.parametrize(
        ("verb", "version", "code"),
        [
            ("ADD", "9.0.0", 1),
            ("ADD", 1, 1),
            ("CHECK", "0.3.1", 1),
            ("GC", "1.0.0", 1),
            ("STATUS", "1.0.0", 1),
            ("FLY", "1.0.0", 4),
        ],
    )
    def test_verbs_and_versions_that_do_not_fit(self, plugin: Plugin, verb: str, version: Any, code: int) -> None:
        answer = plugin(verb, cniVersion=version)
        assert (answer.code, answer.json["code"]) == (1, code)

    @pytest.mark.parametrize(
        ("stdin", "code"),
        [("", 6), ("{", 6), ("[]", 6), ("{}", 7), ('{"name": "../x"}', 7), ('{"name": "cbr0", "delegate": 1}', 7)],
    )
    def test_bad_configurations(self, plugin: Plugin, stdin: str, code: int) -> None:
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "c",
            "CNI_NETNS": "/n",
            "CNI_IFNAME": "e",
            "CNI_PATH": "/p",
        }
        answer = plugin.raw(stdin, environment)
        assert (answer.code, answer.json["code"]) == (1, code)

    @pytest.mark.parametrize(
        "change",
        [
            {"CNI_CONTAINERID": ""},
            {"CNI_CONTAINERID": "../../etc/passwd"},
            {"CNI_IFNAME": "a/b"},
            {"CNI_IFNAME": "x" * 16},
            {"CNI_PATH": ""},
        ],
    )
    def test_bad_environments(self, plugin: Plugin, change: dict[str, str]) -> None:
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "c",
            "CNI_NETNS": "/n",
            "CNI_IFNAME": "e",
            "CNI_PATH": "/p",
        }
        answer = plugin.raw('{"name": "cbr0"}', {**environment, **change})
        assert (answer.code, answer.json["code"]) == (1, 4)
