"""The few calls that we make to the Kubernetes API, with lightkube; every failure leaves here as a StoreError.

Two connections: lightkube's client for single calls and lists, and, for watches, an HTTP client made with lightkube's
credentials. lightkube's own watch has no read timeout and asks for no bookmarks, so a dead connection would go
unnoticed there.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Final, Generic

import httpx2
import msgspec
from lightkube import ALL_NS, ApiError, Client, operators
from lightkube.config import client_adapter
from lightkube.config.kubeconfig import SingleConfig
from lightkube.core.exceptions import ConfigError
from lightkube.types import PatchType

from subnet_lease.kube_objects import (
    Change,
    Event,
    Failure,
    NetworkPolicy,
    Node,
    NodeStatusPatch,
    Pod,
    Selector,
    Watched,
    WatchEvent,
)
from subnet_lease.store import AccessDenied, SetupError, StoreError, StoreUnavailable

PAGE: Final = 250
"""Nodes in one page of a list. A node is 15 to 40 KB on the wire, and a page is held while it is decoded; with 500 the
peak at 5,000 nodes is 84 MB, with 250 it is about 70, with 100 no better."""

SILENCE: Final = 40.0
"""Seconds without a byte after which a watch is opened again, from where it was: that is the proof that the server
still lives. Where many nodes send heartbeats, it does not come to that."""

WATCH_SECONDS: Final = 300
"""How long the API server is asked to keep one watch open."""

_CALL_TIMEOUT: Final = httpx2.Timeout(10.0, connect=5.0)


class Gone(StoreError):
    """HTTP 410: the resource version is too old; list again."""

    cause = "expired"


class NotFound(StoreError):
    """HTTP 404."""

    cause = "not_found"


class Conflict(StoreError):
    """HTTP 409: it exists already, or somebody else was faster."""

    cause = "conflict"


_PATHS: Final[dict[type[Any], str]] = {
    Node: "/api/v1/nodes",
    NetworkPolicy: "/apis/networking.k8s.io/v1/networkpolicies",
}


def _resource(kind: type[Any]) -> str:
    """The name that RBAC knows: nodes."""
    return str(kind._api_info.plural)


class Api:
    """A connection to one API server. Calls may come from several threads."""

    def __init__(self, config: SingleConfig) -> None:
        self._config = config
        self.url = config.cluster.server
        try:
            self._calls = Client(config, timeout=_CALL_TIMEOUT, field_manager="flanneld")
            self._watches = client_adapter.Client(config, client_adapter.ConnectionParams(timeout=_CALL_TIMEOUT))
        except (ConfigError, OSError, ValueError, httpx2.InvalidURL) as error:
            raise SetupError(
                f"the Kubernetes credentials for {self.url} cannot be used: {error};"
                " check certificates and keys named in the kubeconfig"
            ) from error

    def node(self, name: str) -> Node:
        with self._errors("get", "nodes"):
            return self._calls.get(Node, name)

    def pod_node(self, namespace: str, name: str) -> str:
        """The name of the node on which a pod runs."""
        with self._errors("get", "pods"):
            return self._calls.get(Pod, name, namespace=namespace).spec.node_name

    def patch_annotations(self, name: str, annotations: Mapping[str, str | None]) -> Node:
        """Set the annotations, remove those whose value is None; through nodes/status, as flannel does."""
        return self._patch_node(name, {"metadata": {"annotations": dict(annotations)}})

    def patch_condition(self, name: str, condition: Mapping[str, str]) -> Node:
        """Set one condition of a node; the others stay (a strategic merge, by the condition's type)."""
        return self._patch_node(name, {"status": {"conditions": [dict(condition)]}})

    def _patch_node(self, name: str, body: dict[str, Any]) -> Node:
        with self._errors("patch", "nodes/status"):
            answer = self._calls.patch(NodeStatusPatch, name, body, patch_type=PatchType.STRATEGIC)
        return Node(answer.metadata, answer.spec, answer.status)

    def create_event(self, event: Event) -> None:
        with self._errors("create", "events"):
            self._calls.create(event)

    def selects_pods_on(self, node: str, namespace: str, selector: Selector) -> bool:
        """Whether a label selector matches a pod of this namespace on this node."""
        with self._errors("list", "pods"):
            found = self._calls.list(
                Pod, namespace=namespace, chunk_size=1, labels=_labels(selector), fields={"spec.nodeName": node}
            )
            return next(iter(found), None) is not None

    def list(self, kind: type[Watched]) -> Listing[Watched]:
        """A consistent list, fetched page by page while it is iterated. Raises Gone when that took too long.

        The list is read from storage, not with resourceVersion=0: some API servers ignore the limit then and answer
        with everything at once.
        """
        return Listing(self, kind)

    def watch(self, kind: type[Watched], version: str) -> Watch[Watched]:
        """Changes after a resource version. Raises Gone when the version is too old."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        with self._errors("watch", _resource(kind)):
            request = self._watches.build_request(
                "GET", _PATHS[kind], params=query, headers={"Accept-Encoding": "identity"}
            )
            answer = self._watches.send(request, stream=True)
            try:
                if answer.status_code != 200:
                    answer.read()
                    _raise_for(answer)
            except BaseException:
                answer.close()
                raise
        # The answer's beginning comes at once; what follows may take its time (read when the body is).
        request.extensions["timeout"]["read"] = SILENCE
        return Watch(self, kind, answer)

    def close(self) -> None:
        self._calls.close()
        self._watches.close()

    @contextlib.contextmanager
    def _errors(self, verb: str, resource: str) -> Iterator[None]:
        """Turn what the libraries raise into StoreErrors that name the remedy."""
        try:
            yield
        except ApiError as error:
            raise self.failure(verb, resource, error.status.code or 0, error.status.message or str(error)) from error
        except httpx2.HTTPStatusError as error:
            raise self.failure(verb, resource, error.response.status_code, error.response.text[:200]) from error
        except httpx2.HTTPError as error:
            raise StoreUnavailable(
                f"the Kubernetes API at {self.url} does not answer ({type(error).__name__}: {error});"
                " check that the API server runs, that this node reaches it, and that its certificate is trusted"
            ) from error
        except (ConfigError, OSError) as error:
            raise AccessDenied(
                f"the credentials for the Kubernetes API at {self.url} cannot be read: {error}"
            ) from error
        except RuntimeError as error:  # httpx2's, of a client that was closed
            raise StoreUnavailable(f"the connection to {self.url} was closed for a new one: {error}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreUnavailable(
                f"{self.url} answered a {verb} of {resource} with something that is not Kubernetes' JSON: {error};"
                " check --kube-api-url, and proxies between here and there"
            ) from error

    def failure(self, verb: str, resource: str, code: int, message: str) -> StoreError:
        """The error for a status that the API server sent."""
        what = f"{verb} {resource}"
        if code == 401:
            return AccessDenied(
                f"the Kubernetes API at {self.url} does not accept our credentials ({what}: 401 {message});"
                " check the service account's token or the kubeconfig's user"
            )
        if code == 403:
            group = "networking.k8s.io" if resource == "networkpolicies" else ""
            return AccessDenied(
                f"the Kubernetes API at {self.url} forbids {what}: {message}; the ClusterRole flannel needs a rule"
                f' with apiGroups ["{group}"], resources ["{resource}"], verbs ["{verb}"]'
            )
        if code == 404:
            return NotFound(f"the Kubernetes API at {self.url}: {what}: {message}")
        if code == 409:
            return Conflict(f"the Kubernetes API at {self.url}: {what}: {message}")
        if code == 410:
            return Gone(f"the Kubernetes API at {self.url}: {what}: {message}")
        return StoreUnavailable(
            f"the Kubernetes API at {self.url} failed to {what}: {code} {message};"
            " it is tried again; look at the API server's log if this stays"
        )


class Listing(Generic[Watched]):
    """The objects of a list; ``version`` is the whole list's resource version, known once the first came."""

    def __init__(self, api: Api, kind: type[Watched]) -> None:
        self._api = api
        self._kind: type[Watched] = kind
        self.version = ""

    def __iter__(self) -> Iterator[Watched]:
        with self._api._errors("list", _resource(self._kind)):
            calls: Any = self._api._calls
            namespace = {} if self._kind is Node else {"namespace": ALL_NS}
            found = calls.list(self._kind, chunk_size=PAGE, **namespace)
            for item in found:
                self.version = found.resourceVersion
                yield item
            self.version = found.resourceVersion


class Watch(Generic[Watched]):
    """An open watch. Iterate it for batches of changes; ``close`` ends it, from any thread."""

    def __init__(self, api: Api, kind: type[Watched], answer: httpx2.Response) -> None:
        self._api = api
        self._kind: type[Watched] = kind
        self._answer = answer
        self._decoder: msgspec.json.Decoder[Watched] = msgspec.json.Decoder(kind)
        stream = answer.extensions.get("network_stream")
        self._socket: socket.socket | None = stream.get_extra_info("socket") if stream is not None else None
        if self._socket is not None:
            _keep_alive(self._socket)

    def __iter__(self) -> Iterator[list[Change[Watched]]]:
        """Changes in batches, as they arrive; raises StoreError.

        Ends when the server ends the watch, and also when it falls silent or the connection breaks: whether that was
        a failure shows when the next watch is opened.
        """
        rest = b""
        try:
            with self._api._errors("watch", _resource(self._kind)), contextlib.suppress(httpx2.TransportError):
                for chunk in self._answer.iter_bytes():
                    *lines, rest = (rest + chunk).split(b"\n") if rest else chunk.split(b"\n")
                    batch = [self._change(line) for line in lines if line]
                    if batch:
                        yield batch
        finally:
            self._answer.close()

    def _change(self, line: bytes) -> Change[Watched]:
        event = msgspec.json.decode(line, type=WatchEvent)
        if event.type == "ERROR":
            failure = msgspec.json.decode(event.object, type=Failure)
            raise self._api.failure("watch", _resource(self._kind), failure.code, failure.message)
        return Change(event.type, self._decoder.decode(event.object))

    def close(self) -> None:
        """Wake the thread that reads, if one does."""
        if self._socket is not None:
            # Not SSLSocket.shutdown: that one drops the TLS state under the reader's feet.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _labels(selector: Selector) -> dict[str, Any] | None:
    """A selector as lightkube spells it; None selects everything. Two conditions on one key cannot both be said."""
    labels: dict[str, Any] = dict(selector.match_labels or {})
    for requirement in selector.match_expressions or []:
        values = requirement.values or []
        labels[requirement.key] = {
            "In": operators.in_(values),
            "NotIn": operators.not_in(values),
            "Exists": operators.exists(),
            "DoesNotExist": operators.not_exists(),
        }.get(requirement.operator, operators.exists())
    return labels or None


def _raise_for(answer: httpx2.Response) -> None:
    """Raise what an unsuccessful answer means, as lightkube does for its own calls."""
    if answer.is_success:
        return
    try:
        failure = msgspec.json.decode(answer.content, type=Failure)
    except msgspec.MsgspecError:
        failure = Failure(message=answer.text[:200])
    raise httpx2.HTTPStatusError(failure.message, request=answer.request, response=answer)


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel find a peer that is gone within half a minute, also while nobody has anything to say."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
