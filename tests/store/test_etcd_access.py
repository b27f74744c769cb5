"""Getting to etcd: endpoints and failover, TLS, login; and what is said when that fails."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from flanneld.lab.etcd import Etcd, free_port
from flanneld.lab.wait import wait_until
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
    wait_until(lambda: store.status.last_error, timeout=30)
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


# -- TLS -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """File names: an authority, certificates for 127.0.0.1 of a server and a client, and of a foreign authority."""

    ca: str
    server: str
    server_key: str
    client: str
    client_key: str
    other_ca: str
    other_client: str
    expired: str


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("pki")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, cwd=directory, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for authority in ("ca", "other-ca"):
        openssl("req", "-x509", *curve, "-keyout", f"{authority}.key", "-out", f"{authority}.pem",
                "-subj", f"/CN={authority}", "-days", "2")  # fmt: skip
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-out", f"{name}.pem", "-days", "2", "-extfile", "san")  # fmt: skip
    for made, request, authority, days in (
        ("other-client", "client", "other-ca", "2"),
        ("expired", "server", "ca", "-1"),
    ):
        openssl("x509", "-req", "-in", f"{request}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key",
                "-CAcreateserial", "-out", f"{made}.pem", "-days", days, "-extfile", "san")  # fmt: skip
    names = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key", "other-ca.pem", "other-client.pem",
             "expired.pem")  # fmt: skip
    return Certificates(*(str(directory / name) for name in names))


@pytest.fixture(scope="module")
def tls_etcd(certificates: Certificates) -> Iterator[Etcd]:
    """Wants no client certificate."""
    extra = (f"--cert-file={certificates.server}", f"--key-file={certificates.server_key}")
    with Etcd(scheme="https", extra=extra, client=(f"--cacert={certificates.ca}",)) as etcd:
        yield etcd


@pytest.fixture(scope="module")
def mutual_tls_etcd(certificates: Certificates) -> Iterator[Etcd]:
    """Lets nobody in without a client certificate."""
    c = certificates
    extra = (
        f"--cert-file={c.server}",
        f"--key-file={c.server_key}",
        "--client-cert-auth",
        f"--trusted-ca-file={c.ca}",
    )
    client = (f"--cacert={c.ca}", f"--cert={c.client}", f"--key={c.client_key}")
    with Etcd(scheme="https", extra=extra, client=client) as etcd:
        yield etcd


def test_tls_with_the_authority_alone(tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork) -> None:
    network = on(tls_etcd)
    network.configure()
    store = network.store(cafile=certificates.ca)
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    follower = network.follow(store)
    wait_until(lambda: follower.keys == {lease.key})


def test_tls_with_a_client_certificate(mutual_tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork) -> None:
    network = on(mutual_tls_etcd)
    network.configure()
    store = network.store(cafile=certificates.ca, certfile=certificates.client, keyfile=certificates.client_key)
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    follower = network.follow(store)
    wait_until(lambda: follower.keys == {lease.key})


def refusal(network: Network, **options: Any) -> AccessDenied | StoreUnavailable:
    """What a store says that cannot get in; at each try the same, for nothing has changed."""
    store = network.store(**options)
    errors: list[AccessDenied | StoreUnavailable] = []
    for _ in range(8):
        with pytest.raises((AccessDenied, StoreUnavailable)) as failure:
            store.read_config()
        errors.append(failure.value)
        time.sleep(0.1)
    assert len({(type(error), str(error)) for error in errors}) == 1, errors
    return errors[0]


def test_no_client_certificate_where_one_is_wanted(
    mutual_tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork
) -> None:
    denied = refusal(on(mutual_tls_etcd), cafile=certificates.ca)
    assert isinstance(denied, AccessDenied)
    assert str(denied) == (
        f"etcd at {mutual_tls_etcd.endpoint} closed the TLS connection:"
        " it may want a client certificate (--etcd-certfile, --etcd-keyfile)"
    )


def test_a_client_certificate_of_another_authority(
    mutual_tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork
) -> None:
    c = certificates
    denied = refusal(on(mutual_tls_etcd), cafile=c.ca, certfile=c.other_client, keyfile=c.client_key)
    assert isinstance(denied, AccessDenied)
    assert f"it may not accept the client certificate --etcd-certfile {c.other_client}" in str(denied)


@dataclass(frozen=True)
class Files:
    """A node's own copies of the TLS files, as a rotation replaces them."""

    directory: Path

    def put(self, **sources: str) -> dict[str, str]:
        """Replace the files; as options of a store."""
        for name, source in sources.items():
            fresh = self.directory / f"{name}.new"
            fresh.write_bytes(Path(source).read_bytes())
            fresh.replace(self.directory / name)
        return {name: str(self.directory / name) for name in ("cafile", "certfile", "keyfile")}


