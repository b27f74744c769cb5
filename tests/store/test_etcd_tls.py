"""TLS to etcd: certificates of both sides, their renewal, and what is said when one does not fit."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from flanneld.lab.etcd import Etcd
from flanneld.lab.wait import wait_until
from subnet_lease.etcd import EtcdStore
from subnet_lease.store import AccessDenied, SetupError, StoreUnavailable
from tests.store.conftest import MakeNetwork, Network, request_of


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
