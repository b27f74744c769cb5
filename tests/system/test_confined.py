"""flanneld with no more rights than its systemd unit leaves it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until

UNIT = Path(__file__).resolve().parents[2] / "manifests" / "systemd" / "flanneld.service"


def test_the_units_capabilities_suffice(make_lab: Callable[..., Lab]) -> None:
    line = next(line for line in UNIT.read_text().splitlines() if line.startswith("CapabilityBoundingSet="))
    names = [name.removeprefix("CAP_").lower() for name in line.partition("=")[2].split()]
    confined = [
        "setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{','.join(f'+{name}' for name in names)}",
    ]  # fmt: skip
    lab = make_lab(2, program=(*confined, sys.executable, "-m", "flanneld.cli"))
    lab.set_config()
    lab.start_daemons("--ip-masq")
    lab.wait_peers()
    status = Path(f"/proc/{lab.hosts[0].daemon.process.pid}/status").read_text()
    assert "CapEff:\t0000000000013000" in status, status
    one, two = lab.hosts[0].container("one"), lab.hosts[1].container("two")
    wait_until(lambda: one.ping(two).ok, 5, "a ping")
    wait_until(lambda: two.ping(one).ok, 5, "a ping")
    assert "FLANNEL-POSTRTG" in lab.hosts[0].run("iptables -t nat -S")
