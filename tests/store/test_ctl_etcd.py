"""flannelctl's commands against a real etcd."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flanneld.ctl.cli import main
from flanneld.lab.etcd import Etcd
from flanneld.lab.netns import end
from flanneld.lab.wait import wait_until
from tests.store.tcp_proxy import TcpProxy

PREFIX = "/coreos.com/network"
CONFIG = '{"Network": "10.5.0.0/16", "SubnetLen": 24, "Backend": {"Type": "vxlan", "VNI": 3}}'
LEASE = (
    '{"PublicIP":"192.0.2.%d","PublicIPv6":null,"BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:0%d"},"Node":{"Name":"node%d","MachineID":"","MAC":""}}'
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server() -> Iterator[Etcd]:
    with Etcd() as etcd:
        yield etcd


@pytest.fixture
def etcd(server: Etcd) -> Etcd:
    server.ctl("del", "--prefix", "/")
    return server


@pytest.fixture
def ctl(etcd: Etcd, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run flannelctl: (exit code, standard output, standard error)."""
    monkeypatch.setenv("FLANNELD_ETCD_ENDPOINTS", etcd.endpoint)

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def put_lease(etcd: Etcd, number: int, *, ttl: int | None = 1000) -> None:
    flags = []
    if ttl is not None:
        lease_id = etcd.ctl("lease", "grant", str(ttl)).split()[1]
        flags = [f"--lease={lease_id}"]
    etcd.ctl("put", f"{PREFIX}/subnets/10.5.{number}.0-24", LEASE % (number, number, number), *flags)


def test_set_then_get_gives_the_text_back(ctl: Run, etcd: Etcd) -> None:
    code, out, err = ctl("config", "set", CONFIG)
    assert (code, err) == (0, "")
    assert out == f"stored in {PREFIX}/config: 10.5.0.0/16 in /24 subnets, backend vxlan, VNI 3\n"
    assert ctl("config", "get") == (0, CONFIG + "\n", "")
    full = json.loads(ctl("config", "get", "--json")[1])
    assert full["SubnetMin"] == "10.5.1.0"
    assert full["SubnetMax"] == "10.5.255.0"
    assert (full["Backend"]["Type"], full["Backend"]["VNI"], full["Backend"]["Port"]) == ("vxlan", 3, 0)
    assert ctl("config", "set", json.dumps(full))[0] == 0
    assert json.loads(ctl("config", "get", "--json")[1]) == full
    ctl("config", "set", CONFIG)
    assert etcd.ctl("get", "--print-value-only", f"{PREFIX}/config").strip() == CONFIG


def test_without_a_configuration_the_error_says_how_to_write_one(ctl: Run) -> None:
    code, out, err = ctl("config", "get")
    assert (code, out) == (1, "")
    assert "no network configuration at /coreos.com/network/config" in err
    assert "flannelctl config set" in err


def test_a_bad_configuration_is_refused_and_nothing_is_stored(ctl: Run, etcd: Etcd) -> None:
    ctl("config", "set", CONFIG)
    for bad, word in (
        ('{"Network": "10.5.0.0/33"}', "Network"),
        ('{"Network": "10.5.0.0/16", "SubnetLen": 40}', "SubnetLen"),
        ('{"Network": "10.5.0.0/16", "Backend": {"Type": "carrier-pigeon"}}', "carrier-pigeon"),
        ('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": "one"}}', "VNI"),
        ("{", "network configuration"),
        ("[]", "[] is no configuration: that is a JSON object"),
        ("", "empty text is no configuration"),
        ("absent", "cannot read absent: No such file"),
        ("/dev/null", "/dev/null: empty text is no configuration"),
    ):
        code, out, err = ctl("config", "set", bad)
        assert (code, out) == (1, ""), bad
        assert word in err and "next:" in err, err
    assert ctl("config", "get")[1] == CONFIG + "\n"


