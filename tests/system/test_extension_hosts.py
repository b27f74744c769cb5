"""The extension backend on whole hosts: VXLAN made by shell commands alone, with what flannel's documentation shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from flanneld.lab.hosts import Host, Lab
from flanneld.lab.wait import wait_until

DEVICE = "ext0"
# The output of the first command, this host's MAC, reaches the peers through the lease and comes in as their input.
# It also counts how often it ran.
PRE = (
    f"ip link show {DEVICE} >/dev/null 2>&1 || ip link add {DEVICE} type vxlan id 7 dstport 4790 dev eth0 nolearning; "
    f"ip link set {DEVICE} mtu 1450 up; ip -brief link show {DEVICE} | awk '{{ print $3 }}'"
)
POST = f'ip addr replace "${{SUBNET%/*}}/32" dev {DEVICE}; ip link set {DEVICE} alias \'made for \'"$NETWORK"'
ADD = (
    f'read mac; base="${{SUBNET%/*}}"; bridge fdb replace "$mac" dev {DEVICE} dst "$PUBLIC_IP"; '
    f'ip neigh replace "$base" lladdr "$mac" dev {DEVICE}; ip route replace "$SUBNET" via "$base" dev {DEVICE} onlink'
)
REMOVE = (
    f'read mac; base="${{SUBNET%/*}}"; ip route del "$SUBNET" dev {DEVICE}; '
    f'ip neigh del "$base" dev {DEVICE}; bridge fdb del "$mac" dev {DEVICE} dst "$PUBLIC_IP"'
)


def config(**changes: str) -> dict[str, object]:
    commands = {
        "PreStartupCommand": PRE,
        "PostStartupCommand": POST,
        "SubnetAddCommand": ADD,
        "SubnetRemoveCommand": REMOVE,
        "ShutdownCommand": f"ip link del {DEVICE}",
    }
    return {"Network": "10.5.0.0/16", "Backend": {"Type": "extension", **commands, **changes}}


@pytest.fixture
def running(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(2)
    lab.set_config(config())
    lab.start_daemons()
    for host in lab.hosts:
        # The container's MTU is the device's: the daemon does not know what the commands do.
        host.container("c")
    reach(lab)
    return lab


def reach(lab: Lab) -> None:
    one, two = (host.containers[0] for host in lab.hosts)
    wait_until(lambda: one.ping(two).ok and two.ping(one).ok, 20, "pings both ways")


def test_commands_make_a_network(running: Lab) -> None:
    for host in running.hosts:
        assert "made for 10.5.0.0/16" in host.run(f"ip link show {DEVICE}")


@pytest.mark.field_problem(28)
def test_a_restart_runs_nothing_again(running: Lab) -> None:
    host = running.hosts[0]
    route = next(line for line in host.run(f"ip route show dev {DEVICE}").splitlines() if "via" in line)
    host.run(f"ip route del {route} dev {DEVICE}")
    host.daemon.restart()
    host.daemon.wait_ready()
    assert "via" not in host.run(f"ip route show dev {DEVICE}"), "an add command ran again"
    (host.daemon.run_dir / "subnet.hooks.json").unlink()
    wait_until(lambda: "via" in host.run(f"ip route show dev {DEVICE}"), 20, "all run again without the file")
    reach(running)


@pytest.mark.field_problem(19)
def test_a_peer_that_left_while_the_daemon_was_down_is_removed_with_its_own_values(running: Lab) -> None:
    one, two = running.hosts
    subnet = two.daemon.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")
    one.daemon.stop()
    two.daemon.kill()
    running.etcd.ctl("del", f"/coreos.com/network/subnets/{subnet.replace('/', '-')}")
    one.daemon.start()
    wait_until(lambda: subnet not in one.run("ip route"), 20, "route gone")
    wait_until(lambda: two.address not in one.run(f"bridge fdb show dev {DEVICE}"), 20, "forwarding entry gone")


def test_a_command_that_fails_makes_the_node_unready_with_its_output(running: Lab) -> None:
    one = running.hosts[0]
    running.set_config(config(SubnetAddCommand="echo no such tunnel >&2; exit 4"))
    wait_until(lambda: "exit code 4: no such tunnel" in why_not(one), 20, "the reason")
    running.set_config(config())
    wait_until(lambda: one.daemon.ready, 30, "ready again")
    reach(running)


def why_not(host: Host) -> str:
    with contextlib.suppress(OSError):
        return host.daemon.get("/readyz").text
    return ""


@pytest.mark.field_problem(20)
def test_a_switch_runs_the_removals_and_the_shutdown_command(running: Lab) -> None:
    running.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}})
    for host in running.hosts:
        wait_until(lambda h=host: DEVICE not in h.run("ip link"), 20, "the device gone")
    reach(running)
    running.set_config(config())
    for host in running.hosts:
        wait_until(lambda h=host: DEVICE in h.run("ip link"), 20, "made again")
    reach(running)
