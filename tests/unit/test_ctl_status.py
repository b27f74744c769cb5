"""flannelctl status: what it shows, and whom it asks when several daemons, or none, answer."""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.daemon_status import hold_lock
from flanneld.ctl import cli
from flanneld.ctl.node import Place, place, read_status
from flanneld.ctl.output import Problem
from flanneld.ctl.status import facts, show
from flanneld.http import HealthServer
from flanneld.http import as_json as as_json_answer
from flanneld.lab.etcd import free_port


def test_facts_leave_out_what_is_unknown() -> None:
    assert facts({"node": "h1", "subnet": None, "peers": 0, "last_pass": {}, "store_errors": {}}) == [
        ("node", "h1"), ("peers", "0")
    ]  # fmt: skip
    assert facts({"store_errors": {"timeout": 2}}) == [("store errors since start", "timeout 2")]


def test_further_lines_of_a_reason_stay_beside_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = ["kernel: command 'x': exit code 1: one\n  two", "lease: no lease yet"]
    show({"running": True, "ready": False, "node": "h1", "reasons": reasons, "store_errors": {"timeout": 2}})
    assert capsys.readouterr().out.splitlines() == [
        "flanneld  not ready",
        "node      h1",
        "store errors since start timeout 2",
        "wrong     kernel: command 'x': exit code 1: one",
        "            two",
        "wrong     lease: no lease yet",
    ]


def test_a_refused_peer_is_shown_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"10.5.2.0-24": "lease 10.5.2.0/24 lies outside the network 10.6.0.0/16", "10.9": "lease 10.9 is none"}
    show({"running": True, "ready": True, "refused": refused})
    assert capsys.readouterr().out.splitlines()[1:] == [
        "refused   lease 10.5.2.0/24 lies outside the network 10.6.0.0/16",
        "refused   lease 10.9 is none",
    ]


def test_status_without_a_daemon_says_where_it_looked(tmp_path: Path) -> None:
    arguments = argparse.Namespace(healthz_ip="127.0.0.1", healthz_port=1, subnet_file=str(tmp_path / "subnet.env"))
    with pytest.raises(Problem, match=r"no flanneld is known on this host: nothing listens on 127\.0\.0\.1:1;"):
        read_status(arguments)
    (tmp_path / "flanneld-status.json").write_text('{"pid": null, "ready": true, "subnet": "10.5.7.0/24"}')
    status = read_status(arguments)
    assert status["running"] is False and status["subnet"] == "10.5.7.0/24"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"[1]", 200),
        (b'{"status": "fine", "pid": 7}', 200),
        (b"null", 200),
        (b"\xff", 200),
        (b"hello", 200),
        (b"", 404),
    ],
)
def test_whatever_else_listens_on_the_port_is_not_taken_for_flanneld(tmp_path: Path, body: bytes, code: int) -> None:
    port = free_port()
    server = HealthServer("127.0.0.1", port, {"/status": lambda: (code, "application/json", body)})
    arguments = argparse.Namespace(healthz_ip="127.0.0.1", healthz_port=port, subnet_file=str(tmp_path / "subnet.env"))
    try:
        with pytest.raises(Problem, match=rf"what answers at 127\.0\.0\.1:{port} is not flanneld"):
            read_status(arguments)
        (tmp_path / "flanneld-status.json").write_text('{"pid": null, "ready": true, "subnet": "10.5.7.0/24"}')
        assert read_status(arguments)["running"] is False
    finally:
        server.close()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[argparse.Namespace]:
    """The arguments of a command that asks for one subnet file, where the daemon of another one answers."""
    port = free_port()
    told = {"pid": 4711, "subnet_file": "/run/b/subnet.env", "ready": True}
    server = HealthServer("127.0.0.1", port, {"/status": lambda: as_json_answer(told)})
    yield argparse.Namespace(healthz_ip="127.0.0.1", healthz_port=port, subnet_file=str(tmp_path / "subnet.env"))
    server.close()


