"""flannelctl's pure parts: what is shown, and what is said when something is wrong."""

from __future__ import annotations

import argparse
import io
import json
import os
import threading
from base64 import b64encode
from dataclasses import replace
from importlib.metadata import version
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from backends.registry import backend_class
from cni.daemon_status import hold_lock
from flanneld.ctl import cli, doctor, release
from flanneld.ctl.config import as_json, contradictions, understood
from flanneld.ctl.leases import changes, expiries, order, row
from flanneld.ctl.output import Problem, console, duration, table
from flanneld.ctl.reserve import parse_subnets
from flanneld.options import FLAGS
from subnet_lease.lease import Lease, LeaseAttrs, NodeIdentity
from subnet_lease.persistent_map import PersistentMap
from subnet_lease.store import AccessDenied

SECRET = b64encode(b"s" * 32).decode()
CONFIG = understood('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "Port": 4789}}', "test")


def lease(third: int, name: str = "") -> Lease:
    attrs = LeaseAttrs(
        IPv4Address(f"192.0.2.{third}"),
        backend_type="vxlan",
        backend_data={"VNI": 1, "VtepMAC": f"02:00:00:00:00:{third:02x}"},
        node=NodeIdentity(name) if name else None,
    )
    return Lease(IPv4Network(f"10.5.{third}.0/24"), None, attrs)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.build_parser()
    actions = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    wanted = {
        "config",
        "leases",
        "reserve",
        "release",
        "status",
        "doctor",
        "cleanup",
        "demo",
        "docker-opts",
        "cni-conf",
        "help",
    }
    assert wanted == set(actions.choices)
    for name in wanted:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert f"flannelctl {name}" in capsys.readouterr().out


def test_the_stores_flags_have_a_page_of_their_own_and_do_not_fill_every_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [flag for flag in FLAGS if flag.group == "store"]
    for words in ([], ["leases"], ["config", "set"], ["doctor"]):
        assert cli.main(["help", *words]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(" ".join(["usage: flannelctl", *words]))
        assert "flannelctl help store" in " ".join(shown.split())
        assert not [flag.name for flag in flags if f"  --{flag.name}" in shown and flag.name != "etcd-endpoints"]
        assert len(shown.splitlines()) < 40
    assert cli.main(["help", "store"]) == 0
    shown = capsys.readouterr().out
    assert [flag.name for flag in flags if f"  --{flag.name} " not in shown] == []
    assert cli.main(["help", "leasse"]) == 2
    assert "there is no help for leasse" in capsys.readouterr().err


def test_a_variable_that_nobody_reads_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLANNELD_ETCD_ENDPOINT", "http://127.0.0.1:2")
    assert cli.main(["leases", "--etcd-endpoints=http://127.0.0.1:1"]) == 1
    told = "FLANNELD_ETCD_ENDPOINT is no variable that flanneld reads; did you mean FLANNELD_ETCD_ENDPOINTS?"
    assert capsys.readouterr().err.splitlines()[0] == f"warning: {told}"


def test_the_version_is_flannelds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"flannelctl {version('flanneld')}\n"


def test_leases_are_ordered_by_number() -> None:
    assert [x.key for x in sorted([lease(10), lease(9)], key=order)] == ["10.5.9.0-24", "10.5.10.0-24"]


def test_a_row_says_what_is_known() -> None:
    assert row(lease(7, "web"), 5025.0) == (
        "10.5.7.0/24", "web", "192.0.2.7", "vxlan", "02:00:00:00:00:07", "in 1h 23m"
    )  # fmt: skip
    bare = Lease(None, IPv6Network("fc00:0:0:7::/64"), LeaseAttrs(), reservation=True)
    assert row(bare, None) == ("fc00:0:0:7::/64", "-", "-", "-", "-", "reservation")


def test_a_table_on_a_narrow_terminal_folds_its_widest_column_and_loses_nothing() -> None:
    verdict = "underlay good, UDP 8472 dead to web: let UDP 8472 pass in both directions, and see flannelctl status"
    rows = [("web.example.org", "10.5.7.0/24", "192.168.100.12", verdict), ("b", "10.5.8.0/24", "192.0.2.8", "good")]
    shown = io.StringIO()
    Console(file=shown, width=80).print(table(("NODE", "SUBNET", "PUBLIC IP", "VERDICT"), rows))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown.getvalue()
    starts = [lines[0].index(name) for name in ("NODE", "SUBNET", "PUBLIC IP", "VERDICT")]
    assert [lines[1][a:b].strip() for a, b in pairwise(starts)] == list(rows[0][:3])
    assert " ".join(line[starts[3] :].strip() for line in lines[1:-1]) == verdict
    assert lines[-1].split() == list(rows[1])


def test_what_is_no_terminal_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(table(("NODE", "VERDICT"), [("web", "word " * 500 + "end"), ("b", "good")]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1] == "web   " + "word " * 500 + "end"


def test_changes_between_snapshots() -> None:
    one, two, other = lease(1), lease(2), lease(2, "renamed")
    first = PersistentMap({"1": one, "2": two})
    assert changes(PersistentMap(), first) == [("added", one), ("added", two)]
    assert changes(first, PersistentMap({"2": other})) == [("removed", one), ("changed", other)]
    assert changes(first, first.with_changes({"1": lease(1)})) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m 1s"), (86400, "24h 0m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("10.5.7.0/24", (IPv4Network("10.5.7.0/24"), None)),
        ("10.5.7.0-24", (IPv4Network("10.5.7.0/24"), None)),
        ("fc00:0:0:7::/64", (None, IPv6Network("fc00:0:0:7::/64"))),
        ("10.5.7.0/24, fc00:0:0:7::/64", (IPv4Network("10.5.7.0/24"), IPv6Network("fc00:0:0:7::/64"))),
        ("10.5.7.0-24&fc00:0:0:7::-64", (IPv4Network("10.5.7.0/24"), IPv6Network("fc00:0:0:7::/64"))),
    ],
)
def test_subnets_in_either_spelling(text: str, key: tuple[object, object]) -> None:
    assert parse_subnets(text) == key


