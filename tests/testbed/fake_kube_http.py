"""The fake API server's HTTP: paths, verbs, watches, refusals."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.testbed.fake_kube_store import KINDS, ApiFailure, Object, selected

if TYPE_CHECKING:
    from tests.testbed.fake_kube import FakeKube


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


class Server(ThreadingHTTPServer):
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
    server: Server

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
                if plural == path.resource and inside and selected(obj, query):
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