def test_another_networks_daemon_is_not_taken_for_the_one_that_was_asked_for(
    answering: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f"another daemon (pid 4711, /run/b/subnet.env) answers at 127.0.0.1:{answering.healthz_port}"
    with pytest.raises(Problem, match="is not running") as problem:
        read_status(answering)
    assert other in str(problem.value)
    file = tmp_path / "flanneld-status.json"
    file.write_text('{"pid": null, "ready": true, "subnet": "10.5.7.0/24"}')
    flags = [f"--subnet-file={answering.subnet_file}", f"--healthz-port={answering.healthz_port}"]
    assert cli.main(["status", *flags]) == 1
    shown = capsys.readouterr().out
    assert "not running" in shown and "10.5.7.0/24" in shown and other in shown
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert cli.main(["status", "--diff", *flags]) == 1
    assert other in capsys.readouterr().err
    lock = hold_lock(answering.subnet_file)
    file.write_text('{"pid": 4712, "ready": true, "subnet": "10.5.7.0/24"}')
    try:
        assert cli.main(["status", "--diff", *flags]) == 1
        error = capsys.readouterr().err
        assert other in error and "give this one's --healthz-port" in error
        assert cli.main(["cleanup", *flags]) == 1
        assert f"flanneld runs on this host (pid 4712, {answering.subnet_file})" in capsys.readouterr().err
    finally:
        os.close(lock)
    # The status of a daemon that shares the directory is not this one's.
    file.write_text('{"pid": 4711, "ready": true, "subnet_file": "/run/b/subnet.env"}')
    with pytest.raises(Problem, match="is not running"):
        read_status(answering)
    answering.subnet_file = "/run/b/subnet.env"
    assert read_status(answering)["pid"] == 4711


@pytest.mark.parametrize("written", [True, False])
def test_a_daemon_that_hangs_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    monkeypatch.setattr("flanneld.ctl.node.TIMEOUT", 0.2)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    file = tmp_path / "subnet.env"
    if written:
        (tmp_path / "flanneld-status.json").write_text('{"pid": 4711, "ready": true, "subnet": "10.5.7.0/24"}')
    lock = hold_lock(str(file))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        words = f"runs{' (pid 4711)' if written else ''} but does not answer on 127.0.0.1:{port}; restart it"
        flags = [f"--subnet-file={file}", f"--healthz-port={port}"]
        assert cli.main(["status", *flags]) == 1
        shown = capsys.readouterr().out
        assert shown.splitlines()[0] == f"flanneld  {words}"
        assert cli.main(["status", "--json", *flags]) == 1
        told = json.loads(capsys.readouterr().out)
        assert (told["running"], told["ready"], told["unheard"]) == (True, False, "hangs")
        assert cli.main(["status", "--diff", *flags]) == 1
        assert f"flanneld {words}" in capsys.readouterr().err
        os.close(lock)
        assert cli.main(["status", *flags]) == 1
        shown = "".join(capsys.readouterr())
        assert "restart" not in shown
        assert ("not running" if written else "no flanneld is known") in shown


def test_diff_names_the_port_that_a_daemon_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    file, port = tmp_path / "subnet.env", free_port()
    (tmp_path / "flanneld-status.json").write_text('{"pid": 4711, "ready": true}')
    lock = hold_lock(str(file))
    flags = [f"--subnet-file={file}", f"--healthz-port={port}"]
    assert cli.main(["status", *flags]) == 0
    assert "warning" not in capsys.readouterr().out
    assert cli.main(["status", "--diff", *flags]) == 1
    os.close(lock)
    error = capsys.readouterr().err
    assert "flanneld runs without --healthz-port" in error and f"start it with --healthz-port={port}" in error
    assert "Errno" not in error


def test_a_daemon_is_asked_where_its_status_file_says_that_it_listens(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "subnet.env"
    told = {"pid": 4711, "subnet_file": str(file), "ready": True, "healthz": f"0.0.0.0:{port}"}
    (tmp_path / "flanneld-status.json").write_text(json.dumps(told))
    arguments = argparse.Namespace(healthz_ip=None, healthz_port=None, subnet_file=str(file))
    server, lock = HealthServer("127.0.0.1", port, {"/status": lambda: as_json_answer(told)}), hold_lock(str(file))
    try:
        status = read_status(arguments)
        assert status["source"] == f"http://127.0.0.1:{port}/status"
        assert place(arguments, status) == Place("127.0.0.1", port)
    finally:
        server.close()
        os.close(lock)
    assert str(place(arguments, {"healthz": "[::]:8082"})) == "[::1]:8082"
    assert str(place(arguments, {})) == "127.0.0.1:8081"


@pytest.mark.field_problem(44)
@pytest.mark.parametrize("healthz", [None, "127.0.0.1:1"])
def test_a_daemon_is_not_said_to_hang_for_another_ones_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, healthz: str | None
) -> None:
    monkeypatch.setattr("flanneld.ctl.node.TIMEOUT", 0.2)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    file = tmp_path / "subnet.env"
    told = {"pid": 4711, "ready": True, "subnet": "10.5.7.0/24", "healthz": healthz}
    (tmp_path / "flanneld-status.json").write_text(json.dumps(told))
    lock = hold_lock(str(file))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert cli.main(["status", f"--subnet-file={file}", f"--healthz-port={port}"]) == 0
        shown = capsys.readouterr().out
        own = "listens on 127.0.0.1:1" if healthz else "runs without --healthz-port"
        assert shown.splitlines()[0] == "flanneld  ready"
        assert f"warning   nothing answers at 127.0.0.1:{port} in time; this one {own}\n" in shown
        assert cli.main(["status", f"--subnet-file={file}", "--healthz-port=2"]) == 0
        assert f"warning   nothing listens on 127.0.0.1:2; this one {own}\n" in capsys.readouterr().out
        # Without a flag nobody is asked who is not this one.
        monkeypatch.setattr("flanneld.ctl.node.DEFAULT_PORT", port)
        assert cli.main(["status", f"--subnet-file={file}"]) == 0
        assert "warning" not in capsys.readouterr().out
        assert cli.main(["status", "--diff", f"--subnet-file={file}"]) == 1
        assert "flanneld runs without --healthz-port" in capsys.readouterr().err
    os.close(lock)


@pytest.mark.parametrize("port", ["abc", "99999", "-1", "1.5"])
def test_a_port_that_is_none_is_one_error_and_help_is_given_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    monkeypatch.setenv("FLANNELD_HEALTHZ_PORT", port)
    for words, code in ((["status"], 2), (["status", "--help"], 0), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == code, words
    assert f"'{port}' is not a port; correct the flag, or FLANNELD_HEALTHZ_PORT" in capsys.readouterr().err
