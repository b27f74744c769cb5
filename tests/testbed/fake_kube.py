"""A fake Kubernetes API server: not Kubernetes, but honest about what a client of nodes, pods and events can observe.

Real here: resource versions that grow with every write, paged lists that are consistent across pages, watches that
resume at a version, bookmarks, 410 for versions that were compacted away, merge and strategic merge patches with
conflicts, subresources, label and field selectors, RBAC refusals with the API server's own sentences. Not real: schema
validation, admission, authentication beyond one token, everything about other kinds of object.

It runs in the tests' process (``with FakeKube() as kube``), or by itself: ``python -m tests.testbed.fake_kube PORT``.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import socket
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Object = dict[str, Any]

# plural -> (API group, kind, namespaced)
KINDS = {
    "nodes": ("", "Node", False),
    "pods": ("", "Pod", True),
    "events": ("", "Event", True),
    "networkpolicies": ("networking.k8s.io", "NetworkPolicy", True),
}


class ApiFailure(Exception):
    """An answer with a Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }


@dataclass(frozen=True)
class Request:
    """One request that the server got, for tests that count."""

    verb: str
    resource: str
    name: str
    body: Any = None
    query: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Path:
    resource: str
    namespace: str
    name: str
    subresource: str


class Store:
    """The objects, their history, and one version that counts writes. Everything under one condition variable."""

    def __init__(self) -> None:
        self.moved = threading.Condition()
        self.version = 1000
        self.oldest = 1000
        self.objects: dict[str, dict[tuple[str, str], Object]] = {plural: {} for plural in KINDS}
        self.history: list[tuple[int, str, str, Object]] = []
        self._pages: dict[str, list[Object]] = {}

    def write(self, change: str, plural: str, obj: Object) -> Object:
        """Record ADDED, MODIFIED or DELETED; call with ``moved`` held."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        key = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if change == "DELETED":
            self.objects[plural].pop(key, None)
        else:
            self.objects[plural][key] = obj
        self.history.append((self.version, change, plural, obj))
        self.moved.notify_all()
        return obj

    def create(self, plural: str, obj: Object) -> Object:
        group, kind, namespaced = KINDS[plural]
        metadata = obj.setdefault("metadata", {})
        key = (metadata.get("namespace", "") if namespaced else "", metadata["name"])
        with self.moved:
            if key in self.objects[plural]:
                raise ApiFailure(409, "AlreadyExists", f'{plural} "{key[1]}" already exists')
            obj = {"apiVersion": f"{group}/v1" if group else "v1", "kind": kind, **copy.deepcopy(obj)}
            obj["metadata"].setdefault("uid", str(uuid.uuid4()))
            obj["metadata"].setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            return self.write("ADDED", plural, obj)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        with self.moved:
            found = self.objects[plural].get((namespace, name))
        if found is None:
            raise ApiFailure(404, "NotFound", f'{plural} "{name}" not found')
        return found

    def patch(self, plural: str, namespace: str, name: str, patch: Object, *, strategic: bool, status: bool) -> Object:
        with self.moved:
            before = self.get(plural, namespace, name)
            wanted = patch.get("metadata", {}).get("resourceVersion")
            if wanted is not None and wanted != before["metadata"]["resourceVersion"]:
                raise ApiFailure(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified; please apply'
                    " your changes to the latest version and try again",
                )
            if status:
                # The status subresource takes metadata and status; spec stays as it is.
                patch = {key: value for key, value in patch.items() if key != "spec"}
            after = _merge(before, patch, strategic=strategic)
            after["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
            return before if after == before else self.write("MODIFIED", plural, after)

    def delete(self, plural: str, namespace: str, name: str) -> Object:
        with self.moved:
            return self.write("DELETED", plural, copy.deepcopy(self.get(plural, namespace, name)))

    def page(self, plural: str, namespace: str, query: dict[str, str]) -> Object:
        """One page of a list. The continue token names a version and a position; the version may be compacted away."""
        group, kind, _ = KINDS[plural]
        limit = int(query.get("limit", "0"))
        with self.moved:
            if token := query.get("continue"):
                version, start = json.loads(base64.b64decode(token))
                if version < self.oldest or str(version) not in self._pages:
                    raise ApiFailure(410, "Expired", "The provided continue parameter is too old")
                items = self._pages[str(version)]
            else:
                version, start = self.version, 0
                items = [
                    obj
                    for key, obj in sorted(self.objects[plural].items())
                    if (not namespace or key[0] == namespace) and _selected(obj, query)
                ]
                if limit:
                    self._pages[str(version)] = items
        chosen = items[start : start + limit] if limit else items
        metadata: Object = {"resourceVersion": str(version)}
        if limit and start + limit < len(items):
            metadata["continue"] = base64.b64encode(json.dumps([version, start + limit]).encode()).decode()
            metadata["remainingItemCount"] = len(items) - start - limit
        return {
            "kind": f"{kind}List",
            "apiVersion": f"{group}/v1" if group else "v1",
            "metadata": metadata,
            "items": chosen,
        }

    def compact(self) -> None:
        """Forget all history, as etcd's compaction does: older watches and continue tokens get 410."""
        with self.moved:
            self.oldest = self.version
            self.history.clear()
            self._pages.clear()

    def restore(self, version: int) -> None:
        """Let the version go backwards, as after restoring etcd from a backup."""
        with self.moved:
            self.version = self.oldest = version
            self.history.clear()
            for objects in self.objects.values():
                for obj in objects.values():
                    obj["metadata"]["resourceVersion"] = str(version)
            self.moved.notify_all()


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
        self._server: _Server | None = None
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
        self._server = _Server(self._address, self)
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
        for connection in list(_Server.open_connections.get(id(self), ())):
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    open_connections: dict[int, set[socket.socket]] = {}  # noqa: RUF012 -- shared by design, keyed by server

    def __init__(self, address: tuple[str, int], fake: FakeKube) -> None:
        self.fake = fake
        self.open_connections.setdefault(id(fake), set())
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of our own name, which waits for a DNS that a test host does not have."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "fake-kube", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.open_connections[id(self.server.fake)].add(self.connection)

    def finish(self) -> None:
        self.server.open_connections[id(self.server.fake)].discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_PATCH(self) -> None:
        self._serve(self._patch)

    def do_POST(self) -> None:
        self._serve(self._post)

    def do_DELETE(self) -> None:
        self._serve(self._delete)

    def _serve(self, act: Callable[[_Path, dict[str, str]], None]) -> None:
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        fake = self.server.fake
        # Read in any case: what is left of one request would be taken for the next.
        self._raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            while fake.silent.is_set():
                time.sleep(0.02)
            if fake.token and self.headers.get("Authorization") != f"Bearer {fake.token}":
                raise ApiFailure(401, "Unauthorized", "Unauthorized")
            if fake.failing > 0:
                fake.failing -= 1
                raise ApiFailure(500, "InternalError", "etcdserver: request timed out")
            act(_parsed(parts.path), query)
        except ApiFailure as failure:
            self._answer(failure.status["code"], failure.status)

    def _allow(self, verb: str, path: _Path, query: dict[str, str], body: Any = None) -> None:
        fake = self.server.fake
        resource = f"{path.resource}/{path.subresource}" if path.subresource else path.resource
        fake.requests.append(Request(verb, resource, path.name, body, query))
        if (verb, resource) in fake.forbidden:
            where = f'in the namespace "{path.namespace}"' if path.namespace else "at the cluster scope"
            named = f' "{path.name}"' if path.name else ""
            raise ApiFailure(
                403,
                "Forbidden",
                f"{path.resource}{named} is forbidden: User"
                f' "system:serviceaccount:kube-flannel:flannel" cannot {verb} resource "{resource}" in API group'
                f' "{KINDS[path.resource][0]}" {where}',
            )

    def _get(self, path: _Path, query: dict[str, str]) -> None:
        store = self.server.fake.store
        if path.name:
            self._allow("get", path, query)
            self._answer(200, store.get(path.resource, path.namespace, path.name))
        elif query.get("watch") in ("true", "1"):
            self._allow("watch", path, query)
            self._watch(path, query)
        else:
            self._allow("list", path, query)
            self._answer(200, store.page(path.resource, path.namespace, query))

    def _patch(self, path: _Path, query: dict[str, str]) -> None:
        body = self._body()
        self._allow("patch", path, query, body)
        kind = self.headers.get("Content-Type", "")
        if kind not in ("application/strategic-merge-patch+json", "application/merge-patch+json"):
            raise ApiFailure(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {kind}")
        found = self.server.fake.store.patch(
            path.resource,
            path.namespace,
            path.name,
            body,
            strategic=kind.startswith("application/strategic"),
            status=path.subresource == "status",
        )
        self._answer(200, found)

    def _post(self, path: _Path, query: dict[str, str]) -> None:
        body = self._body()
        self._allow("create", path, query, body)
        if body.get("apiVersion") is None or body.get("kind") != KINDS[path.resource][1]:
            raise ApiFailure(400, "BadRequest", f"Object 'Kind' is missing or wrong in {json.dumps(body)[:200]}")
        inside = body.get("metadata", {}).get("namespace", path.namespace)
        if inside != path.namespace:
            raise ApiFailure(400, "BadRequest", "the namespace of the provided object does not match the request")
        about = body.get("involvedObject", {}).get("namespace", "") or "default"
        if path.resource == "events" and about != path.namespace:
            raise ApiFailure(422, "Invalid", "involvedObject.namespace: does not match event.namespace")
        self._answer(201, self.server.fake.store.create(path.resource, body))

    def _delete(self, path: _Path, query: dict[str, str]) -> None:
        self._allow("delete", path, query)
        self._answer(200, self.server.fake.store.delete(path.resource, path.namespace, path.name))

    def _watch(self, path: _Path, query: dict[str, str]) -> None:
        fake, store = self.server.fake, self.server.fake.store
        server_then = fake._server
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            at = int(query.get("resourceVersion") or store.version)
            deadline = time.monotonic() + float(query.get("timeoutSeconds", "1800"))
            for event in self._events(path, query, at, deadline):
                if fake._server is not server_then:
                    self.close_connection = True
                    return
                self._chunk(event)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True

    def _events(self, path: _Path, query: dict[str, str], at: int, deadline: float) -> Iterator[Object]:
        """Events after version ``at``; with bookmarks when asked for. A version from the future waits, as in etcd."""
        fake, store = self.server.fake, self.server.fake.store
        group, kind, _ = KINDS[path.resource]
        bookmarks = query.get("allowWatchBookmarks") == "true"
        next_bookmark = time.monotonic() + fake.bookmark_every
        while time.monotonic() < deadline:
            if fake.silent.is_set():
                time.sleep(0.02)
                continue
            with store.moved:
                if at < store.oldest:
                    yield {
                        "type": "ERROR",
                        "object": ApiFailure(410, "Expired", f"too old resource version: {at}").status,
                    }
                    return
                fresh = [entry for entry in store.history if entry[0] > at] if store.version > at else []
                if not fresh:
                    store.moved.wait(min(0.2, max(0.0, deadline - time.monotonic())))
                now = store.version
            for version, change, plural, obj in fresh:
                at = version
                inside = not path.namespace or obj["metadata"].get("namespace") == path.namespace
                if plural == path.resource and inside and _selected(obj, query):
                    yield {"type": change, "object": obj}
            if bookmarks and time.monotonic() >= next_bookmark:
                next_bookmark = time.monotonic() + fake.bookmark_every
                bookmark = {"kind": kind, "apiVersion": f"{group}/v1" if group else "v1"}
                yield {"type": "BOOKMARK", "object": {**bookmark, "metadata": {"resourceVersion": str(now)}}}

    def _body(self) -> Any:
        return json.loads(self._raw)

    def _answer(self, code: int, body: Object) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def _chunk(self, event: Object) -> None:
        data = json.dumps(event).encode() + b"\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _parsed(path: str) -> _Path:
    words = [unquote(word) for word in path.strip("/").split("/")]
    words = words[2:] if words[0] == "api" else words[3:]
    namespace = ""
    if words[0] == "namespaces" and len(words) > 2:
        namespace, words = words[1], words[2:]
    if words[0] not in KINDS:
        raise ApiFailure(404, "NotFound", "the server could not find the requested resource")
    name, subresource = (*words[1:], "", "")[:2]
    return _Path(words[0], namespace, name, subresource)


def _selected(obj: Object, query: dict[str, str]) -> bool:
    labels = obj["metadata"].get("labels") or {}
    for term in _terms(query.get("labelSelector", "")):
        if not _matches(term, labels):
            return False
    for term in _terms(query.get("fieldSelector", "")):
        path, _, value = term.partition("=")
        found: Any = obj
        for word in path.split("."):
            found = (found or {}).get(word)
        if (found or "") != value:
            return False
    return True


def _terms(selector: str) -> list[str]:
    """Split at the commas that are not inside parentheses."""
    terms, depth, word = [], 0, ""
    for letter in selector:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            terms.append(word)
            word = ""
        else:
            word += letter
    return [term for term in [*terms, word] if term]


def _matches(term: str, labels: dict[str, str]) -> bool:
    for operator in (" notin ", " in "):
        if operator in term:
            key, _, rest = term.partition(operator)
            return (labels.get(key) in rest.strip("() ").split(",")) is (operator == " in ")
    if "=" in term:
        key, _, value = term.partition("=")
        return labels.get(key) == value
    return term[1:] not in labels if term.startswith("!") else term in labels


def _merge(before: Any, patch: Any, *, strategic: bool, path: tuple[str, ...] = ()) -> Any:
    """RFC 7386; in a strategic merge, a node's conditions are merged by their type."""
    if strategic and path == ("status", "conditions") and isinstance(patch, list):
        merged = {item["type"]: item for item in before or []}
        for item in patch:
            merged[item["type"]] = {**merged.get(item["type"], {}), **item}
        return list(merged.values())
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value, strategic=strategic, path=(*path, key))
    return result


if __name__ == "__main__":
    # Nodes come as JSON lines on standard input: {"name": ..., "cidrs": [...]}; runs until it is ended.
    listen, _, number = sys.argv[1].rpartition(":")
    with FakeKube(address=listen or "127.0.0.1", port=int(number)) as server:
        for line in sys.stdin:
            wanted = json.loads(line)
            server.add_node(wanted["name"], *wanted["cidrs"])
        threading.Event().wait()
