"""The two ways to speak to a WireGuard device: the kernel's netlink, compared with pyroute2, and wireguard-go's text."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import tempfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.generic.wireguard import AsyncWireGuard, wgmsg

from flanneld.dataplane import wireguard_userspace
from flanneld.dataplane.netlink import Netlink, NetlinkError
from flanneld.dataplane.wire import NLMSG_DONE, attribute
from flanneld.dataplane.wireguard_device import NotHere, PeerState, PeerWrite
from flanneld.dataplane.wireguard_kernel import NETLINK_GENERIC, PEERS_A_MESSAGE
from flanneld.dataplane.wireguard_userspace import Userspace
from flanneld.dataplane.wireguard_wire import (
    CONTROL_FAMILY,
    decode_device,
    family_number,
    family_request,
    set_device,
    set_peers,
)

KEY, PSK = (b64encode(bytes([n]) * 32).decode() for n in (1, 2))
V4 = PeerWrite(KEY, endpoint="192.0.2.1:51820", allowed_ips=("10.5.1.0/24",), keepalive=25, preshared_key=PSK)
V6 = PeerWrite(KEY, endpoint="[2001:db8::1]:51821", allowed_ips=("10.5.1.0/24", "fc00::/64"), preshared_key="")


def told_to_pyroute2(body: bytes) -> Any:
    """What pyroute2's tables make of a request of ours."""
    message = wgmsg(struct.pack("=IHHII", 16 + len(body), 30, 5, 1, 0) + body)
    message.decode()
    return message


def told_by_pyroute2(*peers: dict[str, Any]) -> tuple[int, bytes]:
    """A device as pyroute2's tables write it, which is how the kernel does: message type and body."""
    message = wgmsg()
    message["attrs"] += [["WGDEVICE_A_LISTEN_PORT", 51820], ["WGDEVICE_A_PRIVATE_KEY", PSK]]
    for peer in peers:
        AsyncWireGuard._wg_set_peer(AsyncWireGuard.__new__(AsyncWireGuard), message, peer)
    message.encode()
    return 30, bytes(message.data[16:])


V4_TOLD = {
    "public_key": KEY,
    "endpoint_addr": "192.0.2.1",
    "endpoint_port": 51820,
    "allowed_ips": ["10.5.1.0/24"],
    "persistent_keepalive": 25,
    "preshared_key": PSK,
}
V6_TOLD = {
    "public_key": KEY,
    "endpoint_addr": "2001:db8::1",
    "endpoint_port": 51821,
    "allowed_ips": ["fc00::/64", "10.5.1.0/24"],
    "preshared_key": "A" * 43 + "=",
}


def test_the_kernel_s_answer_becomes_the_device_s_state() -> None:
    state = decode_device([told_by_pyroute2(V4_TOLD), (NLMSG_DONE, b"\0\0\0\0")])
    assert (state.private_key, state.listen_port) == (PSK, 51820)
    assert state.peers == {KEY: PeerState("192.0.2.1:51820", ("10.5.1.0/24",), 25, PSK)}


def test_ipv6_and_the_key_of_zeros() -> None:
    state = decode_device([told_by_pyroute2(V6_TOLD)])
    assert state.peers == {KEY: PeerState("[2001:db8::1]:51821", ("10.5.1.0/24", "fc00::/64"))}


def test_a_peer_that_goes_on_in_the_next_message_is_one_peer() -> None:
    more = {"public_key": KEY, "allowed_ips": ["10.5.0.0/24"]}
    state = decode_device([told_by_pyroute2(V4_TOLD), told_by_pyroute2(more)])
    assert state.peers[KEY].allowed_ips == ("10.5.0.0/24", "10.5.1.0/24")
    assert state.peers[KEY].endpoint == "192.0.2.1:51820"