def test_renewed_certificates_are_used_as_soon_as_the_old_ones_are_refused(
    mutual_tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork, tmp_path: Path
) -> None:
    c, network, files = certificates, on(mutual_tls_etcd), Files(tmp_path)
    network.configure()
    store = network.store(**files.put(cafile=c.ca, certfile=c.other_client, keyfile=c.client_key))
    follower = network.follow(store)
    with pytest.raises(AccessDenied):
        store.read_config()
    files.put(certfile=c.server, keyfile=c.client_key)  # the key does not fit: as while a rotation is under way
    with pytest.raises(AccessDenied):
        store.read_config()
    files.put(certfile=c.client)
    assert store.read_config()
    wait_until(lambda: follower.snapshots)
    files.put(cafile=c.other_ca)
    assert store.read_config(), "a connection that stands needs no certificate"


def test_certificates_are_read_again_on_demand_and_the_old_ones_stay_where_they_cannot(
    mutual_tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork, tmp_path: Path
) -> None:
    c, network, files = certificates, on(mutual_tls_etcd), Files(tmp_path)
    network.configure()
    store = network.store(**files.put(cafile=c.ca, certfile=c.client, keyfile=c.client_key))
    follower = network.follow(store)
    wait_until(lambda: follower.snapshots)
    garbage = tmp_path / "garbage"
    garbage.write_text("no certificate")
    files.put(cafile=str(garbage))
    with capture_logs() as lines:
        store.reconnect()
    assert [line["event"] for line in lines if line["log_level"] == "error"] == [
        f"--etcd-cafile {tmp_path / 'cafile'}: holds no certificate in PEM form; what was read before stays in use"
    ]
    assert store.read_config()
    files.put(cafile=c.other_ca)
    store.reconnect()
    with pytest.raises(AccessDenied, match="is not signed by --etcd-cafile"):
        store.read_config()
    files.put(cafile=c.ca)
    assert store.read_config()
    lease = store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    wait_until(lambda: lease.key in follower.keys)


def test_a_server_of_another_authority(tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork) -> None:
    denied = refusal(on(tls_etcd), cafile=certificates.other_ca)
    assert isinstance(denied, AccessDenied)
    assert str(denied) == (
        f"etcd's certificate at {tls_etcd.endpoint} is not signed by --etcd-cafile {certificates.other_ca};"
        " name who did sign it with --etcd-cafile"
    )
    assert "one of the system's authorities" in str(refusal(on(tls_etcd)))


def test_a_server_whose_certificate_does_not_name_it(
    tls_etcd: Etcd, certificates: Certificates, on: MakeNetwork
) -> None:
    """localhost is two addresses, and nobody listens at one of them: gRPC tells now of this one, now of that one."""
    endpoint = tls_etcd.endpoint.replace("127.0.0.1", "localhost")
    denied = refusal(on(tls_etcd), endpoints=[endpoint], cafile=certificates.ca)
    assert isinstance(denied, AccessDenied)
    assert str(denied) == "etcd's certificate does not name localhost; use a name that it holds in --etcd-endpoints"


def test_a_server_whose_certificate_has_expired(certificates: Certificates, on: MakeNetwork) -> None:
    extra = (f"--cert-file={certificates.expired}", f"--key-file={certificates.server_key}")
    with Etcd(scheme="https", extra=extra) as etcd:
        denied = refusal(on(etcd), cafile=certificates.ca)
    assert isinstance(denied, AccessDenied)
    assert f"etcd's certificate at {etcd.endpoint} has expired; renew it" in str(denied)


def test_plain_text_to_a_tls_port(tls_etcd: Etcd, on: MakeNetwork) -> None:
    failure = refusal(on(tls_etcd), endpoints=[tls_etcd.endpoint.replace("https", "http")])
    assert "closes the connection at once: does it speak https? Then write https://" in str(failure)


def test_tls_to_a_plain_port(network: Network, certificates: Certificates) -> None:
    failure = refusal(network, endpoints=[network.etcd.endpoint.replace("http", "https")], cafile=certificates.ca)
    assert "does not answer with TLS: does it speak http? Then write http://" in str(failure)


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


def test_tls_files_that_are_missing_or_wrong(certificates: Certificates, tmp_path: Path) -> None:
    missing, garbage = str(tmp_path / "missing.pem"), tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    c = certificates
    for files, named in (
        ({"cafile": missing}, missing),
        ({"cafile": str(garbage)}, str(garbage)),
        ({"certfile": c.client}, "--etcd-keyfile"),
        ({"certfile": c.client, "keyfile": missing}, missing),
        ({"certfile": c.client, "keyfile": c.server_key}, c.server_key),
        ({"certfile": str(garbage), "keyfile": c.client_key}, str(garbage)),
    ):
        with pytest.raises(SetupError) as error:
            EtcdStore(["https://127.0.0.1:1"], **files)
        assert named in str(error.value)


def test_closing_does_not_wait_for_an_etcd_that_is_gone(own_network: Network) -> None:
    store = own_network.store()
    store.acquire(store.read_config(), request_of("a", "192.168.64.3"))
    follower = own_network.follow(store)
    wait_until(lambda: follower.snapshots)
    assert own_network.etcd.process is not None
    own_network.etcd.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    store.close()
    follower.join()
    assert time.monotonic() - started < 4
    own_network.etcd.process.send_signal(signal.SIGCONT)
