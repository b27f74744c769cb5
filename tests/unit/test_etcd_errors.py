"""gRPC's words for a connection that failed, as recorded, and ours. Those a test can provoke: test_etcd_access.py."""

from __future__ import annotations

import threading

import pytest

from subnet_lease import names
from subnet_lease.etcd_errors import Circumstances, Unreachable, explain
from subnet_lease.etcd_tls import TlsFiles
from subnet_lease.store import StoreUnavailable

NEVER = "failed to connect to all addresses; last error: "
PLAIN = Circumstances("http://etcd.example:2379", "http://etcd.example:2379", TlsFiles())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("UNKNOWN: ipv4:127.0.0.1:2379: Failed to connect to remote host: Connection refused", "connection refused"),
        (
            "UNKNOWN: ipv6:%5B2001:db8::1%5D:2379: Failed to connect to remote host: getsockopt(SO_ERROR): No route to host",
            "no route to host",
        ),
        (
            "FAILED_PRECONDITION: ipv4:10.9.9.9:2379: connect failed: addr: ipv4:10.9.9.9:2379 error: Network is unreachable",
            "network is unreachable",
        ),
        (
            "INTERNAL: ipv6:%5B2001:db8::1%5D:2379: socket: Address family not supported by protocol\x00  K\x01 \u00b8 ",
            "address family not supported by protocol K",
        ),
        ("UNKNOWN: ipv4:10.9.9.9:2379: connection attempt timed out before receiving SETTINGS frame", "no answer"),
        ("UNKNOWN: ipv4:10.9.9.9:2379: tcp handshaker shutdown", "no answer"),
        ("UNAVAILABLE: ipv4:10.9.9.9:2379: recvmsg:Connection reset by peer", "connection reset"),
    ],
)
def test_an_etcd_that_cannot_be_reached(said: str, reason: str) -> None:
    error = explain(NEVER + said, PLAIN)
    assert isinstance(error, Unreachable)
    assert str(error) == (
        f"etcd at http://etcd.example:2379 cannot be reached: {reason};"
        " check that it runs and that --etcd-endpoints names it"
    )


def test_a_name_that_nobody_knows() -> None:
    said = (
        "errors resolving etcd.example:2379: [field:hostname lookup error:address lookup failed for"
        " etcd.example:2379: Domain name not found]"
    )
    assert str(explain(said, PLAIN)) == (
        "etcd at http://etcd.example:2379 cannot be reached: the name etcd.example cannot be resolved (Domain name not"
        " found); correct it in --etcd-endpoints, or mend this host's name resolution (/etc/resolv.conf, /etc/hosts)"
    )


def test_a_name_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(names, "PATIENCE", 0.05)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: answer.wait(10))
    assert names.unresolved("etcd.example") == "no name server answers"
    answer.set()
    assert names.unresolved("etcd.example") == ""
    assert names.unresolved("10.0.0.1") == names.unresolved("[2001:db8::1]") == ""


def test_what_etcd_itself_says_and_a_connection_that_breaks_are_no_business_of_a_certificate() -> None:
    assert explain("Stream removed (Socket closed)", PLAIN) is None
    assert explain("etcdserver: permission denied", PLAIN) is None
    assert explain("Unwrap failed (TSI_DATA_CORRUPTED)", PLAIN) is None


def test_a_proxy_in_between_is_not_etcd_whatever_it_answers() -> None:
    for status in (403, 404, 502):
        error = explain(f"Received http2 header with status: {status}", PLAIN)
        assert isinstance(error, StoreUnavailable)
        assert str(error) == "what answers at http://etcd.example:2379 is not etcd; correct --etcd-endpoints"