def test_set_warns_of_keys_that_nothing_reads_and_of_leases_it_contradicts(ctl: Run, etcd: Etcd) -> None:
    put_lease(etcd, 1)
    put_lease(etcd, 2)
    new = '{"Network": "10.9.0.0/16", "Subnetlen": 25, "Colour": 1, "Backend": {"Type": "host-gw", "Speed": 9}}'
    code, _, err = ctl("config", "set", new)
    assert code == 0
    assert "nothing reads the key Colour" in err
    assert "nothing reads the key Backend.Speed" in err
    assert "10.5.1.0/24, 10.5.2.0/24 lie outside the network: their nodes keep the old network and are not ready" in err
    assert "use another backend than host-gw" in err


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ('{"Netwrok": "10.5.0.0/16"}', ["Netwrok"]),
        ('{"Netwrok": "10.5.0.0/16", "NonMasqueradeCIDRs": ["x"], "backend": {"Type": "host-gw"}}', ["Netwrok"]),
        ('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VIN": 2, "Port": "x"}}', ["Backend.VIN"]),
        ('{"Network": "10.5.0.0/16", "Colour": 1, "Backend": {"Tpye": "udp"}}', ["Colour", "Backend.Tpye"]),
        ('{"Network": "10.5.0.0/33", "Backend": 7}', []),
        ("{", []),
    ],
)
def test_an_unread_key_is_named_before_the_error_that_it_may_explain(ctl: Run, text: str, unread: list[str]) -> None:
    code, out, err = ctl("config", "set", text)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[: len(unread)] == [f"warning: nothing reads the key {key}; is it misspelt?" for key in unread]
    assert lines[len(unread)].startswith("error: ")


