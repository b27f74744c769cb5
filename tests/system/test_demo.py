"""The demo, as a person runs it, and what it leaves behind: nothing, unless asked."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flanneld.lab.wait import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces")
DEMO = [sys.executable, "-m", "flanneld.ctl.cli", "demo"]
LEFT = re.compile(r"--remove (\S+)")


def traces(directory: Path) -> set[str]:
    """Namespaces and temporary directories that a lab makes, by name; others' runs have other names."""
    return {str(path) for path in directory.glob("flanneld-*")}


def too_wide(out: str) -> list[str]:
    """What does not fit in the columns that every terminal has."""
    return [line for line in out.splitlines() if len(line) > 80]


@pytest.mark.field_problem(1)
@pytest.mark.field_problem(2)
def test_three_hosts_from_nothing_to_healed_and_gone(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--hosts", "3"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in out, "colour codes although nobody looks at a terminal"
    assert "18 of 18 answered" in out
    assert re.search(r"underlay +[\d.]+ Gbit/s", out) and re.search(r"overlay +[\d.]+ Gbit/s", out)
    assert re.search(r"UDP +\d+ > 8472\nVXLAN +VNI 1\n", out)
    for what in ("a route", "an FDB entry", "the whole device"):
        healed = re.search(rf"^{what} +healed after (?:< )?([\d.]+) ms +(\d+) of \d+ pings lost$", out, re.MULTILINE)
        assert healed, f"{what}: not healed:\n{out}"
        assert float(healed[1]) < 10_000
    assert "everything worked" in out
    assert too_wide(out) == []
    assert traces(tmp_path) == set()


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    # A shell that runs these tests in the background has them, and what they start, ignore the signal.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *DEMO, "--hosts", "2", "--nftables"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    )
    try:
        wait_until(lambda: list(tmp_path.glob("flanneld-lab-*/h2/flanneld.log")), 60, "both daemons to start")
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130, out
    assert "interrupted" in out and "Traceback" not in out
    assert traces(tmp_path) == set()


def test_kept_running_then_removed(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*DEMO, "--hosts", "2", "--nftables", "--subnet", "10.77.0.0/16", "--keep"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=environment,
    )
    left = LEFT.search(done.stdout)
    assert left, done.stdout + done.stderr
    try:
        assert done.returncode == 0, done.stdout
        assert too_wide(done.stdout.replace(str(tmp_path), "/tmp")) == []
        shown = {
            line.removeprefix("  sudo sh "): subprocess.run(
                line.removeprefix("  sudo ").split(), capture_output=True, text=True, check=True
            ).stdout
            for line in done.stdout.splitlines()
            if line.startswith("  sudo sh ")
        }
        door = f"{left[1]}/on-h1"
        routes = shown[f"{door} ip route"]
        assert re.search(r"^10\.77\.\d+\.0/24 via 10\.77\.\d+\.0 dev flannel\.1", routes, re.MULTILINE), routes
        assert [line.split()[1] for line in shown[f"{door} flannelctl leases"].splitlines()[1:]] in (
            ["h1", "h2"],
            ["h2", "h1"],
        )
        assert "kernel    as it should be" in shown[f"{door} flannelctl status --diff"]
        tables = subprocess.run(
            ["sh", f"{left[1]}/on-h2"], input="nft list tables", capture_output=True, text=True, check=True
        )
        assert "table ip flannel-ipv4" in tables.stdout
    finally:
        removed = subprocess.run(
            [*DEMO, "--remove", left[1]], capture_output=True, text=True, timeout=60, check=False, env=environment
        )
    assert removed.returncode == 0, removed.stderr
    assert not Path(left[1]).exists()
    assert traces(tmp_path) == set()
    again = subprocess.run([*DEMO, "--remove", left[1]], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 1 and "not a demo that was left running" in again.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--hosts", "1"], "choose 2 to 20"),
        (["--subnet", "10.5.0.0"], "room for 0 hosts"),
        (["--subnet", "10.5.0.1/16"], "give a network such as"),
        (["--subnet", "172.30.0.0/16"], "overlaps"),
    ],
)
def test_what_cannot_work_is_said_at_once(words: list[str], reason: str) -> None:
    began = time.monotonic()
    done = subprocess.run([*DEMO, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 30
