"""One connection to an etcd cluster: endpoints with failover, TLS, login, and errors that name the remedy.

The only module that knows python-etcd3's ways (docs/adr/0002-etcd-client.md). Its client fails over between calls,
but never retries one, logs in once, and turns gRPC's errors into exceptions without text; the rest is here.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

# gRPC's C code writes lines of its own to stderr, about what our errors say better.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import etcd3
import grpc
import grpc._common
from etcd3 import etcdrpc, exceptions

from subnet_lease.etcd_errors import Circumstances, UnknownName, Unreachable, explain, short, silent, unknown_name
from subnet_lease.etcd_tls import TlsFiles
from subnet_lease.names import unresolved
from subnet_lease.store import AccessDenied, SetupError, StoreError, StoreUnavailable

Result = TypeVar("Result")


class EtcdLeaseGone(StoreError):
    """The etcd lease that a call names does not exist (any more)."""

    cause = "lease_lost"


CALL_TIMEOUT: Final = 5.0
"""Seconds for one call to one endpoint."""
CONNECT_TIMEOUT: Final = 1.0
"""Seconds for an attempt to connect, until etcd's first word: a daemon tries again, or another endpoint."""
MEMORY: Final = 60.0
"""Seconds for which a refused certificate is told in place of "nobody listens"."""

_CHANNEL_OPTIONS: Final = {
    # A dead connection is found within 13 s; etcd refuses pings more often than every 5 s. gRPC makes the timeout the
    # socket's TCP_USER_TIMEOUT, too: a call on a connection whose source address was taken away fails after so long.
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3_000,
    "grpc.http2.max_pings_without_data": 0,
    # gRPC waits up to two minutes between attempts to connect; the network daemon is wanted back at once.
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2_000,
    # 4 MB is some 12,000 leases.
    "grpc.max_receive_message_length": -1,
    # Else a new channel would take over the connections of the one that it replaces (``reconnect``).
    "grpc.use_local_subchannel_pool": 1,
    # etcd is never behind a web proxy, but a node's environment often names one.
    "grpc.enable_http_proxy": 0,
}
# A thread of gRPC's that waits for a stream wakes ten times a second, so that Python 2 could see its signals: a third of
# an idle daemon's CPU. The wait ends at once when something comes.
if hasattr(grpc._common, "MAXIMUM_WAIT_TIMEOUT"):
    grpc._common.MAXIMUM_WAIT_TIMEOUT = 5.0

_ENDPOINT: Final = re.compile(r"(https?)://(\[[0-9a-fA-F:.]+\]|[^/:\[\]@?#\s]+)(?::(\d{1,5}))?/?")
# Unimplemented: there is no etcd behind this endpoint, but perhaps behind the next.
_FAILED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED)
_SWITCH: Final = (exceptions.ConnectionFailedError, exceptions.ConnectionTimeoutError, exceptions.InternalServerError)


def parse_endpoint(text: str) -> tuple[bool, str, int]:
    """Secure or not, host, port of ``http(s)://host:port``; SetupError says what is wrong."""
    if "@" in text:  # never shown: what stands before it is a password
        raise SetupError(
            f"etcd endpoint at {text.rpartition('@')[2]!r}: name and password do not belong into it; "
            "use --etcd-username and --etcd-password"
        )
    parts = _ENDPOINT.fullmatch(text.strip())
    port = int(parts[3] or 2379) if parts else 0
    if parts is None or not 0 < port < 65536:
        raise SetupError(f"etcd endpoint {text!r}: must look like http://10.0.0.1:2379 or https://etcd.example:2379")
    return parts[1] == "https", parts[2], port


def clean_prefix(prefix: str) -> str:
    """The prefix as flannel uses it: no slash at its end, none doubled; a missing first slash stays missing."""
    return re.sub("/+", "/", prefix).rstrip("/")


