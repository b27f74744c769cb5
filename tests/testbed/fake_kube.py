"""A fake Kubernetes API server: not Kubernetes, but honest about what a client of nodes, pods and events can observe.

Real here: resource versions that grow with every write, paged lists that are consistent across pages, watches that
resume at a version, bookmarks, 410 for versions that were compacted away, merge and strategic merge patches with
conflicts, subresources, label and field selectors, RBAC refusals with the API server's own sentences. Not real: schema
validation, admission, authentication beyond one token, everything about other kinds of object.

It runs in the tests' process (``with FakeKube() as kube``), or by itself: ``python -m tests.testbed.fake_kube PORT``.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

from tests.testbed.fake_kube_http import Request, Server
from tests.testbed.fake_kube_store import Object, Store


class FakeKube:
    """The server. ``token`` is the only bearer token it takes; "" takes everybody."""

    def __init__(
        self,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        bookmark_every: float = 1.0,
        certificate: Path | None = None,
    ) -> None:
        """``certificate`` is a PEM file with certificate and key; with it the server speaks TLS."""
        self.store = Store()
        self.token = token
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self.bookmark_every = bookmark_every
        self.forbidden: set[tuple[str, str]] = set()
        self.failing = 0
        self.silent = threading.Event()
        self.requests: list[Request] = []
        self._address = (address, port)
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self.start()

    # -- life --------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._address[0]}:{self._address[1]}"

    @property
    def access(self) -> dict[str, str]:
        """What a KubeStore needs to reach this server."""
        return {"api_url": self.url}

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = Server(self._address, self)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._address = (self._address[0], self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections and drop those that stand; the objects stay."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self.drop()
            assert self._thread is not None
            self._thread.join(5)

    def drop(self) -> None:
        """Cut every open connection."""
        for connection in list(Server.open_connections.get(id(self), ())):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with self.store.moved:
            self.store.moved.notify_all()

    def __enter__(self) -> FakeKube:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what tests do -----------------------------------------------------------------------------------------

    def add_node(self, name: str, *cidrs: str, annotations: dict[str, str] | None = None, weight: int = 0) -> Object:
        """A node as kubelet registers it; ``weight`` adds about that many bytes of what real nodes carry."""
        images = [
            {
                "names": [f"registry.invalid/library/image-{i}@sha256:{'0123456789abcdef' * 4}"],
                "sizeBytes": 12345678 + i,
            }
            for i in range(weight // 130)
        ]
        return self.store.create(
            "nodes",
            {
                "metadata": {
                    "name": name,
                    "annotations": dict(annotations or {}),
                    "labels": {"kubernetes.io/os": "linux"},
                },
                "spec": {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {},
                "status": {
                    "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ready"}],
                    "images": images,
                },
            },
        )

    def add_peer(self, name: str, cidr: str, public_ip: str, mac: str, *, weight: int = 0) -> Object:
        """A node that flannel manages, with vxlan."""
        return self.add_node(name, cidr, annotations=peer_annotations(public_ip, mac), weight=weight)

    def node(self, name: str) -> Object:
        return self.store.get("nodes", "", name)

    def annotations(self, name: str) -> dict[str, str]:
        found: dict[str, str] = self.node(name)["metadata"].get("annotations") or {}
        return found

    def annotate(self, name: str, annotations: dict[str, str | None]) -> None:
        self.patch_node(name, {"metadata": {"annotations": annotations}})

    def patch_node(self, name: str, patch: Object) -> None:
        self.store.patch("nodes", "", name, patch, strategic=True, status=False)

    def heartbeat(self, name: str) -> None:
        """What kubelet does every five minutes: the node changes, and nothing in it that matters."""
        stamp = {"type": "Ready", "status": "True", "lastHeartbeatTime": str(time.time_ns())}
        self.patch_node(name, {"status": {"conditions": [stamp]}})

    def condition(self, name: str, kind: str, status: str) -> None:
        self.patch_node(name, {"status": {"conditions": [{"type": kind, "status": status}]}})

    def delete_node(self, name: str) -> None:
        self.store.delete("nodes", "", name)

    def add_pod(self, namespace: str, name: str, node: str, labels: dict[str, str]) -> None:
        metadata = {"namespace": namespace, "name": name, "labels": labels}
        self.store.create("pods", {"metadata": metadata, "spec": {"nodeName": node}})

    def add_policy(self, namespace: str, name: str, selector: Object) -> None:
        metadata = {"namespace": namespace, "name": name}
        self.store.create("networkpolicies", {"metadata": metadata, "spec": {"podSelector": selector}})

    def events(self, reason: str = "") -> list[Object]:
        with self.store.moved:
            found = list(self.store.objects["events"].values())
        return [event for event in found if reason in ("", event["reason"])]

    def count(self, verb: str, resource: str) -> int:
        return sum((request.verb, request.resource) == (verb, resource) for request in self.requests)


def peer_annotations(public_ip: str, mac: str, prefix: str = "flannel.alpha.coreos.com/") -> dict[str, str]:
    """What a flanneld with vxlan writes, byte for byte."""
    return {
        f"{prefix}backend-data": f'{{"VNI":1,"VtepMAC":"{mac}"}}',
        f"{prefix}backend-type": "vxlan",
        f"{prefix}kube-subnet-manager": "true",
        f"{prefix}public-ip": public_ip,
    }


if __name__ == "__main__":
    # Nodes come as JSON lines on standard input: {"name": ..., "cidrs": [...]}; runs until it is ended.
    listen, _, number = sys.argv[1].rpartition(":")
    with FakeKube(address=listen or "127.0.0.1", port=int(number)) as server:
        for line in sys.stdin:
            wanted = json.loads(line)
            server.add_node(wanted["name"], *wanted["cidrs"])
        threading.Event().wait()