@pytest.mark.parametrize("text", ["", "10.5.7.1/24", "10.5.7.0/24,10.5.8.0/24", "web", "10.5.7.0/x"])
def test_what_is_no_subnet_is_wrong_usage(text: str) -> None:
    with pytest.raises(Problem) as problem:
        parse_subnets(text)
    assert problem.value.code == 2 and problem.value.remedy


def test_few_contradictions_are_named_and_many_counted() -> None:
    elsewhere = understood('{"Network": "10.9.0.0/16", "Backend": {"Type": "host-gw"}}', "test")
    outside, backend = contradictions(elsewhere, [lease(n) for n in range(1, 6)])
    assert outside.startswith("5 lease(s) such as 10.5.1.0/24, 10.5.2.0/24, 10.5.3.0/24 lie outside")
    assert "another backend than host-gw" in backend
    assert contradictions(CONFIG, [lease(1)]) == []


def test_leases_are_asked_for_their_expiry_several_at_a_time() -> None:
    together = threading.Barrier(10)  # nobody passes before ten are there

    class Ages:
        def ttl(self, asked: Lease) -> float:
            together.wait(10)
            return float(asked.key.split(".")[2])

    found = expiries(Ages(), [lease(n) for n in range(10, 20)])  # type: ignore[arg-type]
    assert found == {f"10.5.{n}.0-24": float(n) for n in range(10, 20)}


class Unknowable:
    """An etcd whose signs of life this user may not read."""

    def lives(self, _: Lease) -> bool:
        raise AccessDenied("etcd denies user 'guest' the key /coreos.com/network/up/10.5.7.0-24")


def test_release_wants_force_where_it_must_not_know_who_lives() -> None:
    with pytest.raises(Problem, match=r"nobody can tell whether node web .*denies user 'guest'") as problem:
        release.check(Unknowable(), lease(7, "web"), "10.5.7.0/24")  # type: ignore[arg-type]
    assert "--force" in problem.value.remedy


@pytest.mark.field_problem(46)
@pytest.mark.parametrize(
    ("alive", "good", "words"),
    [
        ({"192.0.2.7", "10.5.7.0"}, True, "good"),
        ({"10.5.7.0"}, True, "does not answer pings"),
        ({"192.0.2.7"}, False, "underlay good, UDP 4789 dead to web"),
        (set(), False, "underlay dead: 192.0.2.7 does not answer"),
    ],
)
def test_the_doctor_says_where_the_path_ends(alive: set[str], good: bool, words: str) -> None:
    finding = doctor.examine(lease(7, "web"), "vxlan", doctor.tunnel_port(CONFIG), alive.__contains__)
    assert finding.good is good
    assert words in finding.verdict


