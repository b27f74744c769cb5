"""What docs/troubleshooting.md says an operator sees, seen: one reason, one log line, and its end another."""

from __future__ import annotations

import json

from flanneld.lab.hosts import Daemon, Lab
from flanneld.lab.wait import wait_until


def reasons(daemon: Daemon) -> dict[str, str]:
    """The lines of /readyz by condition; a reason of several lines by its first."""
    lines = (line[2:].split(": ", 1) for line in daemon.get("/readyz").text.splitlines() if line.startswith("- "))
    return dict(lines)


def events(daemon: Daemon) -> list[dict[str, str]]:
    return [json.loads(line) for line in daemon.log.read_text().splitlines()]


def test_a_node_without_a_configuration_says_what_to_type_and_goes_on(lab: Lab) -> None:
    lab.etcd.ctl("del", "/coreos.com/network/config")
    daemon = lab.hosts[0].start_daemon()
    wait_until(lambda: daemon.running and "config" in reasons(daemon), 15, daemon.why_not)
    assert "flannelctl config set" in reasons(daemon)["config"]
    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlann"}})
    wait_until(
        lambda: "'vxlann' is not known here; known: alloc" in reasons(daemon).get("config", ""), 15, daemon.why_not
    )
    lab.set_config()
    daemon.wait_ready(15)


def test_a_node_waits_for_the_interface_that_it_was_told_to_use_and_names_those_it_saw(lab: Lab) -> None:
    host = lab.hosts[0]
    daemon = host.start_daemon("--iface=eth7")
    wait_until(lambda: "underlay" in reasons(daemon), 15, daemon.why_not)
    text = daemon.get("/readyz").text
    assert "no interface matches --iface=eth7" in text
    assert "usable with --iface=eth0" in text
    shown = [line for line in text.splitlines()[1:] if not line.startswith("- ")]
    assert shown and all(line.startswith("  ") for line in shown), "what was seen belongs to the reason above it"
    host.run("ip link set eth0 down")
    host.run("ip link set eth0 name eth7")
    host.run("ip link set eth7 up")
    daemon.wait_ready(15)


def test_an_outage_of_etcd_is_one_line_and_one_reason_and_its_end_another(lab: Lab) -> None:
    (daemon, *_) = lab.start_daemons()
    start = len(events(daemon))
    lab.etcd.stop()
    # Whoever meets it first tells of it: mostly the watch. When the lease cannot be renewed either, that has the same
    # fault.
    wait_until(lambda: reasons(daemon).keys() & {"store", "lease"}, 40, daemon.why_not)
    wait_until(lambda: list(reasons(daemon)) == ["lease"], 40, daemon.why_not)
    assert "check that it runs and that --etcd-endpoints names it" in reasons(daemon)["lease"]
    # The keeper tries again and again meanwhile; each try is the same news.
    counted = errors_by(daemon, "unavailable")
    wait_until(lambda: errors_by(daemon, "unavailable") >= counted + 4, 40, daemon.why_not)
    lab.etcd.start()
    daemon.wait_ready(40)

    def seen() -> list[str]:
        told = [event for event in events(daemon)[start:] if event["level"] == "error" or event["event"] == "recovered"]
        return [event["event"] for event in told]

    wait_until(lambda: "recovered" in seen(), 10, lambda: str(seen()))
    (error, end) = seen()
    assert "check that it runs and that --etcd-endpoints names it" in error and end == "recovered"


def test_a_daemon_that_never_reached_its_store_says_so(lab: Lab) -> None:
    lab.etcd.stop()
    daemon = lab.hosts[0].start_daemon()
    wait_until(lambda: "lease" in reasons(daemon), 15, daemon.why_not)
    wait_until(lambda: daemon.get("/status").json()["store_errors"], 15, "the watch has failed, too")
    wait_until(lambda: list(reasons(daemon)) == ["lease", "kernel"], 15, daemon.why_not)
    assert daemon.get("/status").json()["watch_age"] is None
    assert "never heard of" in lab.hosts[0].ctl("status").stdout
    told = [event["event"] for event in events(daemon) if event["level"] in ("error", "warning")]
    assert len(told) == 1, told


def errors_by(daemon: Daemon, cause: str) -> float:
    text = daemon.get("/metrics").text
    wanted = f'flanneld_errors_total{{cause="{cause}"}} '
    return next((float(line.removeprefix(wanted)) for line in text.splitlines() if line.startswith(wanted)), 0.0)