class EtcdConnection:
    """Calls and streams over whichever endpoint answers. Safe to use from several threads."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        keyfile: str = "",
        certfile: str = "",
        cafile: str = "",
        username: str = "",
        password: str = "",
        scope: str = "",
        timeout: float = CALL_TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        parsed = [parse_endpoint(text) for text in dict.fromkeys(endpoints) if text.strip()]
        if not parsed:
            raise SetupError("no etcd endpoint is given: set --etcd-endpoints, such as http://10.0.0.1:2379")
        if bool(username) != bool(password):
            raise SetupError("etcd login needs both --etcd-username and --etcd-password")
        self._names = ", ".join(dict.fromkeys(text.strip() for text in endpoints if text.strip()))
        self._login = (username, password) if username else None
        self._scope = scope
        self._closed = False
        self._login_useless = False
        self._watched: Any = None
        self._telling: tuple[StoreError, float] | None = None
        self._tls = TlsFiles(keyfile, certfile, cafile)
        self._login_lock = threading.Lock()
        self._renewal = threading.Lock()
        self.generation = 0
        """Rises whenever connections are left for new ones: a stream over an older one has ended by our own wish."""
        self._endpoints = parsed
        # The shortest pause between two attempts is also the time that one is given.
        self._options = {**_CHANNEL_OPTIONS, "grpc.min_reconnect_backoff_ms": round(connect_timeout * 1000)}
        self._read_certificates()
        self._attempts = len(parsed)
        self._client = self._new_client(timeout)
        self._set_token(None)

    def _read_certificates(self) -> None:
        """Take the TLS files as they are now; SetupError says what is wrong with them, and nothing has changed."""
        secure = any(secure for secure, _, _ in self._endpoints)
        marks = self._tls.marks()
        self._credentials = self._tls.credentials() if secure else None
        self._marks = marks

    def _new_client(self, timeout: float) -> Any:
        # A failed endpoint is passed over for a while, in favour of the others; alone, it is tried again at once.
        pause = 5.0 if len(self._endpoints) > 1 else 0.0
        return etcd3.MultiEndpointEtcd3Client(
            [
                etcd3.Endpoint(
                    host,
                    port,
                    secure=secure,
                    creds=self._credentials,
                    time_retry=pause,
                    opts=list(self._options.items()),
                )
                for secure, host, port in self._endpoints
            ],
            timeout=timeout,
            failover=True,
        )

    def __repr__(self) -> str:
        return f"EtcdConnection({self._names})"

    @property
    def names(self) -> str:
        """The endpoints, for messages."""
        return self._names

    def call(self, what: str, function: Callable[[Any], Result]) -> Result:
        """Run ``function(client)``, on the next endpoint if one fails, after a new login if the old one expired."""
        failure: StoreError | None = None
        expired, refusals = 0, 0
        while refusals < self._attempts:
            client = self._client
            token = client.metadata
            try:
                if self._login and not self._has_token() and not self._login_useless:
                    self._authenticate(token)
                client.channel  # noqa: B018 - this property is what leaves an endpoint that failed
                answer = function(client)
                if what != "watch":  # a stream has only begun
                    self._telling = None
                return answer
            except (etcd3.Etcd3Exception, grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
                if client is not self._client:
                    continue  # closed under us, for a new one
                if isinstance(error, exceptions.NoServerAvailableError):
                    refusals += 1
                    self._forgive()
                    failure = failure or self._translate(what, error)
                elif _elsewhere(error):
                    latest = self._translate(what, error)
                    failure = failure if isinstance(failure, UnknownName) and type(latest) is Unreachable else latest
                    if isinstance(failure, AccessDenied) and self._use_new_certificates(client):
                        continue
                    refusals += 1
                    if isinstance(error, grpc.RpcError):  # from a stub that was called directly
                        client.endpoint_in_use.fail()
                elif self._login and expired < 2 and isinstance(error, grpc.RpcError) and _login_expired(error):
                    expired += 1
                    self._forget_token(token)
                else:
                    raise self._translate(what, error) from None
        assert failure is not None
        raise failure from None

    def read(self, what: str, *ranges: tuple[bytes, bytes]) -> tuple[Any, list[Any]]:
        """Several ranges at one revision: the answer's header, and all key-value pairs.

        ``b""`` as the end of a range means that one key. Permission is needed on these ranges only.
        """
        request = etcdrpc.TxnRequest(
            success=[
                etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key, range_end=end)) for key, end in ranges
            ]
        )

        def send(client: Any) -> Any:
            return client.kvstub.Txn(request, client.timeout, metadata=client.metadata)

        answer = self.call(what, send)
        return answer.header, [kv for part in answer.responses for kv in part.response_range.kvs]

    def watch(self, requests: Iterator[Any]) -> Any:
        """A raw watch stream: a gRPC call that yields WatchResponse. Its end is told to ``stream_failed``.

        The library's own Watcher is not used: it drops the answer with which etcd cancels a watch (an expired login,
        a lost permission), so that such a watch looks healthy for ever, and it cannot ask for progress.
        """

        def start(client: Any) -> Any:
            self._watched = client.endpoint_in_use
            return etcdrpc.WatchStub(client.channel).Watch(requests, metadata=client.metadata)

        return self.call("watch", start)

    def stream_failed(self, error: grpc.RpcError) -> StoreError:
        """Note that a stream broke, so that the next one goes elsewhere; the error to report."""
        if _login_expired(error):
            self._forget_token(self._client.metadata)
        elif error.code() is not grpc.StatusCode.CANCELLED:
            self._watched.fail()
        return self._translate("watch", error, self._watched)

    def watch_refused(self, reason: str) -> StoreError:
        """The error for a watch that etcd cancelled, saying ``reason``."""
        if "permission denied" in reason or "auth token" in reason or "user name is empty" in reason:
            # etcd says "permission denied" for an expired login, too.
            self._forget_token(self._client.metadata)
            return self._denied("watch", reason)
        return StoreUnavailable(f"etcd cancelled the watch: {short(reason) or 'no reason given'}")

    def nothing_came(self, what: str, seconds: float) -> StoreError:
        """The error for an endpoint that takes what we send and is silent, or whose name nobody resolves."""
        host = self._circumstances(self._client.endpoint_in_use).host
        if reason := unresolved(host):
            return unknown_name(host, reason, self._names)
        return silent(what, self._names, f"nothing came within {seconds:g} s")

    def reconnect(self) -> None:
        """Calls and streams go over new connections from now on, with the TLS files as they are now.

        SetupError: those cannot be used, so it is done with what was read before.
        """
        with self._renewal:
            try:
                self._read_certificates()
            finally:
                self._replace_client()

    def _use_new_certificates(self, refused: Any) -> bool:
        """After a refused certificate: whether the files have changed since they were read, and are used now."""
        with self._renewal:
            if refused is not self._client:
                return True
            if self._tls.marks() == self._marks:
                return False
            try:
                self._read_certificates()
            except SetupError:
                return False  # half written, perhaps; the next refusal looks again
            self._replace_client()
            return True

    def _replace_client(self) -> None:
        old, fresh = self._client, self._new_client(self._client.timeout)
        fresh.metadata = old.metadata
        self.generation += 1
        self._client = fresh
        self._telling = None
        old.close()

    def hurry(self) -> None:
        """From now on one short attempt for each call: we are about to close."""
        self._client.timeout = 1.0
        self._attempts = 1

    def close(self) -> None:
        self._closed = True
        self._client.close()

    # -- login ---------------------------------------------------------------------------------------------------

    def _has_token(self) -> bool:
        return any(name == "token" for name, _ in self._client.metadata)

    def _set_token(self, token: str | None) -> None:
        # hasleader: a member cut off from its cluster refuses at once instead of answering with what it remembers.
        # The library would also pass the token as call credentials, which gRPC refuses on a plain connection.
        self._client.metadata = (("hasleader", "true"), *((("token", token),) if token else ()))

    def _forget_token(self, seen: Any) -> None:
        self._login_useless = False
        if self._client.metadata is seen:
            self._set_token(None)

    def _authenticate(self, seen: Any) -> None:
        assert self._login is not None
        with self._login_lock:
            if self._client.metadata is not seen:
                return  # another thread has logged in meanwhile
            name, password = self._login
            request = etcdrpc.AuthenticateRequest(name=name, password=password)
            client = self._client
            try:
                self._set_token(client.authstub.Authenticate(request, client.timeout, metadata=client.metadata).token)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    self._login_useless = True  # the server asks for no login: etcd's own client goes on without, too
                    return
                if error.code() in _FAILED:
                    client.endpoint_in_use.fail()
                    raise exceptions.ConnectionFailedError from error
                raise

    def _forgive(self) -> None:
        """Every endpoint failed a moment ago: try them all again, rather than none."""
        for endpoint in self._client.endpoints.values():
            endpoint.last_failed = 0

    # -- errors --------------------------------------------------------------------------------------------------

    def _translate(self, what: str, error: BaseException, endpoint: Any = None) -> StoreError:
        if self._closed:
            return StoreUnavailable("the connection to etcd is closed")
        cause = error if isinstance(error, grpc.RpcError) else error.__context__
        code = cause.code() if isinstance(cause, grpc.RpcError) else None
        detail = (cause.details() or "") if isinstance(cause, grpc.RpcError) else str(error)
        user = f"user {self._login[0]!r}" if self._login else "without login"
        if _wrong_login(detail):
            return AccessDenied(f"etcd refuses {user}: wrong name or password; check --etcd-username and its password")
        if "user name is empty" in detail or "user name not found" in detail:
            return AccessDenied("etcd asks for a login: set --etcd-username and --etcd-password")
        where = self._circumstances(endpoint or self._client.endpoint_in_use)
        failure = explain(detail, where)
        if failure is not None:
            return self._most_telling(failure)
        if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
            return self._denied(what, detail)
        if code is grpc.StatusCode.NOT_FOUND:
            return EtcdLeaseGone(f"etcd cannot {what}: {short(detail)}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self.nothing_came(what, self._client.timeout)
        return silent(what, where.tried, detail)

    def _circumstances(self, endpoint: Any) -> Circumstances:
        return Circumstances(f"{endpoint.protocol}://{endpoint.netloc}", self._names, self._tls)

    def _most_telling(self, failure: StoreError) -> StoreError:
        """A refused certificate, though at another endpoint, or another address of the same name, nobody listens.

        gRPC tells of the address that it tried last, which is another one from time to time.
        """
        if isinstance(failure, AccessDenied):
            self._telling = failure, time.monotonic()
        elif (
            isinstance(failure, Unreachable)
            and self._telling is not None
            and time.monotonic() - self._telling[1] < MEMORY
        ):
            told = self._telling[0]
            return type(told)(*told.args)
        return failure

    def _denied(self, what: str, detail: str) -> AccessDenied:
        if self._login is None:
            return AccessDenied(
                f"etcd lets nobody {what} under {self._scope} without a login ({short(detail)}): set --etcd-username and"
                " --etcd-password; the name in a client certificate does not log in by itself"
            )
        user = f"user {self._login[0]!r}"
        return AccessDenied(
            f"etcd denies {user} to {what} under {self._scope}: {short(detail)}; grant read and write on that prefix "
            f"(etcdctl role grant-permission ROLE --prefix=true readwrite {self._scope}/)"
        )


def _elsewhere(error: Exception) -> bool:
    """Whether another endpoint may do better."""
    return isinstance(error, _SWITCH) or (isinstance(error, grpc.RpcError) and error.code() in _FAILED)


def _login_expired(error: grpc.RpcError) -> bool:
    """The token is not known (any more): tokens expire, and an etcd that restarts forgets them."""
    detail = error.details() or ""
    return error.code() is grpc.StatusCode.UNAUTHENTICATED or "user name is empty" in detail or "auth token" in detail


def _wrong_login(detail: str) -> bool:
    return "authentication failed" in detail
