"""WireGuard without a kernel module: the program wireguard-go, driven over its socket.

``wireguard-go DEV`` makes a TUN device, goes into the background and listens on /var/run/wireguard/DEV.sock, where it
speaks the text protocol of https://www.wireguard.com/xplatform/#configuration-protocol. Its process lives in a session
of its own and does not care about ours: a daemon that is restarted or killed finds it again by the socket. When the
device is deleted, or the socket, the program ends.

The socket's path names the device only, so two network namespaces on one machine want the same one. Whose a socket is,
the kernel knows: /proc/thread-self/net/unix lists those that were made in our network namespace. If the usual path is
taken by another namespace, wireguard-go is started with a folder of this namespace's own mounted over
/var/run/wireguard, in a mount namespace of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from flanneld.dataplane.wireguard_device import DeviceState, NotHere, PeerState, PeerWrite, canonical

SOCKETS: Final = Path("/var/run/wireguard")
"""Compiled into wireguard-go; also where wg(8) looks."""

PRIVATE_SOCKETS: Final = Path("/run/flannel/wireguard")
"""Below it, one folder for each network namespace that cannot have SOCKETS."""

ABANDONED_SECONDS: Final = 3600

START_SECONDS: Final = 15
ANSWER_SECONDS: Final = 10
CHUNK: Final = 500
"""Peers in one request."""

_LISTENING: Final = "00010000"
"""__SO_ACCEPTCON, the kernel's flag in /proc/net/unix."""

_NO_KEY: Final = "0" * 64
_SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Userspace:
    """Engine over wireguard-go."""

    name = "wireguard-go"
    clings_to_source = True

    def __init__(self, sockets: Path = SOCKETS, private_sockets: Path = PRIVATE_SOCKETS) -> None:
        self._sockets = sockets
        self._private = private_sockets

    def holds(self, dev: str, kind: str) -> bool:
        return kind == "tun" and self._path(dev) is not None

    def create(self, dev: str) -> None:
        program = shutil.which("wireguard-go", path=_SEARCH_PATH)
        if program is None:
            raise NotHere(
                errno.ENOENT, "the program wireguard-go is not installed (Debian: apt-get install wireguard-go)"
            )
        argv = [program, dev]
        if _answers(self._sockets / f"{dev}.sock") and not _made_here(f"{dev}.sock"):
            argv = self._apart(argv)
        _start(argv)
        deadline = time.monotonic() + START_SECONDS
        while self._path(dev) is None:
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"wireguard-go was started, but {dev}.sock does not answer")
            time.sleep(0.01)

    def read(self, dev: str) -> DeviceState:
        state = DeviceState()
        peer = PeerState()
        for key, value in self._ask(dev, ["get=1"]):
            match key:
                case "public_key":
                    peer = state.peers[_base64(value)] = PeerState()
                case "private_key":
                    state.private_key = _base64(value)
                case "listen_port":
                    state.listen_port = int(value)
                case "preshared_key":
                    peer.preshared_key = None if value == _NO_KEY else _base64(value)
                case "endpoint":
                    peer.endpoint = value
                case "allowed_ip":
                    peer.allowed_ips += (value,)
                case "persistent_keepalive_interval":
                    peer.keepalive = int(value)
                case "last_handshake_time_sec":
                    peer.handshake = int(value)
                case "rx_bytes":
                    peer.received = int(value)
                case "tx_bytes":
                    peer.sent = int(value)
        for peer in state.peers.values():
            peer.allowed_ips = canonical(peer.allowed_ips)
        return state

    def configure(self, dev: str, private_key: str, listen_port: int) -> None:
        self._ask(dev, ["set=1", f"private_key={_hex(private_key)}", f"listen_port={listen_port}"])

    def write(self, dev: str, peers: Sequence[PeerWrite]) -> None:
        for first in range(0, len(peers), CHUNK):
            self._ask(dev, ["set=1", *_lines(peers[first : first + CHUNK])])

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def _path(self, dev: str) -> Path | None:
        """The socket of the device in our network namespace, None if there is none or nobody listens."""
        name = f"{dev}.sock"
        if not _made_here(name):
            return None
        folders = (self._namespace_folder(), self._sockets)
        return next((folder / name for folder in folders if _answers(folder / name)), None)

    def _namespace_folder(self) -> Path:
        return self._private / str(Path("/proc/thread-self/ns/net").stat().st_ino)

    def _apart(self, argv: list[str]) -> list[str]:
        unshare = shutil.which("unshare", path=_SEARCH_PATH)
        if unshare is None:
            raise OSError(
                errno.EBUSY,
                f"{self._sockets}/{argv[-1]}.sock belongs to another network namespace, and a folder of our own needs "
                "the program unshare (Debian: apt-get install util-linux)",
            )
        self._sweep()
        folder = self._namespace_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        return [unshare, "--mount", "--", "sh", "-c", script, "sh", str(folder), str(self._sockets), *argv]

    def _sweep(self) -> None:
        """Remove the folders of network namespaces that are gone: old, and nobody answers in them."""
        for folder in self._private.glob("*"):
            with contextlib.suppress(OSError):
                sockets = list(folder.iterdir())
                if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS and not any(map(_answers, sockets)):
                    for path in sockets:
                        path.unlink()
                    folder.rmdir()

    def _ask(self, dev: str, lines: Iterable[str]) -> list[tuple[str, str]]:
        """One request and its answer; OSError with the program's errno if it refuses."""
        path = self._path(dev)
        if path is None:
            raise OSError(errno.ECONNREFUSED, f"wireguard-go does not answer for {dev}; was it killed?")
        try:
            received = _converse(path, "\n".join(lines) + "\n\n")
        except TimeoutError:
            told = f"wireguard-go does not answer for {dev} within {ANSWER_SECONDS} s; is its process stopped?"
            raise OSError(errno.ETIMEDOUT, told) from None
        answer = [_pair(line) for line in received.splitlines() if line]
        code = next((int(value) for key, value in answer if key == "errno"), 0)
        if code:
            raise OSError(abs(code), f"wireguard-go refuses it for {dev}: {os.strerror(abs(code))}")
        return answer


