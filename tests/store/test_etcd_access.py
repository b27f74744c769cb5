"""Getting to etcd: endpoints and failover, login; and what is said when that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from flanneld.lab.etcd import Etcd, free_port
from flanneld.lab.wait import clock, wait_until
from subnet_lease.etcd import EtcdStore
from subnet_lease.store import AccessDenied, LeaseLost, SetupError, StoreUnavailable
from tests.store.conftest import MakeNetwork, Network, request_of

CONFIG = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
PASSWORD = "correct horse battery staple"


# -- three members ---------------------------------------------------------------------------------------------------


@pytest.fixture
def members() -> Iterator[list[Etcd]]:
    """Three etcd servers that form one cluster."""
    servers = [Etcd(start=False) for _ in range(3)]
    try:
        cluster = ",".join(f"m{number}={server.peer_url}" for number, server in enumerate(servers))
        for number, server in enumerate(servers):
            server.extra = (
                f"--name=m{number}", f"--initial-cluster={cluster}", f"--initial-cluster-token={servers[0].port}",
                "--heartbeat-interval=50", "--election-timeout=500",
            )  # fmt: skip
        starts = [threading.Thread(target=server.start) for server in servers]
        for start in starts:
            start.start()
        for start in starts:
            start.join()
        yield servers
    finally:
        for server in servers:
            server.close()


@pytest.mark.field_problem(14)
def test_one_of_three_members_killed(members: list[Etcd], on: MakeNetwork) -> None:
    network = on(members[0])
    network.configure()
    store = network.store(endpoints=[member.endpoint for member in members])
    config = store.read_config()
    lease = store.acquire(config, request_of("a", "192.168.64.3"))
    follower = network.follow(store)
    wait_until(lambda: follower.keys == {lease.key})
    for number in (0, 1):
        # Whichever member is in use, it is among those killed.
        members[number].stop()
        other = members[2]
        joined = wait_until(
            lambda: _try(network.store(endpoints=[other.endpoint]), f"b{number}", f"192.168.64.{10 + number}"),
            timeout=30,
        )
        wait_until(lambda: joined in follower.keys, timeout=30)
        wait_until(lambda: _renewed(store, lease), timeout=30)
        members[number].start()
    assert follower.error is None


def _try(store: EtcdStore, name: str, ip: str) -> str | None:
    try:
        return store.acquire(store.read_config(), request_of(name, ip)).key
    except StoreUnavailable:
        return None


def _renewed(store: EtcdStore, lease: object) -> bool:
    try:
        return store.renew(lease) > 0  # type: ignore[arg-type]
    except StoreUnavailable:
        return False


@pytest.mark.field_problem(14)
def test_a_member_without_its_cluster_is_left(members: list[Etcd], on: MakeNetwork) -> None:
    """Two of three are gone: the last has the data, but may not be believed."""
    network = on(members[0])
    network.configure()
    store = network.store(endpoints=[members[2].endpoint])
    follower = network.follow(store)
    wait_until(lambda: follower.snapshots)
    members[0].stop()
    members[1].stop()
    wait_until(lambda: store.status.failure, timeout=30)
    with pytest.raises(StoreUnavailable):
        store.read_config()
    assert len(follower.snapshots) == 1


def test_an_endpoint_that_nobody_listens_on_is_passed_over(network: Network) -> None:
    store = network.store(endpoints=[f"http://127.0.0.1:{free_port()}", network.etcd.endpoint])
    for _ in range(3):
        store.acquire(store.read_config(), request_of("a", "192.168.64.3"))


def test_nobody_answers(network: Network) -> None:
    endpoints = [f"http://127.0.0.1:{free_port()}", f"http://[::1]:{free_port()}"]
    with pytest.raises(StoreUnavailable) as failure:
        network.store(endpoints=endpoints).read_config()
    assert str(failure.value) == (
        f"etcd at {', '.join(endpoints)} cannot be reached: connection refused;"
        " check that it runs and that --etcd-endpoints names it"
    )


def test_who_answers_is_not_etcd(network: Network) -> None:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = network.store(endpoints=[f"http://127.0.0.1:{server.server_port}"])
        with pytest.raises(StoreUnavailable, match="is not etcd; correct --etcd-endpoints"):
            store.read_config()
        store.close()
        server.shutdown()


# -- login -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def login_etcd() -> Iterator[Etcd]:
    """Asks for a login; "flannel" may use /granted only. Tokens live two seconds after their last use."""
    with Etcd(extra=("--auth-token-ttl=2",)) as etcd:
        ctl = etcd.ctl
        ctl("user", "add", "root:rootpw")
        ctl("user", "grant-role", "root", "root")
        ctl("role", "add", "flannel")
        ctl("role", "grant-permission", "flannel", "--prefix=true", "readwrite", "/granted/")
        ctl("user", "add", f"flannel:{PASSWORD}")
        ctl("user", "grant-role", "flannel", "flannel")
        ctl("auth", "enable")
        etcd.client = ("--user=root:rootpw",)
        ctl("put", "/granted/network/config", CONFIG)
        ctl("put", "/other/network/config", CONFIG)
        yield etcd
        ctl("auth", "disable")


def open_store(etcd: Etcd, prefix: str = "/granted/network", password: str = PASSWORD) -> EtcdStore:
    return EtcdStore([etcd.endpoint], prefix, username="flannel", password=password)


def test_login_and_a_new_one_when_it_expires(login_etcd: Etcd) -> None:
    store = open_store(login_etcd)
    try:
        lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
        token = store._connection._client.metadata
        # etcd forgets every login when permissions change or it restarts; a token also expires by itself.
        login_etcd.stop()
        login_etcd.start()
        wait_until(lambda: _renewed(store, lease))
        assert store._connection._client.metadata != token
        snapshots = store.watch()
        assert set(next(snapshots).leases) == {lease.key}
        snapshots.close()
        store.release(lease)
        with pytest.raises(LeaseLost):
            store.renew(lease)
    finally:
        store.close()


def test_the_watch_survives_a_lost_login(login_etcd: Etcd) -> None:
    network = Network(login_etcd, "/granted/network")
    try:
        store = network.store(username="flannel", password=PASSWORD)
        follower = network.follow(store)
        wait_until(lambda: follower.snapshots)
        login_etcd.stop()
        login_etcd.start()
        login_etcd.ctl("put", network.key("10.5.9.0-24"), '{"PublicIP":"192.168.64.9"}')
        wait_until(lambda: "10.5.9.0-24" in follower.keys, timeout=30)
        login_etcd.ctl("del", network.key("10.5.9.0-24"))
        wait_until(lambda: "10.5.9.0-24" not in follower.keys, timeout=30)
    finally:
        network.close()


def test_wrong_password(login_etcd: Etcd) -> None:
    store = open_store(login_etcd, password="guess-me-not")
    with capture_logs() as lines, pytest.raises(AccessDenied) as denied:
        store.read_config()
    store.close()
    assert "'flannel'" in str(denied.value)
    assert "--etcd-username" in str(denied.value)
    for text in (str(denied.value), repr(denied.value), repr(lines), repr(store._connection)):
        assert "guess-me-not" not in text


def test_no_permission_on_the_prefix(login_etcd: Etcd) -> None:
    network = Network(login_etcd, "/other/network")
    try:
        store = network.store(username="flannel", password=PASSWORD)
        with pytest.raises(AccessDenied) as denied:
            store.read_config()
        assert "'flannel'" in str(denied.value)
        assert "/other/network" in str(denied.value)
        assert "grant-permission" in str(denied.value)
        follower = network.follow(store)
        wait_until(lambda: store.status.errors.get("access_denied", 0) >= 2)
        assert follower.snapshots == []
        # An operator mends it while we wait.
        login_etcd.ctl("role", "grant-permission", "flannel", "--prefix=true", "readwrite", "/other/")
        wait_until(lambda: follower.snapshots, timeout=30)
        login_etcd.ctl("role", "revoke-permission", "flannel", "--prefix=true", "/other/")
    finally:
        network.close()


def test_a_role_that_may_write_flannels_keys_only_works_without_signs_of_life(login_etcd: Etcd) -> None:
    network = Network(login_etcd, "/flannel-only/network")
    network.configure()
    for prefix in ("config", "subnets"):
        login_etcd.ctl(
            "role", "grant-permission", "flannel", "--prefix=true", "readwrite", f"{network.prefix}/{prefix}"
        )
    try:
        store = network.store(username="flannel", password=PASSWORD)
        with capture_logs() as lines:
            lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
            store.renew(lease)
            store.renew(lease)
        assert [line["log_level"] for line in lines] == ["warning"]
        follower = network.follow(store)
        wait_until(lambda: follower.keys == {lease.key})
    finally:
        network.close()


def test_no_login_where_one_is_asked_for(login_etcd: Etcd) -> None:
    store = EtcdStore([login_etcd.endpoint], "/granted/network")
    with pytest.raises(AccessDenied, match="--etcd-username"):
        store.read_config()
    store.close()


def test_a_login_where_none_is_asked_for(network: Network) -> None:
    assert network.store(username="flannel", password=PASSWORD).read_config().subnet_len == 24


# -- what cannot heal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    ["10.0.0.1:2379", "http://", "ftp://a:1", "http://a:99999", "http://a:b", "http://a/path"],
)
def test_malformed_endpoint(endpoint: str) -> None:
    with pytest.raises(SetupError) as error:
        EtcdStore([endpoint])
    assert repr(endpoint) in str(error.value)
    assert "http://10.0.0.1:2379" in str(error.value)


def test_a_password_in_an_endpoint_is_refused_and_not_repeated() -> None:
    with pytest.raises(SetupError, match="--etcd-username and --etcd-password") as error:
        EtcdStore(["http://user:secret@etcd.example:2379"])
    assert "secret" not in str(error.value)
    assert "etcd.example:2379" in str(error.value)


def test_no_endpoint_half_a_login_and_a_bad_margin() -> None:
    with pytest.raises(SetupError, match="--etcd-endpoints"):
        EtcdStore([])
    with pytest.raises(SetupError, match="--etcd-password"):
        EtcdStore(["http://a:1"], username="flannel")
    with pytest.raises(SetupError, match="1 to 1439"):
        EtcdStore(["http://a:1"], renew_margin_minutes=1440)


def test_closing_does_not_wait_for_an_etcd_that_is_gone(own_network: Network) -> None:
    store = own_network.store()
    store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    follower = own_network.follow(store)
    wait_until(lambda: follower.snapshots)
    assert own_network.etcd.process is not None
    own_network.etcd.process.send_signal(signal.SIGSTOP)
    started = clock()
    store.close()
    follower.join()
    assert clock() - started < 4
    own_network.etcd.process.send_signal(signal.SIGCONT)


DEAF = """
import os, socket, sys
deaf = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
deaf.bind(("127.0.0.1", 53))
deaf.set_inheritable(True)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""A name server that hears and does not answer, for as long as the command runs."""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces with a resolv.conf of their own")
def test_a_name_server_that_is_silent_is_named_and_not_etcd(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    script = 'mount --make-rprivate / && mount --bind "$1" /etc/resolv.conf && ip link set lo up && shift && exec "$@"'
    ctl = [sys.executable, "-m", "flanneld.ctl.cli", "leases", "--etcd-endpoints=http://etcd.example:2379"]
    inside = [sys.executable, "-c", DEAF, *ctl]
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", script, "sh", str(tmp_path / "resolv.conf"), *inside],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "the name etcd.example cannot be resolved (no name server answers)" in done.stderr
    assert "nothing came" not in done.stderr
