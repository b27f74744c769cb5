"""/healthz, /readyz, /metrics and /status, on one small threaded server."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog

log = structlog.get_logger("flanneld")

Answer = tuple[int, str, bytes]
Route = Callable[[], Answer]


def text(code: int, body: str) -> Answer:
    return code, "text/plain; charset=utf-8", body.encode()


def as_json(value: Any) -> Answer:
    return 200, "application/json", (json.dumps(value, indent=1) + "\n").encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A restarted daemon takes its port back at once.
    allow_reuse_address = True

    def server_bind(self) -> None:
        """As the grandparent does it: HTTPServer asks DNS for our own name, which takes long while DNS is away."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class calls it
        """A prober that hangs up is no event; a mistake of ours is, but in one line, as everything in the log."""
        error = sys.exception()
        if isinstance(error, OSError):
            return
        log.error("an HTTP request could not be answered", error=repr(error))


class HealthServer:
    """Serves ``routes`` by path until ``close``. OSError if the address cannot be had."""

    def __init__(self, address: str, port: int, routes: Mapping[str, Route]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                route = routes.get(self.path.split("?")[0])
                code, kind, body = route() if route else text(404, f"not found; there are {' '.join(sorted(routes))}\n")
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 - the base class looks these names up

            def log_message(self, format: str, *args: Any) -> None:
                """Probes are no events."""

        server = type("_Server6", (_Server,), {"address_family": socket.AF_INET6}) if ":" in address else _Server
        self._server = server((address, port), Handler)
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