@pytest.mark.parametrize(
    ("backend", "alive", "good", "words"),
    [
        ("host-gw", {"192.0.2.7"}, True, "underlay good; host-gw has no tunnel test"),
        ("ipip", {"192.0.2.7"}, True, "underlay good; ipip has no tunnel test"),
        ("alloc", {"192.0.2.7"}, True, "underlay good; alloc carries no packets"),
        ("ipip", {"10.5.7.0"}, False, "underlay dead: 192.0.2.7 does not answer"),
        ("wireguard", {"192.0.2.7"}, False, "the UDP port of wireguard dead to web"),
    ],
)
def test_the_doctor_says_what_it_cannot_try(backend: str, alive: set[str], good: bool, words: str) -> None:
    finding = doctor.examine(lease(7, "web"), backend, None, alive.__contains__)
    assert finding.good is good
    assert words in finding.verdict


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ('{"type": "VXLAN", "port": 4789}', 4789),
        ('{"Type": "vxlan"}', 8472),
        ('{"Type": "udp"}', 8285),
        ('{"Type": "wireguard"}', 51820),
        ('{"Type": "ipip"}', None),
    ],
)
def test_the_doctor_knows_the_port_of_the_tunnel(text: str, port: int | None) -> None:
    assert doctor.tunnel_port(understood(f'{{"Network": "10.5.0.0/16", "Backend": {text}}}', "test")) == port


@pytest.mark.parametrize(
    ("status", "reasons"),
    [
        ({"ready": True, "devices": ["lo"]}, []),
        ({"ready": True, "devices": ["lo", "flannel.1"]}, ["device flannel.1 is missing here"]),
        ({"ready": False, "reasons": ["lease: taken"], "devices": ["flannel.1"]}, ["lease: taken"]),
        ({"ready": False, "reasons": ["underlay: gone\ninterfaces seen:\n  lo"]}, ["underlay: gone"]),
        ({"ready": True, "running": False}, ["flanneld does not run here"]),
        ({"unheard": "hangs", "problem": "runs but does not answer"}, ["flanneld runs but does not answer"]),
    ],
)
def test_the_doctor_looks_at_its_own_node_first(status: dict[str, object], reasons: list[str]) -> None:
    assert doctor.unfit({"running": True, **status}, {"lo", "eth0"}) == reasons


def test_without_ping_the_doctor_blames_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "subnet.env"
    (tmp_path / "flanneld-status.json").write_text('{"pid": 4711, "ready": true, "healthz": null}')
    monkeypatch.setenv("PATH", str(tmp_path))
    lock = hold_lock(str(file))
    assert cli.main(["doctor", f"--subnet-file={file}"]) == 1
    os.close(lock)
    assert "there is no ping on this host" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["10.5.7.0", "fc00::"])
def test_a_subnet_without_a_length_is_told_so(text: str) -> None:
    with pytest.raises(Problem, match="it has no prefix length"):
        parse_subnets(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"Network": "10.5.0.0/16", "NonMasqueradeCIDRs": ["192.168.0.0/16", "fc00::/7"]}',
        f'{{"Network": "10.5.0.0/16", "Backend": {{"Type": "wireguard", "PSK": "{SECRET}", "mode": "auto"}}}}',
        '{"Network": "10.5.0.0/16", "SubnetMin": "10.5.9.0", "SubnetLen": 26, "Backend": {"Type": "alloc"}}',
        '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fc00:5::/48", "Backend": {"Type": "host-gw"}}',
        '{"Network": "10.5.0.0/16", "Colour": 1, "Backend": {"Type": "udp", "Speed": 9}}',
        '{"Network": "10.5.0.0/16", "Backend": {"Type": "extension", "PreStartupCommand": "echo $NETWORK"}}',
    ],
)
@pytest.mark.parametrize("etcd", [True, False])
def test_a_configuration_with_all_defaults_means_the_same(text: str, etcd: bool) -> None:
    given = understood(text, "test", etcd=etcd)
    full = as_json(given)
    again = understood(json.dumps(full), "test", etcd=etcd)
    assert as_json(again) == full
    blank = {"unknown_keys": (), "backend_options": {}}
    assert replace(again, **blank) == replace(given, **blank)
    backend = backend_class(given.backend_type)
    one, two = backend(given.backend_options), backend(again.backend_options)
    assert getattr(one, "options", None) == getattr(two, "options", None)
    assert one.unknown_options == two.unknown_options


def test_every_default_of_the_backend_is_filled_in() -> None:
    full = as_json(understood('{"Network": "10.5.0.0/16", "Backend": {"type": "VXLAN", "port": 4789}}', "test"))
    assert full["NonMasqueradeCIDRs"] == []
    assert full["Backend"] == {
        "Type": "vxlan",
        "VNI": 1,
        "Port": 4789,
        "MTU": 0,
        "GBP": False,
        "Learning": False,
        "DirectRouting": False,
        "TxChecksumOffload": "auto",
    }


def test_a_secret_is_not_printed_by_the_summary() -> None:
    from flanneld.ctl.config import summary

    config = understood(f'{{"Network": "10.5.0.0/16", "Backend": {{"Type": "wireguard", "PSK": "{SECRET}"}}}}', "test")
    assert SECRET not in summary(config)
