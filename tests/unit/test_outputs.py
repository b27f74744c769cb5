"""What stands on disk for others: written once, put back when it is gone, and never a reason to hang."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from flanneld.board import Board
from flanneld.desired import Standing
from flanneld.options import parse
from flanneld.outputs import STATUS_FILE, Outputs, listening
from flanneld.status import WAITING, Health
from subnet_lease.lease import Lease, LeaseAttrs
from tests.unit.backend_values import host

LEASE = Lease(IPv4Network("10.5.1.0/24"), None, LeaseAttrs())


class PlainBackend:
    name = "host-gw"

    def mtu(self, *_: object) -> int:
        return 1500

    def host_state(self, _: object) -> tuple[()]:
        return ()


class Node:
    """A node whose data path stands, with its files in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        options, _ = parse([f"--subnet-file={directory / 'subnet.env'}", "--node-name=n"], {})
        self.health, self.board = Health(), Board()
        for condition in WAITING:
            self.health.set(condition, None)
        self.outputs = Outputs(options, self.board, self.health)
        self.health.on_change = self.outputs.write_status
        self.standing = Standing(PlainBackend(), host(), LEASE)  # type: ignore[arg-type]
        self.board.standing, self.board.lease = self.standing, LEASE

    def look(self) -> None:
        self.outputs.data_path_stands(self.standing)

    @property
    def files(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.directory.iterdir()}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    node = Node(tmp_path / "flannel")
    node.look()
    return node


def test_looking_again_writes_nothing(node: Node) -> None:
    before = node.files
    assert set(before) == {"subnet.env", STATUS_FILE}
    node.look()
    assert node.files == before


@pytest.mark.field_problem(7)
@pytest.mark.parametrize("name", ["subnet.env", STATUS_FILE])
def test_a_file_that_somebody_removed_comes_back(node: Node, name: str) -> None:
    text = (node.directory / name).read_text()
    (node.directory / name).unlink()
    node.look()
    assert (node.directory / name).read_text() == text


def test_a_directory_that_somebody_removed_comes_back(node: Node) -> None:
    shutil.rmtree(node.directory)
    node.look()
    assert set(node.files) == {"subnet.env", STATUS_FILE}


def test_an_altered_subnet_file_is_put_right(node: Node) -> None:
    path = node.directory / "subnet.env"
    text = path.read_text()
    path.write_text("FLANNEL_SUBNET=10.9.9.1/24\n")
    node.look()
    assert path.read_text() == text


def in_time(work: Callable[[], None]) -> bool:
    """Whether ``work`` ends; a thread that waits for itself would not."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_a_status_file_that_cannot_be_written_is_a_reason_that_ends_with_its_cause(node: Node) -> None:
    path = node.directory / STATUS_FILE
    path.unlink()
    path.mkdir()
    assert in_time(lambda: node.health.set("store", "gone"))
    assert f"cannot write {path}" in (node.health.reason("subnet_file") or "")
    path.rmdir()
    assert in_time(lambda: node.health.set("store", None))
    assert node.health.ready
    assert path.is_file()


def test_a_write_of_the_status_file_that_failed_once_is_tried_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("flanneld.outputs.write_status_file", full_disk)
        node.health.set("store", "gone")
        node.health.set("store", None)
        assert "No space left" in (node.health.reason("subnet_file") or "")
    node.look()
    assert node.health.ready


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_subnet_file_that_cannot_be_written_is_a_reason_until_it_can(node: Node) -> None:
    path = node.directory / "subnet.env"
    path.unlink()
    path.mkdir()
    node.look()
    assert f"cannot write --subnet-file={path}" in (node.health.reason("subnet_file") or "")
    path.rmdir()
    node.look()
    assert node.health.ready
    node.standing = replace(node.standing, blackhole=True)
    node.look()
    assert path.is_file()


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ([], None),
        (["--healthz-port=8081"], "0.0.0.0:8081"),
        (["--healthz-port=8081", "--healthz-ip="], "0.0.0.0:8081"),
        (["--healthz-port=8081", "--healthz-ip=::1"], "[::1]:8081"),
    ],
)
def test_the_status_file_says_where_the_daemon_listens(flags: list[str], where: str | None) -> None:
    options, _ = parse(flags, {})
    assert listening(options) == where
    assert Outputs(options, Board(), Health()).summary()["healthz"] == where
