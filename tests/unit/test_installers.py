"""The image's installers, run on directories: whole files or none, nothing of the host's overwritten."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

INSTALLERS = Path(__file__).resolve().parents[2] / "manifests" / "image"
STANDARD = ("bridge", "host-local", "loopback", "portmap")


def run(name: str, *arguments: Path | str, check: bool = True) -> subprocess.CompletedProcess[str]:
    argv = [str(INSTALLERS / name), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=check, timeout=30)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What the image holds under /opt/cni."""
    source = tmp_path / "image"
    (source / "standard").mkdir(parents=True)
    for name in STANDARD:
        (source / "standard" / name).write_text(f"our {name}")
    (source / "plugin" / "flannel.d" / "lib").mkdir(parents=True)
    (source / "plugin" / "flannel").write_text("plugin 1")
    (source / "plugin" / "flannel.d" / "lib" / "module").write_text("module 1")
    return source


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The host's /opt/cni/bin."""
    directory = tmp_path / "bin"
    directory.mkdir()
    return directory


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


@pytest.mark.field_problem(31)
def test_an_empty_host_gets_everything(image, host):
    run("install-cni-plugin", host, image)
    assert content(host) == {name: f"our {name}" for name in STANDARD} | {"flannel": "plugin 1"}
    assert (host / "flannel.d" / "lib" / "module").read_text() == "module 1"
    assert all((host / name).stat().st_mode & 0o777 == 0o755 for name in (*STANDARD, "flannel"))


@pytest.mark.field_problem(31)
def test_the_hosts_own_plugins_stay_and_an_older_flannel_goes(image, host):
    (host / "bridge").write_text("the host's")
    (host / "flannel").write_text("an old one")
    (host / "flannel.d").mkdir()  # as script/cni makes it
    run("install-cni-plugin", host, image)
    assert content(host)["bridge"] == "the host's"
    assert content(host)["flannel"] == "plugin 1"
    assert (host / "flannel.d" / "lib" / "module").exists()


def test_a_second_time_nothing_is_touched(image, host):
    run("install-cni-plugin", host, image)
    before = {path: path.stat().st_mtime_ns for path in host.rglob("*")}
    assert "up to date" in run("install-cni-plugin", host, image).stdout
    assert {path: path.stat().st_mtime_ns for path in host.rglob("*")} == before


def test_an_upgrade_leaves_what_a_running_plugin_reads_and_drops_what_is_older(image, host):
    for version in (1, 2, 3):
        (image / "plugin" / "flannel").write_text(f"plugin {version}")
        (image / "plugin" / "flannel.d" / "lib" / "module").write_text(f"module {version}")
        run("install-cni-plugin", host, image)
    assert (host / "flannel.d" / "lib" / "module").read_text() == "module 3"
    kept = sorted(path.read_text() for path in host.glob(".flannel.d-*/lib/module"))
    assert kept == ["module 2", "module 3"]
    assert content(host)["flannel"] == "plugin 3"


def test_the_configuration_is_replaced_in_one_step_and_only_when_it_differs(tmp_path):
    source, target = tmp_path / "cni-conf.json", tmp_path / "net.d" / "10-flannel.conflist"
    target.parent.mkdir()
    source.write_text("new")
    target.write_text("old")
    before = target.stat().st_ino
    assert "wrote" in run("install-conf", source, target).stdout
    assert target.read_text() == "new"
    assert target.stat().st_ino != before, "a rename, not a write into the file that a runtime may be reading"
    assert target.stat().st_mode & 0o777 == 0o644
    after = target.stat().st_mtime_ns
    assert "up to date" in run("install-conf", source, target).stdout
    assert target.stat().st_mtime_ns == after
    assert [path.name for path in target.parent.iterdir()] == ["10-flannel.conflist"]


def test_what_is_missing_is_named(tmp_path):
    done = run("install-conf", tmp_path / "absent", tmp_path / "x", check=False)
    assert done.returncode == 1
    assert "ConfigMap" in done.stderr
    done = run("install-cni-plugin", tmp_path / "absent", check=False)
    assert done.returncode == 1
    assert "is it mounted?" in done.stderr
    assert run("install-conf", check=False).returncode == 2
