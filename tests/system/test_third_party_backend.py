"""A package that nobody here knows: the documentation's example, installed by pip and run by the daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.lab.hosts import Lab
from flanneld.lab.wait import wait_until
from tests.unit.test_docs_backends import blocks

CONFIG = {"Network": "10.5.0.0/16", "Backend": {"Type": "router", "Router": "172.30.0.1"}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the example, as it would into the daemon's environment."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    (source / "pyproject.toml").write_text(blocks("toml")[0])
    (source / "flanneld_router.py").write_text(blocks("python")[0])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def with_package(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that the test starts finds the package."""
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{installed}{os.pathsep + before if before else ''}")


def test_the_registry_of_another_process_knows_it(with_package: None) -> None:
    program = "from backends.registry import known_backends; print(*known_backends())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert {"router", "vxlan"} <= set(told.split())


def test_hosts_reach_each_other_through_it_and_its_routes_are_kept(
    with_package: None, make_lab: Callable[..., Lab]
) -> None:
    lab = make_lab(2)
    lab.set_config(CONFIG)
    lab.start_daemons()
    one, two = lab.hosts
    a, b = one.container("a"), two.container("b")
    wait_until(lambda: a.ping(b).ok and b.ping(a).ok, 10, "pings both ways")

    far = {"PublicIP": "198.51.100.9", "PublicIPv6": None, "BackendType": "router"}
    lab.etcd.ctl("put", "/coreos.com/network/subnets/10.5.250.0-24", json.dumps(far))
    expected = "10.5.250.0/24 via 172.30.0.1 dev eth0 proto 241"
    wait_until(lambda: expected in one.run("ip route"), 10, "the far peer's route goes through the router")

    one.run("ip route flush proto 241")
    wait_until(lambda: a.ping(b).ok and expected in one.run("ip route"), 10, "repaired")

    lab.set_config({"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}})
    wait_until(lambda: expected not in one.run("ip route"), 20, "gone with its backend")
    wait_until(lambda: a.ping(b).ok, 20, "and the next one at work")