def test_handshake_and_counters() -> None:
    times = (
        attribute(6, struct.pack("=QQ", 1700000000, 5))
        + attribute(7, struct.pack("=Q", 22))
        + attribute(8, struct.pack("=Q", 11))
    )
    peer = attribute(0, attribute(1, b"\1" * 32) + times)
    state = decode_device([(30, b"\0\1\0\0" + attribute(8, peer))])
    assert state.peers == {KEY: PeerState(handshake=1700000000, received=22, sent=11)}


@pytest.mark.parametrize("told", [V4_TOLD, V6_TOLD])
def test_what_we_write_is_what_pyroute2_would(told: dict[str, Any]) -> None:
    write = V4 if told is V4_TOLD else V6
    (ours,) = told_to_pyroute2(set_peers("flannel-wg", [write])).get_attr("WGDEVICE_A_PEERS")
    assert ours.get_attr("WGPEER_A_PUBLIC_KEY").decode() == KEY
    assert ours.get_attr("WGPEER_A_PRESHARED_KEY").decode() == told["preshared_key"]
    endpoint = ours.get_attr("WGPEER_A_ENDPOINT")
    assert (endpoint["addr"], endpoint["port"]) == (told["endpoint_addr"], told["endpoint_port"])
    assert {allowed["addr"] for allowed in ours.get_attr("WGPEER_A_ALLOWEDIPS")} == set(told["allowed_ips"])
    assert ours.get_attr("WGPEER_A_FLAGS") == 2


def test_the_device_s_own_settings() -> None:
    message = told_to_pyroute2(set_device("flannel-wg", PSK, 51820))
    assert (message["cmd"], message["version"]) == (1, 1)
    assert message.get_attr("WGDEVICE_A_IFNAME") == "flannel-wg"
    assert message.get_attr("WGDEVICE_A_LISTEN_PORT") == 51820
    assert message.get_attr("WGDEVICE_A_PRIVATE_KEY").decode() == PSK


def test_what_is_left_alone_is_not_sent() -> None:
    message = told_to_pyroute2(
        set_peers("x", [PeerWrite(KEY, keepalive=0), PeerWrite(KEY, remove=True, endpoint="x:1")])
    )
    keep, remove = message.get_attr("WGDEVICE_A_PEERS")
    assert [name for name, _ in keep["attrs"]] == ["WGPEER_A_PUBLIC_KEY", "WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL"]
    assert [name for name, _ in remove["attrs"]] == ["WGPEER_A_PUBLIC_KEY", "WGPEER_A_FLAGS"]
    assert remove.get_attr("WGPEER_A_FLAGS") == 1


def test_a_full_message_fits_its_attribute() -> None:
    longest = PeerWrite(KEY, False, V6.endpoint, ("10.5.1.0/24", "fc00::/64"), 25, PSK)
    assert len(set_peers("flannel-wg-v6", [longest] * PEERS_A_MESSAGE)) < 1 << 16


def test_this_kernel_gives_its_families_numbers() -> None:
    with contextlib.closing(Netlink(NETLINK_GENERIC)) as netlink:
        assert family_number(netlink.get(CONTROL_FAMILY, family_request("nlctrl"))) == CONTROL_FAMILY
        with pytest.raises(NetlinkError) as error:
            netlink.get(CONTROL_FAMILY, family_request("no-such-family"))
    assert error.value.errno == errno.ENOENT


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: the name of a socket has 108 bytes at most, and beside other tests pytest's own directory is long."""
    with tempfile.TemporaryDirectory(prefix="wg") as directory:
        yield Path(directory)


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


def test_folders_of_namespaces_that_are_gone_are_removed(tmp_path: Path) -> None:
    alive, dead, new = (tmp_path / name for name in ("1", "2", "3"))
    for folder in (alive, dead, new):
        folder.mkdir()
    for folder in (dead, new):
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(folder / "flannel-wg.sock"))
    with program(alive, "errno=0\n\n"):
        for folder in (alive, dead):
            os.utime(folder, (0, 0))
        Userspace(tmp_path / "usual", tmp_path)._sweep()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


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
