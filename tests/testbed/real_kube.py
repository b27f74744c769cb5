"""A real kube-apiserver with its etcd, from the directory that KUBEBUILDER_ASSETS names (as envtest lays it out).

It answers the same questions as ``FakeKube``, as far as a real API server can be asked them; what only the fake can do
(refuse a verb, fail on demand, compact away history) is not here, and tests that need it run on the fake alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from flanneld.lab.etcd import free_port
from flanneld.lab.netns import Namespace, end, run
from tests.testbed.fake_kube import peer_annotations
from tests.testbed.fake_kube_store import Object

TOKEN = "envtest-token"


def assets() -> Path | None:
    """Where kube-apiserver and etcd are, None where nobody said."""
    found = os.environ.get("KUBEBUILDER_ASSETS", "")
    return Path(found) if found and Path(found, "kube-apiserver").exists() else None


class RealKube:
    """One API server that allows everything to one token; inside a namespace it listens on ``address``."""

    def __init__(self, *, address: str = "127.0.0.1", namespace: Namespace | None = None) -> None:
        where = assets()
        assert where is not None
        self._where = where
        self._address = address
        self._namespace = namespace
        self._directory = Path(tempfile.mkdtemp(prefix="flanneld-kube-"))
        self._port, self._etcd_port, self._peer_port = free_port(), free_port(), free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._trust = ssl._create_unverified_context()
        self.kubeconfig = self._directory / "kubeconfig"
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def access(self) -> dict[str, str]:
        return {"kubeconfig": str(self.kubeconfig)}

    @property
    def url(self) -> str:
        return f"https://{self._address}:{self._port}"

    def _start(self) -> None:
        etcd = f"http://127.0.0.1:{self._etcd_port}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        self._spawn(
            "etcd", f"--data-dir={self._directory / 'etcd'}", f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}", "--unsafe-no-fsync",
        )  # fmt: skip
        key = self._directory / "sa.key"
        run(["openssl", "genrsa", "-out", str(key), "2048"])
        tokens = self._directory / "tokens.csv"
        tokens.write_text(f'{TOKEN},tester,tester,"system:masters"\n')
        self._spawn(
            "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={self._port}", f"--bind-address={self._address}",
            f"--cert-dir={self._directory / 'certs'}", "--service-cluster-ip-range=10.96.0.0/16",
            f"--token-auth-file={tokens}", "--authorization-mode=AlwaysAllow", "--allow-privileged=true",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
        )  # fmt: skip
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "it",
                    "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
                    "clusters": [{"name": "it", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
                    "users": [{"name": "it", "user": {"token": TOKEN}}],
                }
            )
        )
        self._wait()

    def _spawn(self, program: str, *arguments: str) -> None:
        argv = [str(self._where / program), *arguments]
        if self._namespace is not None:
            self._processes.append(self._namespace.start(argv, log=self._directory / f"{program}.log"))
            return
        with (self._directory / f"{program}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self._call("GET", "/readyz", raw=True)
                self._call("GET", "/api/v1/namespaces/default")
                return
            time.sleep(0.2)
        log = (self._directory / "kube-apiserver.log").read_text()[-3000:]
        raise RuntimeError(f"kube-apiserver did not become ready:\n{log}")

    def _call(self, method: str, path: str, body: Any = None, kind: str = "application/json", raw: bool = False) -> Any:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": kind},
        )
        with contextlib.ExitStack() as stack:
            if self._namespace is not None:
                stack.enter_context(self._namespace.inside())
            data = stack.enter_context(urllib.request.urlopen(request, context=self._trust, timeout=10)).read()
        return data if raw else json.loads(data)

    # -- what tests do; see FakeKube ---------------------------------------------------------------------------

    def add_node(self, name: str, *cidrs: str, annotations: dict[str, str] | None = None) -> Object:
        spec = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}
        body = {"metadata": {"name": name, "annotations": dict(annotations or {})}, "spec": spec}
        found: Object = self._call("POST", "/api/v1/nodes", body)
        return found

    def add_peer(self, name: str, cidr: str, public_ip: str, mac: str) -> Object:
        return self.add_node(name, cidr, annotations=peer_annotations(public_ip, mac))

    def delete_node(self, name: str) -> None:
        self._call("DELETE", f"/api/v1/nodes/{name}")

    def node(self, name: str) -> Object:
        found: Object = self._call("GET", f"/api/v1/nodes/{name}")
        return found

    def annotations(self, name: str) -> dict[str, str]:
        found: dict[str, str] = self.node(name)["metadata"].get("annotations") or {}
        return found

    def annotate(self, name: str, annotations: dict[str, str | None]) -> None:
        self.patch_node(name, {"metadata": {"annotations": annotations}})

    def patch_node(self, name: str, patch: Object) -> None:
        path = f"/api/v1/nodes/{name}" + ("/status" if "status" in patch else "")
        self._call("PATCH", path, patch, "application/strategic-merge-patch+json")

    def heartbeat(self, name: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition = {"type": "Ready", "status": "True", "lastHeartbeatTime": stamp}
        self.patch_node(name, {"status": {"conditions": [condition]}})

    def add_pod(self, namespace: str, name: str, node: str, labels: dict[str, str]) -> None:
        body = {
            "metadata": {"name": name, "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none"}]},
        }
        self._call("POST", f"/api/v1/namespaces/{namespace}/pods", body)

    def add_policy(self, namespace: str, name: str, selector: Object) -> None:
        path = f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"
        self._call("POST", path, {"metadata": {"name": name}, "spec": {"podSelector": selector}})

    def events(self, reason: str = "") -> list[Object]:
        found = self._call("GET", "/api/v1/events")["items"]
        return [event for event in found if reason in ("", event["reason"])]

    def clear(self) -> None:
        """Every object that a test may have made goes."""
        for node in self._call("GET", "/api/v1/nodes")["items"]:
            self.delete_node(node["metadata"]["name"])
        for pod in self._call("GET", "/api/v1/pods")["items"]:
            where = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
            self._call("DELETE", f"{where}?gracePeriodSeconds=0")
        self._call("DELETE", "/api/v1/namespaces/default/events")
        self._call("DELETE", "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies")

    def stop(self) -> None:
        """As FakeKube is ended."""
        self.close()

    def close(self) -> None:
        for process in reversed(self._processes):
            end(process)
        shutil.rmtree(self._directory, ignore_errors=True)
