"""The worker's side of the control socket: who is connected, and what each request does."""

from __future__ import annotations

import select
import socket
from collections.abc import Mapping
from typing import Any, Protocol

from flanneld.dataplane.udp_tunnel import control, device
from flanneld.dataplane.udp_tunnel.peers import PeerTable

SETTINGS = ("local", "port", "underlay", "network")


class Worker(Protocol):
    """What the daemon may ask of the tunnel (``control`` has the words)."""

    name: str
    peers: PeerTable

    def state(self) -> dict[str, Any]: ...
    def configure(self, settings: dict[str, Any]) -> dict[str, Any]: ...
    def count(self) -> dict[str, int]: ...
    def stop(self, *, remove_device: bool) -> None: ...


class Commands:
    """Answers whoever connects. Its descriptors are in the tunnel's epoll; ``serve`` takes what happens on one."""

    def __init__(self, worker: Worker, epoll: select.epoll) -> None:
        """DeviceError when another worker has the device."""
        self._worker, self._epoll = worker, epoll
        self._connections: dict[int, control.Connection] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._listener.bind(control.address_for(worker.name))
        except OSError as error:
            text = f"a tunnel worker for {worker.name} runs already, or poses as one: {error}"
            raise device.DeviceError(text) from error
        self._listener.listen(8)
        self._listener.setblocking(False)
        epoll.register(self._listener.fileno(), select.EPOLLIN)

    def close(self) -> None:
        self._listener.close()

    def say_why(self, reason: str) -> None:
        """Tell whoever is connected why the worker ends."""
        for connection in self._connections.values():
            connection.answer({"ended": reason})

    def serve(self, descriptor: int) -> None:
        if descriptor == self._listener.fileno():
            self._accept()
            return
        connection = self._connections.get(descriptor)
        if connection is None:
            return
        connection.flush()
        requests = connection.requests()
        for request in requests or ():
            connection.answer(self._answer(request))
        if requests is None:
            self._epoll.unregister(descriptor)
            del self._connections[descriptor]
            connection.socket.close()
        else:
            self._epoll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if connection.wants_to_write else 0))

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return
        if control.trusted(accepted) is None:
            accepted.close()
            return
        self._connections[accepted.fileno()] = control.Connection(accepted)
        self._epoll.register(accepted.fileno(), select.EPOLLIN)

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        worker = self._worker
        try:
            match request.get("op"):
                case "state":
                    return worker.state()
                case "configure":
                    return worker.configure({key: request[key] for key in SETTINGS})
                case "peers":
                    worker.peers.update(request.get("put", ()), request.get("remove", ()))
                    return {}
                case "counters":
                    return worker.count()
                case "stop":
                    worker.stop(remove_device=bool(request.get("remove_device")))
                    return {}
                case other:
                    return {"error": f"no such command: {other}"}
        except (KeyError, TypeError, ValueError, device.DeviceError) as error:
            return {"error": f"{error}"}
