"""How the API server is reached from inside a cluster: a service account's certificate authority and token."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from subnet_lease.kube_api import Api
from subnet_lease.kube_credentials import credentials
from subnet_lease.kube_objects import Node
from subnet_lease.store import AccessDenied, SetupError, StoreUnavailable
from tests.testbed.fake_kube import FakeKube


def certificate(directory: Path, name: str) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key in the same file."""
    pem, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(pem), "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    pem.write_text(key.read_text() + pem.read_text())
    return pem


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """The directory that kubelet mounts into a pod."""
    directory = tmp_path / "account"
    directory.mkdir()
    (directory / "ca.crt").write_text(certificate(tmp_path, "kube").read_text())
    (directory / "token").write_text("first")
    (directory / "namespace").write_text("kube-flannel")
    return directory


def in_cluster(account: Path, server: FakeKube, monkeypatch: pytest.MonkeyPatch) -> Api:
    host, _, port = server.url.removeprefix("https://").partition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    return Api(credentials("", "", str(account)))


def test_a_service_account_is_used_and_a_rotated_token_is_read_again(account, tmp_path, monkeypatch):
    with FakeKube(token="first", certificate=tmp_path / "kube.pem") as server:
        server.add_node("n1", "10.244.1.0/24")
        api = in_cluster(account, server, monkeypatch)
        assert api.node("n1").cidrs == ["10.244.1.0/24"]
        server.token = "second"
        with pytest.raises(AccessDenied, match="token"):
            api.node("n1")
        (account / "token").write_text("second")
        assert api.node("n1").metadata.name == "n1"
        version = api.node("n1").metadata.resource_version
        watch = api.watch(Node, version)
        server.heartbeat("n1")
        assert next(iter(watch))[-1].object.metadata.name == "n1"
        watch.close()
        api.close()


def test_a_server_with_another_certificate_is_refused_and_the_message_says_certificate(account, tmp_path, monkeypatch):
    with FakeKube(certificate=certificate(tmp_path, "other")) as server:
        api = in_cluster(account, server, monkeypatch)
        with pytest.raises(StoreUnavailable, match="certificate"):
            api.node("n1")
        api.close()


def test_an_api_url_replaces_the_address_and_keeps_the_credentials(account, tmp_path):
    with FakeKube(token="first", certificate=tmp_path / "kube.pem") as server:
        server.add_node("n1")
        api = Api(credentials("", server.url, str(account)))
        assert api.node("n1").metadata.name == "n1"
        api.close()


def test_an_unreadable_authority_is_a_setup_error(account, monkeypatch):
    (account / "ca.crt").write_text("not a certificate")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(SetupError, match="certificates"):
        Api(credentials("", "", str(account)))


def test_outside_of_a_cluster_it_says_what_to_give(tmp_path):
    with pytest.raises(SetupError, match="--kubeconfig-file or --kube-api-url"):
        credentials("", "", str(tmp_path / "absent"))
