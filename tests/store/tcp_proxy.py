"""A wire that can be cut: forwards TCP connections to a port, until told not to."""

from __future__ import annotations

import contextlib
import select
import socket
import threading


class TcpProxy:
    """``cut`` breaks every connection and refuses new ones, ``freeze`` lets them stand but carries nothing."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._state = "open"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stopped = False
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        with self._lock:
            self._state = "cut"
            self._break()

    def freeze(self) -> None:
        self._state = "frozen"

    def mend(self) -> None:
        self._state = "open"

    def close(self) -> None:
        self._stopped = True
        self._thread.join(timeout=5)
        with self._lock:
            self._break()
        self._listener.close()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _break(self) -> None:
        for pair in self._pairs:
            for end in pair:
                end.close()
        self._pairs.clear()

    def _run(self) -> None:
        while not self._stopped:
            if self._state == "frozen":
                select.select([], [], [], 0.02)
                continue
            with self._lock:
                pairs = list(self._pairs)
            peers = dict(pairs) | {b: a for a, b in pairs}
            try:
                ready, _, _ = select.select([self._listener, *peers], [], [], 0.02)
            except (OSError, ValueError):  # cut between the list and the call
                continue
            for end in ready:
                if end is self._listener:
                    self._accept()
                else:
                    self._forward(end, peers[end])

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # given up meanwhile
            return
        try:
            if self._state == "cut":
                raise OSError
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            client.close()
            return
        with self._lock:
            self._pairs.append((client, server))

    def _forward(self, end: socket.socket, peer: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = end.recv(65536)
            peer.sendall(data)
        if not data:
            with self._lock:
                self._pairs = [pair for pair in self._pairs if end not in pair]
            end.close()
            peer.close()