def test_check_reads_a_file_standard_input_or_the_store(
    ctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "net-conf.json"
    file.write_text(CONFIG)
    assert ctl("config", "check", str(file))[:2] == (
        0,
        f"{file}: good: 10.5.0.0/16 in /24 subnets, backend vxlan, VNI 3\n",
    )
    monkeypatch.setattr("sys.stdin", io.StringIO('{"Network": 5}'))
    code, _, err = ctl("config", "check", "-")
    assert code == 1 and "standard input" in err and "Network" in err
    assert ctl("config", "check")[0] == 1
    ctl("config", "set", str(file))
    assert ctl("config", "check")[0] == 0
    code, _, err = ctl("config", "check", str(tmp_path / "absent"))
    assert code == 1 and "cannot read" in err


def test_leases_as_a_table_and_as_json(ctl: Run, etcd: Etcd) -> None:
    assert "no leases under" in ctl("leases")[1]
    for number in (10, 9):
        put_lease(etcd, number)
    put_lease(etcd, 2, ttl=None)
    etcd.ctl("put", f"{PREFIX}/subnets/nonsense", "{}")
    code, out, _ = ctl("leases")
    assert code == 0
    rows = [line.split() for line in out.partition("\n\n")[0].splitlines()]
    assert rows[0] == ["SUBNET", "NODE", "PUBLIC", "IP", "BACKEND", "VTEP", "EXPIRES"]
    assert [row[0] for row in rows[1:]] == ["10.5.2.0/24", "10.5.9.0/24", "10.5.10.0/24"]
    assert rows[1][1:] == ["node2", "192.0.2.2", "vxlan", "02:00:00:00:00:02", "reservation"]
    assert rows[2][5] == "in" and rows[2][6].startswith("16m")
    found = json.loads(ctl("leases", "--json")[1])
    assert found[0]["reservation"] is True and found[0]["expires_in"] is None
    assert 900 < found[1]["expires_in"] <= 1000
    assert found[1]["backend_data"] == {"VNI": 1, "VtepMAC": "02:00:00:00:00:09"}


@pytest.mark.field_problem(5)
def test_an_unreadable_lease_is_listed_and_released(ctl: Run, etcd: Etcd) -> None:
    ctl("config", "set", CONFIG)
    etcd.ctl("put", f"{PREFIX}/subnets/10.5.1.0-24", "garbage")
    rows = [line.split() for line in ctl("leases")[1].splitlines()]
    assert rows[1:] == [["10.5.1.0/24", "unreadable", "-", "-", "-", "never"]]
    (found,) = json.loads(ctl("leases", "--json")[1])
    assert (found["subnet"], found["unreadable"], found["reservation"]) == ("10.5.1.0/24", True, False)
    code, _, err = ctl("reserve", "10.5.1.0/24", "--node", "a")
    assert code == 1 and "10.5.1.0/24 belongs to an unknown node (its value cannot be read)" in err
    code, out, _ = ctl("release", "10.5.1.0/24")
    assert (code, out.split(", ")[0]) == (0, "released 10.5.1.0/24")
    assert "no leases under" in ctl("leases")[1]


@pytest.mark.field_problem(5)
def test_a_key_that_names_no_subnet_is_listed_with_the_command_that_removes_it(ctl: Run, etcd: Etcd) -> None:
    strange = [f"{PREFIX}/subnets/{name}" for name in ("10.5.1.7-24", "it's mine", "nonsense", "tab\there")]
    for key in strange:
        etcd.ctl("put", key, "{}")
    shown = ctl("leases")[1]
    assert shown.startswith("no leases under") and "no leases, though they stand among them" in shown
    put_lease(etcd, 1)
    shown = ctl("leases")[1]
    assert f"  {PREFIX}/subnets/nonsense: must look like 10.5.52.0-24 or" in shown
    assert "10.5.1.7-24: 10.5.1.7/24 has host bits set" in shown
    found = json.loads(ctl("leases", "--json")[1])
    assert [entry["subnet"] for entry in found] == ["10.5.1.0/24", None, None, None, None]
    assert [entry["key"] for entry in found[1:]] == strange
    for entry in found[1:]:
        assert f"    {entry['to_remove_it']}\n" in shown
        (words,) = re.findall(r"^etcdctl del (.*)$", entry["to_remove_it"])
        argv = subprocess.run(["bash", "-c", f"printf %s {words}"], capture_output=True, text=True, check=True).stdout
        etcd.ctl("del", argv)
    assert "no leases" not in ctl("leases")[1]


@pytest.mark.parametrize("config", [None, '{"Network": "10.5.0.0/33"}'])
def test_watch_without_a_usable_configuration_says_so_once_and_shows_leases(
    etcd: Etcd, tmp_path: Path, config: str | None
) -> None:
    if config is not None:
        etcd.ctl("put", f"{PREFIX}/config", config)
    argv = [sys.executable, "-m", "flanneld.ctl.cli", "leases", "--watch", f"--etcd-endpoints={etcd.endpoint}"]
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(argv, stdout=stdout, stderr=stderr, start_new_session=True)
    try:
        wait_until(lambda: "network configuration" in err.read_text(), 15, "what it waits for")
        put_lease(etcd, 3)
        wait_until(lambda: out.read_text().startswith("added   10.5.3.0/24  node3"), 10, "the new lease")
        etcd.ctl("del", f"{PREFIX}/subnets/10.5.3.0-24")
        wait_until(lambda: "removed 10.5.3.0/24" in out.read_text(), 10, "the removed lease")
    finally:
        end(process)
    (line,) = err.read_text().splitlines()
    assert line.startswith("waiting: no node gets a lease yet: ") and f"{PREFIX}/config" in line


def test_watch_prints_one_line_for_each_change(etcd: Etcd) -> None:
    etcd.ctl("put", f"{PREFIX}/config", CONFIG)
    argv = [sys.executable, "-m", "flanneld.ctl.cli", "leases", "--watch", "--json"]
    process = subprocess.Popen(
        [*argv, f"--etcd-endpoints={etcd.endpoint}"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    seen: list[dict[str, object]] = []
    assert process.stdout is not None
    lines = process.stdout
    reader = threading.Thread(target=lambda: seen.extend(json.loads(line) for line in lines), daemon=True)
    reader.start()
    try:
        put_lease(etcd, 3)
        wait_until(lambda: [s["change"] for s in seen] == ["added"], 15, "the new lease")
        etcd.ctl("put", f"{PREFIX}/subnets/10.5.3.0-24", LEASE % (4, 4, 4))
        wait_until(lambda: [s["change"] for s in seen] == ["added", "changed"], 10, "the changed lease")
        etcd.ctl("del", f"{PREFIX}/subnets/10.5.3.0-24")
        wait_until(lambda: [s["change"] for s in seen] == ["added", "changed", "removed"], 10, "the removed lease")
    finally:
        end(process)
        reader.join(5)
        lines.close()


@pytest.mark.field_problem(39)
def test_reserve_writes_a_lease_without_expiry(ctl: Run, etcd: Etcd) -> None:
    ctl("config", "set", CONFIG)
    code, out, _ = ctl("reserve", "10.5.7.0/24", "--public-ip", "192.0.2.7")
    assert (code, out) == (0, "reserved 10.5.7.0/24 for the node at 192.0.2.7\n")
    value = etcd.ctl("get", "--print-value-only", f"{PREFIX}/subnets/10.5.7.0-24").strip()
    assert value == '{"PublicIP":"192.0.2.7","PublicIPv6":null}'
    assert ctl("reserve", "10.5.8.0/24", "--node", "web8")[::2] == (0, "")
    _, _, err = ctl("reserve", "10.5.9.0/24", "--node", "web8")
    assert "node web8 has 10.5.8.0/24 already and keeps that; to move it, drain the node" in err
    assert [lease["reservation"] for lease in json.loads(ctl("leases", "--json")[1])] == [True] * 3


def test_reserve_makes_a_nodes_own_lease_permanent_as_it_is(ctl: Run, etcd: Etcd) -> None:
    ctl("config", "set", CONFIG)
    put_lease(etcd, 4)
    before = etcd.ctl("get", "--print-value-only", f"{PREFIX}/subnets/10.5.4.0-24")
    assert ctl("reserve", "10.5.4.0/24", "--node", "node4")[:2] == (
        0,
        "reserved 10.5.4.0/24 for node node4 (192.0.2.4)\n",
    )
    assert etcd.ctl("get", "--print-value-only", f"{PREFIX}/subnets/10.5.4.0-24") == before
    assert json.loads(ctl("leases", "--json")[1])[0]["reservation"] is True


def test_reserve_refuses_what_cannot_be(ctl: Run, etcd: Etcd) -> None:
    ctl("config", "set", CONFIG)
    put_lease(etcd, 5)
    for words, code, text in (
        (["10.5.5.0/24", "--public-ip", "192.0.2.9"], 1, "belongs to node node5 (192.0.2.5)"),
        (["10.5.5.0/24", "--node", "node9"], 1, "flannelctl release 10.5.5.0/24"),
        (["10.6.0.0/24", "--node", "a"], 1, "outside the network"),
        (["10.5.6.0/31", "--node", "a"], 1, "no room for containers"),
        (["10.5.0.0/23", "--node", "a"], 1, "outside what this network hands out: 10.5.1.0/24 to 10.5.255.0/24"),
        (["10.5.4.0/22", "--node", "a"], 1, "belongs to node node5"),
        (["10.5.0.0/24", "--node", "a"], 1, "outside what this network hands out: 10.5.1.0/24 to 10.5.255.0/24"),
        (["10.5.6.1/24", "--node", "a"], 2, "host bits"),
        (["10.5.6.0/24"], 2, "for whom"),
        (["10.5.6.0/24", "--public-ip", "nowhere"], 2, "not an IP address"),
    ):
        result = ctl("reserve", *words)
        assert result[0] == code, words
        assert text in result[2], result


@pytest.mark.field_problem(41)
def test_release_spares_a_node_that_shows_that_it_runs(ctl: Run, etcd: Etcd) -> None:
    ctl("config", "set", CONFIG)
    put_lease(etcd, 6)
    sign = f"{PREFIX}/up/10.5.6.0-24"
    etcd.ctl("put", sign, '{"Instance":"a kernel","Node":"node6"}')
    code, _, err = ctl("release", "10.5.6.0/24")
    assert code == 1
    assert "leased to node node6 (192.0.2.6), which runs" in err and "stop flanneld there" in err
    assert ctl("release", "10.5.6.0-24", "--force")[0] == 0
    assert ctl("leases", "--json")[1] == "[]\n"
    put_lease(etcd, 6)
    etcd.ctl("del", sign)
    assert ctl("release", "10.5.6.0/24")[0] == 0
    ctl("reserve", "10.5.6.0/24", "--node", "gone")
    assert ctl("release", "10.5.6.0/24")[0] == 0
    code, _, err = ctl("release", "10.5.6.0/24")
    assert code == 1 and "nobody leases" in err


@pytest.mark.field_problem(41)
def test_a_plain_flannels_lease_is_not_released_without_force(ctl: Run, etcd: Etcd) -> None:
    lease_id = etcd.ctl("lease", "grant", "1000").split()[1]
    key, value = f"{PREFIX}/subnets/10.5.6.0-24", '{"PublicIP":"192.0.2.6","BackendType":"vxlan"}'
    etcd.ctl("put", key, value, f"--lease={lease_id}")
    code, _, err = ctl("release", "10.5.6.0/24")
    assert code == 1
    assert "leased to the node at 192.0.2.6 for another 16m" in err and "A plain flannel wrote that lease" in err
    assert ctl("release", "10.5.6.0/24", "--force")[0] == 0


def test_a_write_loses_against_one_that_came_between(etcd: Etcd) -> None:
    from subnet_lease.etcd_admin import ChangedMeanwhile, EtcdAdmin
    from subnet_lease.etcd_connection import EtcdConnection

    with EtcdAdmin(EtcdConnection([etcd.endpoint]), PREFIX) as admin:
        admin.write_config(CONFIG, 0)
        _, revision = admin.config_text()
        admin.write_config(CONFIG + " ", revision)
        with pytest.raises(ChangedMeanwhile, match="changed by somebody else"):
            admin.write_config(CONFIG, revision)
        with pytest.raises(ChangedMeanwhile):
            admin.write_config(CONFIG, 0)


def test_no_etcd_is_said_in_one_sentence(ctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_ETCD_ENDPOINTS", "http://127.0.0.1:1")
    code, _, err = ctl("leases")
    assert code == 1
    assert err == (
        "error: etcd at http://127.0.0.1:1 cannot be reached: connection refused;"
        " check that it runs and that --etcd-endpoints names it\n"
    )


def test_an_etcd_that_takes_its_time_is_waited_for(ctl: Run, etcd: Etcd) -> None:
    with TcpProxy(etcd.port) as wire:
        wire.freeze()
        mending = threading.Timer(2, wire.mend)
        mending.start()
        code, _, err = ctl("leases", f"--etcd-endpoints={wire.endpoint}")
        mending.join()
    assert (code, err) == (0, "")


def test_where_the_store_is_may_be_said_before_the_command_and_after_it(ctl: Run) -> None:
    here, there = "http://127.0.0.1:1", "http://127.0.0.1:2"
    for words, asked in (
        ([f"--etcd-endpoints={here}", "leases"], here),
        (["leases", "-etcd-endpoints", here], here),
        ([f"--etcd-endpoints={here}", "config", "get"], here),
        ([f"--etcd-endpoints={here}", "config", "get", f"--etcd-endpoints={there}"], there),
    ):
        code, _, err = ctl(*words)
        assert code == 1 and f"etcd at {asked} cannot be reached" in err, words


def test_usage_errors_exit_with_2(ctl: Run) -> None:
    assert ctl("config")[0] == 2
    code, _, err = ctl("leases", "--no-such-flag")
    assert code == 2
    assert err == "flannelctl leases: error: unrecognized arguments: --no-such-flag\nsee flannelctl leases --help\n"
    for words, said in (
        (["leases", "--etcd-endpoint=x"], "--etcd-endpoint=x; did you mean --etcd-endpoints?"),
        (["leases", "--jsn", "--wacth"], "--jsn --wacth; did you mean --json --watch?"),
        (["config", "set", "--etcd-endpoint", "x", "{}"], "{}; did you mean --etcd-endpoints?"),
        (["--verson", "leases"], "--verson; did you mean --version?"),
    ):
        code, _, err = ctl(*words)
        assert code == 2 and err.splitlines()[0].endswith(said), err
    for words, said in (
        (["lease"], "flannelctl: error: 'lease' is none of config, leases, "),
        (["lease"], "; did you mean leases?"),
        (["config", "st"], "flannelctl config: error: 'st' is none of get, set, check; did you mean set?"),
    ):
        code, _, err = ctl(*words)
        assert code == 2 and said in err.splitlines()[0], err
    code, out, err = ctl()
    assert (code, out) == (2, "") and err.startswith("usage: flannelctl "), err
    assert ctl("release")[2].splitlines()[1:] == ["see flannelctl release --help"]
    assert ctl("leases", "--subnet-lease-renew-margin", "0")[0] == 2
