"""Two real dockerd, each on a host of the lab, over the overlay of real daemons."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flanneld.lab.hosts import Host, Lab, eventually
from flanneld.lab.netns import run
from tests.testbed import busybox
from tests.testbed.runtimes import Docker, closing_all, missing

LACKING = missing("dockerd", "docker", "containerd", "runc", "busybox", "iptables")
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")

GET = r"printf 'GET /passwd HTTP/1.0\r\n\r\n' | busybox nc -w 5 {} {}"
SERVE = ("httpd", "-f", "-p", "80", "-h", "/etc")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox.root(tmp_path_factory.mktemp("root") / "root.tar")


@pytest.fixture
def two_hosts(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(2)
    lab.set_config()
    lab.start_daemons("--ip-masq")
    lab.wait_peers()
    return lab


@pytest.fixture
def start_docker(root: Path) -> Iterator[Callable[..., Docker]]:
    with closing_all() as made:

        def start(host: Host, *options: str) -> Docker:
            docker = Docker(host, options, root)
            made.append(docker)
            return docker

        yield start


def docker_options(host: Host) -> list[str]:
    """What a systemd unit gets as $DOCKER_OPTS from the file that ``flannelctl docker-opts`` writes."""
    path = host.directory / "docker_opts.env"
    flannelctl = [sys.executable, "-m", "flanneld.ctl.cli"]
    run([*flannelctl, "docker-opts", "-c", "-f", str(host.daemon.subnet_file), "-d", str(path)])
    return path.read_text().split("=", 1)[1].strip().strip('"').split()


def test_containers_of_two_dockers_reach_each_other(two_hosts: Lab, start_docker: Callable[..., Docker]) -> None:
    first, second = (start_docker(host, *docker_options(host)) for host in two_hosts.hosts)
    one = first.run("one", *SERVE, flags=["--publish=8080:80"])
    two = second.run("two", *SERVE)
    for docker, address in ((first, one), (second, two)):
        assert address.rsplit(".", 1)[0] == docker.host.daemon.subnet_env()["FLANNEL_SUBNET"].rsplit(".", 1)[0]
        assert " mtu 1450 " in docker.host.run("ip link show dev docker0")
    # dockerd sets the policy of FORWARD to DROP; the overlay works all the same.
    eventually(lambda: "0% packet loss" in first.docker("exec", "one", "ping", "-c", "1", "-W", "5", two))
    eventually(lambda: "0% packet loss" in second.docker("exec", "two", "ping", "-c", "1", "-W", "5", one))
    published = GET.format(two_hosts.hosts[0].address, 8080)
    assert "root" in eventually(lambda: two_hosts.hosts[1].run(["sh", "-c", published]))
    eventually(lambda: "root" in second.docker("exec", "two", "sh", "-c", published))


def test_a_docker_network_of_the_nodes_subnet(two_hosts: Lab, start_docker: Callable[..., Docker]) -> None:
    """docker network create instead of --bip: docker0 stays as it is, and the user's network is the flannel one."""
    dockers = []
    for host in two_hosts.hosts:
        docker = start_docker(host, "--bridge=none")
        env = host.daemon.subnet_env()
        gateway, _, length = env["FLANNEL_SUBNET"].partition("/")
        docker.docker(
            "network", "create", f"--subnet={gateway.rsplit('.', 1)[0]}.0/{length}", f"--gateway={gateway}",
            f"--opt=com.docker.network.driver.mtu={env['FLANNEL_MTU']}",
            "--opt=com.docker.network.bridge.enable_ip_masquerade=false", "flannel",
        )  # fmt: skip
        dockers.append(docker)
    first, second = dockers
    one = first.run("one", "sleep", "900", flags=["--network=flannel"])
    two = second.run("two", "sleep", "900", flags=["--network=flannel"])
    eventually(lambda: "0% packet loss" in first.docker("exec", "one", "ping", "-c", "1", "-W", "5", two))
    eventually(lambda: "0% packet loss" in second.docker("exec", "two", "ping", "-c", "1", "-W", "5", one))


@pytest.mark.field_problem(36)
def test_docker_follows_a_changed_subnet(two_hosts: Lab, start_docker: Callable[..., Docker]) -> None:
    """The hook restarts Docker when, and only when, its values changed; afterwards it uses the new subnet."""
    host = two_hosts.hosts[0]
    before = docker_options(host)
    docker = start_docker(host, *before)
    fired = host.directory / "fired"
    command = [
        sys.executable, "-m", "flanneld.ctl.cli", "docker-opts", "-c", "-f", str(host.daemon.subnet_file),
        "-d", str(host.directory / "docker_opts.env"), "--on-change", f"touch {fired}",
    ]  # fmt: skip
    host.daemon.restart()
    host.daemon.wait_ready()
    run(command)
    assert not fired.exists()
    # Another subnet, as after a changed network configuration.
    text = host.daemon.subnet_file.read_text()
    changed = host.directory / "changed.env"
    changed.write_text(text.replace(host.daemon.subnet_env()["FLANNEL_SUBNET"], "10.5.250.1/24"))
    run([word if word != str(host.daemon.subnet_file) else str(changed) for word in command])
    assert fired.exists()
    docker.stop()
    after = (host.directory / "docker_opts.env").read_text().split('"')[1].split()
    docker.start(after)
    assert docker.run("one", "sleep", "900").startswith("10.5.250.")
