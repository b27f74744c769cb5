"""The two ways to speak to a WireGuard device: netlink through pyroute2's tables, and wireguard-go's text protocol."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.generic.wireguard import AsyncWireGuard, wgmsg

from flanneld.dataplane import wireguard_userspace
from flanneld.dataplane.wireguard_device import NotHere, PeerState, PeerWrite
from flanneld.dataplane.wireguard_kernel import decode, encode
from flanneld.dataplane.wireguard_userspace import Userspace

KEY, PSK = (b64encode(bytes([n]) * 32).decode() for n in (1, 2))
V4 = PeerWrite(KEY, endpoint="192.0.2.1:51820", allowed_ips=("10.5.1.0/24",), keepalive=25, preshared_key=PSK)
V6 = PeerWrite(KEY, endpoint="[2001:db8::1]:51821", allowed_ips=("10.5.1.0/24", "fc00::/64"), preshared_key="")


def through_netlink(write: PeerWrite) -> Any:
    """The peer as bytes for the kernel and back, by the library's tables."""
    message = wgmsg()
    message["attrs"].append(["WGDEVICE_A_IFNAME", "flannel-wg"])
    message["attrs"].append(["WGDEVICE_A_LISTEN_PORT", 51820])
    message["attrs"].append(["WGDEVICE_A_PRIVATE_KEY", PSK])
    AsyncWireGuard._wg_set_peer(AsyncWireGuard.__new__(AsyncWireGuard), message, encode(write))
    message.encode()
    back = wgmsg(message.data)
    back.decode()
    return back


def test_the_kernel_s_answer_becomes_the_device_s_state() -> None:
    state = decode([through_netlink(V4)])
    assert (state.private_key, state.listen_port) == (PSK, 51820)
    assert state.peers == {KEY: PeerState("192.0.2.1:51820", ("10.5.1.0/24",), 25, PSK)}


def test_ipv6_and_the_key_of_zeros() -> None:
    state = decode([through_netlink(V6)])
    assert state.peers == {KEY: PeerState("[2001:db8::1]:51821", ("10.5.1.0/24", "fc00::/64"))}


def test_a_peer_that_goes_on_in_the_next_message_is_one_peer() -> None:
    more = PeerWrite(KEY, allowed_ips=("10.5.0.0/24",))
    state = decode([through_netlink(V4), through_netlink(more)])
    assert state.peers[KEY].allowed_ips == ("10.5.0.0/24", "10.5.1.0/24")
    assert state.peers[KEY].endpoint == "192.0.2.1:51820"


def test_what_is_left_alone_is_not_sent() -> None:
    assert encode(PeerWrite(KEY, keepalive=0)) == {"public_key": KEY, "persistent_keepalive": 0}
    assert encode(PeerWrite(KEY, remove=True, endpoint="x:1")) == {"public_key": KEY, "remove": True}


class FakeProgram:
    """Listens as wireguard-go does, keeps what it was told and gives one answer."""

    def __init__(self, path: Path, answer: str) -> None:
        self.told: list[str] = []
        self._answer = answer.encode()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            conn, _ = self._sock.accept()
            with conn:
                told = b""
                while not told.endswith(b"\n\n") and (data := conn.recv(65536)):
                    told += data
                if told == b"bye\n\n":
                    return
                if told:
                    self.told.append(told.decode())
                    conn.sendall(self._answer)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self._sock.getsockname())
            last.sendall(b"bye\n\n")
        self._thread.join()
        self._sock.close()


@contextlib.contextmanager
def program(folder: Path, answer: str) -> Iterator[tuple[Userspace, FakeProgram]]:
    device = f"wgfake{os.getpid()}"
    fake = FakeProgram(folder / f"{device}.sock", answer)
    try:
        yield Userspace(folder, folder / "private"), fake
    finally:
        fake.close()


DEV = f"wgfake{os.getpid()}"


def test_the_text_protocol_reads_as_written(tmp_path: Path) -> None:
    answer = (
        f"private_key={'02' * 32}\nlisten_port=51820\npublic_key={'01' * 32}\npreshared_key={'00' * 32}\n"
        "protocol_version=1\nendpoint=[2001:db8::1]:51821\nlast_handshake_time_sec=1700000000\n"
        "last_handshake_time_nsec=5\ntx_bytes=11\nrx_bytes=22\npersistent_keepalive_interval=25\n"
        "allowed_ip=fc00::/64\nallowed_ip=10.5.1.0/24\nerrno=0\n\n"
    )
    with program(tmp_path, answer) as (engine, fake):
        state = engine.read(DEV)
        assert fake.told == ["get=1\n\n"]
    assert (state.private_key, state.listen_port) == (PSK, 51820)
    assert state.peers == {
        KEY: PeerState("[2001:db8::1]:51821", ("10.5.1.0/24", "fc00::/64"), 25, None, 1700000000, 22, 11)
    }
    assert PSK not in repr(state)


def test_what_is_written_is_the_protocol_s(tmp_path: Path) -> None:
    with program(tmp_path, "errno=0\n\n") as (engine, fake):
        engine.configure(DEV, PSK, 51820)
        engine.write(DEV, [V4, PeerWrite(KEY, remove=True), PeerWrite(KEY, preshared_key="")])
        assert fake.told == [
            f"set=1\nprivate_key={'02' * 32}\nlisten_port=51820\n\n",
            f"set=1\npublic_key={'01' * 32}\npreshared_key={'02' * 32}\nendpoint=192.0.2.1:51820\n"
            "persistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.5.1.0/24\n"
            f"public_key={'01' * 32}\nremove=true\n"
            f"public_key={'01' * 32}\npreshared_key={'00' * 32}\n\n",
        ]


def test_a_refusal_is_a_sentence_with_the_program_s_errno(tmp_path: Path) -> None:
    with (
        program(tmp_path, "errno=-98\n\n") as (engine, _),
        pytest.raises(OSError, match="wireguard-go refuses") as error,
    ):
        engine.configure(DEV, PSK, 51820)
    assert error.value.errno == errno.EADDRINUSE
    assert PSK not in str(error.value)


def test_nobody_listening_is_said_and_not_held(tmp_path: Path) -> None:
    engine = Userspace(tmp_path)
    assert not engine.holds(DEV, "tun")
    with pytest.raises(ConnectionRefusedError, match="does not answer"):
        engine.read(DEV)


def test_a_missing_program_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wireguard_userspace, "_SEARCH_PATH", str(tmp_path))
    with pytest.raises(NotHere, match="apt-get install wireguard-go"):
        Userspace(tmp_path).create(DEV)


def test_a_program_that_fails_is_quoted_without_its_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "wireguard-go"
    script.write_text("#!/bin/sh\necho '│ kernel is better │' >&2; echo 'no tun' >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(wireguard_userspace, "_SEARCH_PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"exit 1: no tun$"):
        Userspace(tmp_path).create(DEV)
