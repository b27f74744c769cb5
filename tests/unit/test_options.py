"""Flags and variables as flannel's users write them."""

from __future__ import annotations

import errno
import os
import re
from typing import Any

import pytest
import structlog

from flanneld.options import FLAGS, parse
from flanneld.telemetry import set_up_logging
from subnet_lease.etcd_connection import parse_endpoint
from subnet_lease.store import SetupError


def options(*argv, **env):
    return parse(argv, env)[0]


@pytest.mark.parametrize(
    "argv",
    [
        ("--ip-masq",),
        ("-ip-masq",),
        ("--ip-masq=true",),
        ("-ip-masq=1",),
        ("--ip-masq", "--v=2"),
        ("--ip-masq", "true"),
    ],
)
def test_booleans_in_every_spelling(argv):
    assert options(*argv).ip_masq is True


def test_a_boolean_with_false_does_not_swallow_later_flags():
    found = options("--ip-masq", "false", "--etcd-prefix=/x")
    assert (found.ip_masq, found.etcd_prefix) == (False, "/x")


def test_repeatable_flags_keep_their_order():
    assert options("--iface=eth1", "-iface", "eth0").iface == ("eth1", "eth0")


def test_an_empty_item_is_none_as_in_flannel():
    found = options("--iface=", "--iface-regex=", "--iface=eth1", "--iface=")
    assert (found.iface, found.iface_regex) == (("eth1",), ())


def test_variables_count_only_when_the_flag_is_absent_and_the_value_is_not_empty():
    found = options("--etcd-prefix=/flag", FLANNELD_ETCD_PREFIX="/env", FLANNELD_IFACE="eth3", FLANNELD_PUBLIC_IP="")
    assert (found.etcd_prefix, found.iface, found.public_ip) == ("/flag", ("eth3",), "")


def test_a_bad_variable_is_a_warning_and_the_default():
    found, warnings = parse([], {"FLANNELD_HEALTHZ_PORT": "many"})
    assert found.healthz_port == 0
    assert warnings == ("FLANNELD_HEALTHZ_PORT: 'many' is not a whole number; using the default 0",)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--no-such-flag"], "no-such-flag"),
        (["--ip-masq=perhaps"], "perhaps"),
        (["--subnet-lease-renew-margin=1440"], "1 to 1439"),
        (["--subnet-lease-renew-margin=0"], "1 to 1439"),
        (["--public-ip=nowhere"], "not an IPv4 address"),
        (["--iface-regex=("], "--iface-regex=("),
        ([r"--iface-regex=\p{Greek}"], r"--iface-regex=\p{Greek}"),
        (["--iface-regex=eth[[:number:]]"], "--iface-regex=eth[[:number:]]: there is no character class [:number:]"),
        (["--iface-can-reach=nowhere"], "not an IP address"),
        (["--healthz-port=70000"], "not a port"),
        (["--log-format=xml"], "auto, console or json"),
        (["--etcd-pre=/x"], "etcd-pre"),
        (["--subnet-file="], "--subnet-file=: must name a file"),
        (["--subnet-file=/tmp"], "--subnet-file=/tmp: must name a file"),
        (["--subnet-file=/run/nowhere/"], "must name a file"),
    ],
)
def test_bad_usage_exits_with_2_and_names_the_thing_in_the_first_of_two_lines(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv, {})
    assert caught.value.code == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("flanneld: error: ")
    assert says in first
    assert others == ["see flanneld --help"]


def test_every_log_level_of_flannel_is_taken_and_the_help_names_the_one_that_changes_anything(capfd):
    shown = next(flag.help for flag in FLAGS if flag.name == "v")
    named = {int(number) for number in re.findall(r"\d+", shown)} - {0, 10}
    told = []
    for level in range(11):
        assert options(f"-v={level}").v == options("--v", str(level)).v == level
        set_up_logging("json", level)
        try:
            structlog.get_logger().debug("a change")
            told.append("a change" in capfd.readouterr().err)
        finally:
            structlog.reset_defaults()
    assert named == {told.index(True)}
    assert told == sorted(told)


def test_a_bad_event_queue_depth_is_fatal_as_in_flannel(capsys):
    with pytest.raises(SystemExit):
        parse([], {"EVENT_QUEUE_DEPTH": "lots"})
    assert "EVENT_QUEUE_DEPTH" in capsys.readouterr().err


