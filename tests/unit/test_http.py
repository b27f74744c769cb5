"""The little server of /healthz and its neighbours, on the loopback."""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from flanneld.http import Answer, HealthServer, text
from flanneld.lab.etcd import free_port


def fails() -> Answer:
    raise RuntimeError("a mistake of ours")


@pytest.fixture
def port() -> Iterator[int]:
    number = free_port()
    server = HealthServer("127.0.0.1", number, {"/healthz": lambda: text(200, "well"), "/bad": fails})
    yield number
    server.close()


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


def test_it_answers_and_names_what_there_is(port: int) -> None:
    assert get(port, "/healthz?verbose") == (200, "well")
    assert get(port, "/nothing") == (404, "not found; there are /bad /healthz\n")


def test_a_prober_that_hangs_up_leaves_no_trace_in_the_log(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with capture_logs() as logs:
        for words in (b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
            probe = socket.create_connection(("127.0.0.1", port))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
            probe.sendall(words)
            probe.close()
        assert get(port, "/healthz") == (200, "well")
    assert not logs
    assert capfd.readouterr().err == ""


def test_a_mistake_of_ours_is_one_line(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with capture_logs() as logs, pytest.raises(http.client.RemoteDisconnected):
        get(port, "/bad")
    assert [line["error"] for line in logs] == ["RuntimeError('a mistake of ours')"]
    assert capfd.readouterr().err == ""


def test_it_listens_without_asking_dns_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("DNS may be away when a host starts")

    monkeypatch.setattr(socket, "getfqdn", ask)
    HealthServer("127.0.0.1", free_port(), {}).close()


def test_an_address_that_cannot_be_had_is_an_oserror() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        HealthServer("127.0.0.1", other.getsockname()[1], {})
