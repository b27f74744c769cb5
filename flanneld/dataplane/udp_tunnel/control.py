"""What the daemon and the worker say to each other: one JSON object a line over a Unix stream socket.

The socket's name is abstract, so it belongs to the network namespace as the device does, and vanishes with the worker.
Such a name has no permissions of its own: both sides check that the other runs as root or as the same user.

Requests are ``{"op": ..., ...}``; the answer is an object with ``error`` when it failed:

|op|fields|answer|
|-|-|-|
|state||version, pid, settings, offloads, missing, peers [[subnet, address, port], ...]|
|configure|local, port, underlay, network|{}|
|peers|put [[subnet, address, port], ...], remove [subnet, ...]|{}|
|counters||name: number|
|stop|remove_device|{}: the worker then ends and the connection with it|

A worker that ends by itself says why, unasked, before it closes: {"ended": "flannel0 was deleted"}.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any, Final

VERSION: Final = 1
"""Raise it when the worker's behaviour or this protocol changes: a daemon replaces a worker of another version."""

ANSWER_SECONDS: Final = 5


class WorkerGone(OSError):
    """There is no worker, or it does not answer; the text says which."""


def address_for(device: str) -> str:
    return f"\0flanneld/udp/{device}"


def trusted(connection: socket.socket) -> int | None:
    """The pid at the other end, None if it is neither root's nor this user's."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid if uid in (0, os.geteuid()) else None


def encode(message: object) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Client:
    """The daemon's end. Every method raises WorkerGone if the worker has ended or does not answer."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._buffer = b""
        try:
            # The kernel's own time limits: with Python's, even a look that is not to wait would wait.
            limit = struct.pack("ll", ANSWER_SECONDS, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._socket.connect(address_for(device))
            pid = trusted(self._socket)
            if pid is None:
                raise WorkerGone(
                    f"a process of another user poses as the tunnel worker of {device}; find it with: ss -xlp"
                )
        except OSError as error:
            self._socket.close()
            if isinstance(error, WorkerGone):
                raise
            raise WorkerGone(f"no tunnel worker for {device}: {error}") from error
        self.pid = pid

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request and its answer."""
        try:
            self._socket.sendall(encode({"op": op, **fields}))
            while b"\n" not in self._buffer:
                more = self._socket.recv(1 << 18)
                if not more:
                    raise WorkerGone(f"the tunnel worker of {self.device} has ended")
                self._buffer += more
        except OSError as error:
            if isinstance(error, WorkerGone):
                raise
            raise WorkerGone(f"the tunnel worker of {self.device} does not answer: {error}") from error
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise WorkerGone(f"the tunnel worker of {self.device} answers nonsense")
        return answer

    def alive(self) -> bool:
        """Whether the connection stands; costs one system call. Between requests the worker speaks only to say why it ends."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def last_words(self) -> str:
        """Why the worker ended, if it could say so; "" if not."""
        try:
            data = self._buffer + self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            return str(json.loads(data.splitlines()[-1])["ended"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""

    def close(self) -> None:
        self._socket.close()


class Connection:
    """The worker's end of one connection: never blocks, keeps what does not fit yet."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._in = b""
        self._out = b""

    @property
    def wants_to_write(self) -> bool:
        return bool(self._out)

    def requests(self) -> list[dict[str, Any]] | None:
        """The whole requests that have arrived; None when the other side is gone or talks nonsense."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._in = (self._in + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return found if all(isinstance(item, dict) for item in found) else None

    def answer(self, message: dict[str, Any]) -> None:
        self._out += encode(message)
        self.flush()

    def flush(self) -> None:
        try:
            while self._out:
                self._out = self._out[self.socket.send(self._out) :]
        except BlockingIOError:
            return
        except OSError:
            self._out = b""