def test_the_password_is_never_shown():
    found = options("--etcd-password=hunter2", "--etcd-username=root")
    assert "hunter2" not in str(found.redacted())
    assert found.redacted()["etcd_username"] == "root"


def test_the_node_name_comes_from_the_flag_then_node_name():
    assert options("--node-name=a", NODE_NAME="b").node_name == "a"
    assert options(NODE_NAME="b").node_name == "b"
    assert options().node_name


def test_every_flag_of_flannel_is_known():
    flannel = """etcd-endpoints etcd-prefix etcd-keyfile etcd-certfile etcd-cafile etcd-username etcd-password iface
        iface-regex iface-can-reach subnet-file public-ip public-ipv6 subnet-lease-renew-margin ip-masq
        ip-masq-fully-random-disable kube-subnet-mgr ip-blackhole-route version kube-api-url kubeconfig-file
        kube-annotation-prefix healthz-ip healthz-port iptables-resync iptables-forward-rules
        set-node-network-unavailable net-config-path v vmodule log_backtrace_at""".split()
    assert set(flannel) <= {flag.name for flag in FLAGS}


def test_a_second_daemon_has_a_name_of_its_own():
    assert options().instance == ""
    assert options("--subnet-file=/run/flannel/subnet.env").instance == ""
    assert options("--subnet-file=/run/blue/subnet.env").instance == "blue"
    assert options("--subnet-file=/run/flannel/green.env").instance == "green"


@pytest.mark.parametrize("password", ["secret", "se/cret", "se,cret", "se@cret", "se://cret", "se,http://cret"])
def test_a_password_in_an_endpoint_is_refused_and_neither_logged_nor_shown(password, capsys):
    endpoints = f"http://10.0.0.1:2379,http://root:{password}@10.0.0.2:2379"
    for argv, env in (([f"--etcd-endpoints={endpoints}"], {}), ([], {"FLANNELD_ETCD_ENDPOINTS": endpoints})):
        with pytest.raises(SystemExit) as end:
            parse(argv, env)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert "--etcd-username and --etcd-password" in said
        assert "10.0.0.2:2379" in said
        assert not [word for word in ("root", "se", "cret") if re.search(rf"\b{word}\b|secret", said)]
    # Where the API server is the store, nobody reads it, but it is logged.
    shown = options("--kube-subnet-mgr", f"--etcd-endpoints={endpoints}").redacted()["etcd_endpoints"]
    assert shown == "http://(hidden)@10.0.0.2:2379"
    with pytest.raises(SetupError, match="--etcd-username and --etcd-password") as refused:
        parse_endpoint(f"http://root:{password}@10.0.0.2:2379")
    assert "cret" not in str(refused.value)


def test_an_address_to_listen_on_is_no_name_that_dns_would_have_to_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--healthz-ip=nonsense"], {})
    assert end.value.code == 2
    assert "--healthz-ip=nonsense: not an IP address" in capsys.readouterr().err
    for good in ("127.0.0.1", "::", "", "localhost"):
        parse([f"--healthz-ip={good}"], {})


def test_what_nothing_reads_is_a_warning_with_a_suggestion() -> None:
    _, warnings = parse((), {"FLANNELD_IPMASQ": "true", "FLANNELD_SERVICE_HOST": "10.96.0.9", "FLANNELD_IP_MASQ": "1"})
    assert warnings == ("FLANNELD_IPMASQ is no variable that flanneld reads; did you mean FLANNELD_IP_MASQ?",)
    _, warnings = parse(("--etcd-endpoints=http://10.0.0.1:2379", "--etcd-cafile=/ca.pem"), {})
    assert len(warnings) == 1 and "--etcd-cafile" in warnings[0] and "https://" in warnings[0]
    assert parse(("--etcd-endpoints=https://10.0.0.1:2379", "--etcd-cafile=/ca.pem"), {})[1] == ()


def test_a_subnet_file_where_this_user_may_not_look_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def stat(path: Any, *words: Any, **more: Any) -> os.stat_result:
        if "subnet.env" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *words, **more)

    monkeypatch.setattr("os.stat", stat)
    assert parse(["--subnet-file=/run/secret/subnet.env"], {})[0].subnet_file == "/run/secret/subnet.env"