def _lines(peers: Iterable[PeerWrite]) -> Iterator[str]:
    for peer in peers:
        yield f"public_key={_hex(peer.public_key)}"
        if peer.remove:
            yield "remove=true"
            continue
        if peer.preshared_key is not None:
            yield f"preshared_key={_hex(peer.preshared_key) if peer.preshared_key else _NO_KEY}"
        if peer.endpoint is not None:
            yield f"endpoint={peer.endpoint}"
        if peer.keepalive is not None:
            yield f"persistent_keepalive_interval={peer.keepalive}"
        if peer.allowed_ips is not None:
            yield "replace_allowed_ips=true"
            yield from (f"allowed_ip={network}" for network in peer.allowed_ips)


def _made_here(file_name: str) -> bool:
    """Whether a listening socket of this file name was made in our network namespace.

    Our ends of connections to other namespaces' sockets stand in the same table, but do not listen.
    """
    with Path("/proc/thread-self/net/unix").open(encoding="utf-8", errors="replace") as table:
        rows = (line.split(maxsplit=7) for line in table)
        return any(len(row) == 8 and row[3] == _LISTENING and Path(row[7].rstrip()).name == file_name for row in rows)


def _connect(path: Path) -> socket.socket:
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        conn.settimeout(ANSWER_SECONDS)
        conn.connect(str(path))
    except OSError:
        conn.close()
        raise
    return conn


def _converse(path: Path, request: str) -> str:
    """Send a request; the answer, up to its empty line."""
    with _connect(path) as conn:
        conn.sendall(request.encode())
        received = bytearray()
        while not received.endswith(b"\n\n"):
            data = conn.recv(1 << 18)
            if not data:
                raise OSError(errno.ECONNRESET, f"wireguard-go went away while it was asked over {path}")
            received += data
    return received.decode()


def _answers(path: Path) -> bool:
    try:
        _connect(path).close()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            return False
        raise
    return True


def _start(argv: list[str]) -> None:
    """Start wireguard-go, which returns once device and socket stand and its background process runs."""
    env = {"PATH": _SEARCH_PATH}  # not ours: LOG_LEVEL and WG_* would change what it does
    try:
        done = subprocess.run(
            argv,
            env=env,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=START_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"{argv[0]} did not come up within {START_SECONDS} s") from None
    if done.returncode != 0:
        # On Linux it first recommends the kernel module, in a box.
        told = [line for line in (done.stderr + done.stdout).splitlines() if line.strip() and line[0] not in "┌│└"]
        raise OSError(errno.EIO, f"{' '.join(argv)}: exit {done.returncode}: {'; '.join(told) or 'no message'}")


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return key, value


def _hex(key: str) -> str:
    return b64decode(key).hex()


def _base64(key: str) -> str:
    return b64encode(bytes.fromhex(key)).decode()
