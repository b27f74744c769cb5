"""The systemd units: systemd accepts them, and they order Docker after flanneld."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "manifests" / "systemd"


def settings(path: Path) -> dict[str, list[str]]:
    """All assignments of a unit, by key."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def verify(tmp_path: Path) -> object:
    """Have systemd read the units, with programs of this machine in the place of those that may not be installed."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")

    def run(*extra: str) -> str:
        shutil.copytree(UNITS, tmp_path / "units")
        for path in (tmp_path / "units").rglob("*"):
            if path.is_file():
                text = path.read_text()
                for program in ("/usr/local/bin/flanneld", "/usr/local/bin/flannelctl", "ExecStart=dockerd"):
                    stand_in = "ExecStart=/bin/true" if program.startswith("Exec") else "/bin/true"
                    text = text.replace(program, stand_in)
                path.write_text(text)
        (tmp_path / "units" / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
        names = sorted(path.name for path in (tmp_path / "units").iterdir() if path.is_file())
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=one", *extra, *names],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path / "units",
            env={"SYSTEMD_UNIT_PATH": f"{tmp_path / 'units'}:", "PATH": "/usr/bin:/bin"},
        )
        return f"exit {done.returncode}: {done.stdout}{done.stderr}" if done.returncode or done.stderr else ""

    return run


def test_systemd_accepts_them(verify) -> None:
    problems = [line for line in verify().splitlines() if any(unit in line for unit in ("flannel", "docker", "exit"))]
    assert problems == []


def test_flanneld_is_confined() -> None:
    unit = settings(UNITS / "flanneld.service")
    assert unit["CapabilityBoundingSet"] == ["CAP_NET_ADMIN CAP_NET_RAW CAP_SYS_MODULE"]
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["NoNewPrivileges"] == ["yes"]
    assert (unit["Type"], unit["WatchdogSec"]) == (["notify"], ["30"])
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]


@pytest.mark.field_problem(36)
def test_docker_starts_after_flanneld_is_ready() -> None:
    drop_in = settings(UNITS / "docker.service.d" / "flannel.conf")
    assert "flanneld.service" in drop_in["After"][0].split()
    assert "Requires" not in drop_in
    assert drop_in["EnvironmentFile"] == ["/run/docker_opts.env"]
    helper = settings(UNITS / "flanneld-docker.service")
    assert helper["Before"] == ["docker.service"]


def test_the_commands_in_them_exist() -> None:
    """What the units call is what flannelctl understands."""
    import shlex

    from flanneld.ctl.cli import build_parser

    command = shlex.split(settings(UNITS / "flanneld-docker.service")["ExecStart"][0])
    parsed = build_parser().parse_args(command[1:])
    assert (parsed.combined, parsed.output) == (True, "/run/docker_opts.env")
    assert parsed.on_change == "systemctl --no-block try-restart docker.service"
