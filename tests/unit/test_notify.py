"""What systemd hears from us (sd_notify(3)), with a socket of ours in its place."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanneld.notify import notify, watchdog_interval


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_assignments_are_one_message(systemd: socket.socket) -> None:
    notify("READY=1", "STATUS=ready, subnet 10.5.52.0/24")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=ready, subnet 10.5.52.0/24"


def test_an_abstract_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"flanneld-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("STOPPING=1")
        assert listener.recv(4096) == b"STOPPING=1"


@pytest.mark.parametrize("where", ["", "/nowhere/notify"])
def test_nobody_listening_is_no_fault(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", where)
    notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", None, 15.0),
        ("30000000", "us", 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        ("", None, None),
    ],
)
def test_signs_of_life_come_twice_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "us" else pid)
    assert watchdog_interval() == seconds
