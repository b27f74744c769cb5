"""containerd and podman, driving the built CNI plugin, with containers on two hosts that talk both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flanneld.lab.hosts import Host, Lab, eventually
from flanneld.lab.netns import Namespace
from tests.testbed import busybox
from tests.testbed.cni import DEBIAN_PLUGINS, Plugin, build
from tests.testbed.runtimes import Containerd, Podman, Runtime, closing_all, missing

LACKING = missing("containerd", "ctr", "podman", "runc", "busybox")
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")

DUAL = {
    "Network": "10.5.0.0/16",
    "EnableIPv6": True,
    "IPv6Network": "fc00:5::/48",
    "Backend": {"Type": "vxlan"},
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cni"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox.image(tmp_path_factory.mktemp("image"))


@pytest.fixture
def make_runtime(plugin: Path, image: Path) -> Iterator[Callable[..., Any]]:
    with closing_all() as runtimes:

        def make(kind: type[Runtime], host: Host, **options: Any) -> Runtime:
            made = kind(host, plugin, image, **options)  # type: ignore[call-arg]
            runtimes.append(made)
            return made

        yield make


@pytest.fixture
def two_hosts(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(2)
    lab.set_config()
    lab.start_daemons("--ip-masq")
    lab.wait_peers()
    return lab


def test_containerd_on_two_hosts(two_hosts: Lab, make_runtime: Callable[..., Containerd]) -> None:
    first, second = (make_runtime(Containerd, host) for host in two_hosts.hosts)
    tasks = [first.start("one", "sleep", "900"), second.start("two", "sleep", "900")]
    one, two = first.address("one"), second.address("two")
    eventually(lambda: "0% packet loss" in first.exec("one", "ping", "-c", "1", "-W", "5", two))
    eventually(lambda: "0% packet loss" in second.exec("two", "ping", "-c", "1", "-W", "5", one))
    for runtime, name, task in zip((first, second), ("one", "two"), tasks, strict=True):
        assert runtime.reservations
        runtime.stop(name, task)
        assert (runtime.reservations, runtime.caches) == (set(), set()), runtime.log(name)
        assert "veth" not in runtime.host.run("ip -o link show type veth").replace("eth0@", "")


def test_podman_on_two_hosts_with_published_ports(two_hosts: Lab, make_runtime: Callable[..., Podman]) -> None:
    first, second = (make_runtime(Podman, host) for host in two_hosts.hosts)
    serve = ("httpd", "-f", "-p", "80", "-h", "/etc")
    one = first.start("one", *serve, flags=["--publish=8080:80"])
    two = second.start("two", *serve)
    eventually(lambda: "0% packet loss" in first.podman("exec", "one", "ping", "-c", "1", "-W", "5", two))
    eventually(lambda: "0% packet loss" in second.podman("exec", "two", "ping", "-c", "1", "-W", "5", one))
    # busybox's wget, being static, trips over the host's name service; nc does not ask for names.
    request = r"printf 'GET /passwd HTTP/1.0\r\n\r\n'"
    fetch = ("sh", "-c", f"{request} | busybox nc -w 5 {two_hosts.hosts[0].address} 8080")
    # From the other host, from a container there, and from the container itself: out and back through its own port.
    assert "root" in eventually(lambda: two_hosts.hosts[1].run(fetch))
    eventually(lambda: "root" in second.podman("exec", "two", *fetch))
    eventually(lambda: "root" in first.podman("exec", "one", *fetch))
    for runtime, name in ((first, "one"), (second, "two")):
        runtime.stop(name)
        assert (runtime.reservations, runtime.caches) == (set(), set())
    assert "dpt:8080" not in two_hosts.hosts[0].run("iptables -t nat -L -n", check=False)


def test_dual_stack(make_lab: Callable[..., Lab], make_runtime: Callable[..., Containerd]) -> None:
    lab = make_lab(2, underlay6="fd00:30::/64")
    lab.set_config(DUAL)
    lab.start_daemons()
    lab.wait_peers()
    lab.wait_peers(device="flannel-v6.1")
    first, second = (make_runtime(Containerd, host) for host in lab.hosts)
    first.start("one", "sleep", "900")
    second.start("two", "sleep", "900")

    def address6(runtime: Containerd, name: str) -> str:
        runtime.address(name)
        shown = runtime.exec(name, "ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "global")
        return shown.split("inet6 ")[1].split("/")[0]

    one, two = address6(first, "one"), address6(second, "two")
    assert one.startswith("fc00:5:")
    # Duplicate address detection in the containers takes a second.
    eventually(lambda: "0% packet loss" in first.exec("one", "ping", "-6", "-c", "1", "-W", "2", two), 20)
    eventually(lambda: "0% packet loss" in second.exec("two", "ping", "-6", "-c", "1", "-W", "2", one), 20)
    eventually(lambda: "0% packet loss" in first.exec("one", "ping", "-c", "1", "-W", "5", second.address("two")))


@pytest.mark.field_problem(7)
def test_a_container_that_starts_before_the_daemon(lab: Lab, make_runtime: Callable[..., Containerd]) -> None:
    host = lab.hosts[0]
    daemon = host.start_daemon()
    daemon.stop()
    daemon.subnet_file.unlink(missing_ok=True)
    runtime = make_runtime(Containerd, host)
    path = runtime.net_d / "10-flannel.conflist"
    conflist = json.loads(path.read_text())
    conflist["plugins"][0]["waitSeconds"] = 0
    path.write_text(json.dumps(conflist))
    assert runtime.start("hasty", "true").wait(30) != 0
    assert "subnet.env: no such file or directory" in runtime.log("hasty")
    assert "flanneld is not running on this node" in runtime.log("hasty")
    conflist["plugins"][0]["waitSeconds"] = 60
    path.write_text(json.dumps(conflist))
    runtime.start("patient", "sleep", "900")
    daemon.start()
    assert runtime.address("patient").startswith("10.5.")


def test_without_the_plugin(make_lab: Callable[..., Lab], make_runtime: Callable[..., Containerd]) -> None:
    """The daemon renders the bridge's configuration; the host has no plugin flannel."""
    lab = make_lab(2)
    lab.set_config()
    paths = [host.directory / "net.d" / "10-flannel.conflist" for host in lab.hosts]
    for host, path in zip(lab.hosts, paths, strict=True):
        host.start_daemon(f"--cni-conf={path}")
    for host in lab.hosts:
        host.daemon.wait_ready()
    lab.wait_peers()
    runtimes = []
    for host, path in zip(lab.hosts, paths, strict=True):
        eventually(path.exists)
        runtime = make_runtime(Containerd, host, configuration=json.loads(path.read_text()))
        (runtime.bin / "flannel").unlink()
        runtimes.append(runtime)
    first, second = runtimes
    first.start("one", "sleep", "900")
    second.start("two", "sleep", "900")
    one, two = first.address("one"), second.address("two")
    eventually(lambda: "0% packet loss" in first.exec("one", "ping", "-c", "1", "-W", "5", two))
    eventually(lambda: "0% packet loss" in second.exec("two", "ping", "-c", "1", "-W", "5", one))


@pytest.mark.field_problem(29)
def test_the_plugin_knows_what_the_daemon_leases(lab: Lab, plugin: Path, tmp_path: Path) -> None:
    """The daemon's own status file: a subnet.env from another subnet is refused while it runs."""
    host = lab.hosts[0]
    daemon = host.start_daemon(wait=True)
    caller = Plugin(tmp_path / "cni", command=host.ns.argv([str(plugin)]), path=DEBIAN_PLUGINS)
    caller.conf["subnetFile"] = str(daemon.subnet_file)
    text = daemon.subnet_file.read_text()
    with Namespace("caller") as box:
        assert caller("ADD", netns=str(box.path)).code == 0
        assert caller("STATUS", cniVersion="1.1.0").code == 0
        assert caller("DEL", netns=str(box.path)).code == 0
        daemon.subnet_file.write_text(text.replace(daemon.subnet_env()["FLANNEL_SUBNET"], "10.5.251.1/24"))
        os.utime(daemon.subnet_file, (0, 0))
        answer = caller("ADD", netns=str(box.path))
        assert "it holds 10.5.251.0/24, but the node now leases 10.5." in answer.json["msg"], answer
        assert caller("STATUS", cniVersion="1.1.0").json["code"] == 50
